"""Branches whose prompt depends on the visible rows' prefill: a prefill in two parts beneath one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfix.attention.branches import BranchRun
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.layers import Layers
from vlmfix.errors import Refusal
from vlmfix.hf.branching import Joint, join
from vlmfix.hf.cache import merge
from vlmfix.hf.inputs import Prompt, changes_pixels
from vlmfix.hf.parts import Parts
from vlmfix.layout import Layout
from vlmfix.view import View

if TYPE_CHECKING:
    from vlmfix.attention.request import Request

DEEP = "deepstack_visual_embeds"
"""Keyword of decoders that add visual features again behind their first layers: one [visual tokens, width] for each."""


@dataclass
class LatePrompt:
    """The two parts of the prefill.

    First run the visible rows and probe rows, which only lend their attention; then, knowing that, the branch rows with
    other pictures or some embeddings wiped; then both caches become one and the probe rows are dropped.

    Args:
        first: visible and probe rows.
        branch: branch rows alone.
        joint: what later forwards see: visible and branch rows.
        parts: the model.
        prompt: the caller's.
    """

    first: Joint
    branch: Joint
    joint: Joint
    parts: Parts
    prompt: Prompt
    running: bool = False
    _wiped: Tensor | None = field(default=None, repr=False)
    _blank: float = 0.0
    _rest: dict[str, Any] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(parts: Parts, compiled: Compiled, prompt: Prompt) -> LatePrompt:
        """Builds the prompts of a recipe with late branches.

        Raises:
            Refusal: the family cannot run branches.
        """
        first = join(parts, prompt, compiled.probes)
        branch = join(parts, prompt, [View()], visible=False, length=first.length)
        rows = prompt.layout.rows
        layout = Layout.stack([_rows(first.layout, rows), branch.layout])
        positions = torch.cat([first.positions[..., :rows, :], branch.positions], -2)
        mask = torch.cat([first.mask[:rows], branch.mask])
        return LatePrompt(first, branch, Joint({}, mask, positions, layout, rows, 2), parts, prompt)

    def before(self, kwargs: dict[str, Any], run: BranchRun) -> dict[str, Any]:
        """Keywords of the first part.

        Raises:
            Refusal: there is no cache to join the parts in.
        """
        if kwargs.get("past_key_values") is None:
            raise Refusal(
                "this method's branch starts after the prompt was read and needs the cache; set use_cache=True"
            )
        self._rest = run.rest(kwargs, self.first.inputs)
        run.repeats = run.rows(kwargs) // self.joint.visible
        return {**self._rest, **self.first.inputs}

    def after(self, request: Request, output: Any) -> None:
        """Runs the second part and joins it to the first."""
        method, upper = request.compiled.decoding, request.layers
        assert method is not None
        cache, rows = output.past_key_values, torch.arange(self.joint.visible, device=output.logits.device)
        own = {name: t for i in request.compiled.own for name, t in upper.notes.get(i, {}).items()}
        self._wiped, self._blank = method.wiped(own, upper.layout, self.joint.visible), method.blank()
        view = method.redrawn(own, upper.layout, self.joint.visible)
        if changes_pixels(view):
            self.branch = join(self.parts, self.prompt, [view], visible=False, length=self.first.length)
        upper.take(rows)
        request.layers = Layers(request.compiled, self.branch.layout, torch.zeros_like(upper.visible))
        self.running = True
        try:
            rest = {**self._rest, "past_key_values": request.cache()}
            second = request.parts.top(**{**rest, **self.branch.inputs})
        finally:
            self.running, self._rest = False, {}
        merge(cache, rows, second.past_key_values)
        request.layers = Layers.stack(upper, request.layers)
        output["logits"] = torch.cat([output.logits[: self.joint.visible], second.logits])

    def entering(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Wipes the branch's embeddings, and what deeper layers add to them, while the branch is read.

        Raises:
            Refusal: the decoder was handed ids instead of embeddings.
        """
        if not self.running or self._wiped is None:
            return kwargs
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            raise Refusal(
                f"{self.parts.family} hands its decoder token ids and pictures, so a branch's visual tokens cannot be "
                "wiped; use a method whose branch starts with the prompt (vcd, m3id, icd)"
            )
        wiped = self._wiped[:, : embeds.shape[1]].to(embeds.device)
        out = {**kwargs, "inputs_embeds": embeds.masked_fill(wiped[..., None], self._blank)}
        if kwargs.get(DEEP) is not None:
            kept = ~wiped[kwargs["visual_pos_masks"].to(wiped.device)]
            out[DEEP] = [deep * kept[:, None].to(deep) for deep in kwargs[DEEP]]
        return out


def _rows(layout: Layout, count: int) -> Layout:
    return layout.take(torch.arange(count, device=layout.kinds.device))
