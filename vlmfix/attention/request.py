"""The state of one generation: its forwards, seen from the hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.attention.branches import BranchRun
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.counterfactual import PackedText, TextRows
from vlmfix.attention.late import LatePrompt
from vlmfix.attention.layers import Layers
from vlmfix.attention.observing import open_all
from vlmfix.attention.saliency import Tracer, score
from vlmfix.attention.split import SplitPrefill
from vlmfix.attention.values import overwrite
from vlmfix.errors import Refusal
from vlmfix.hf import encoding
from vlmfix.hf.attend import Look, Tail
from vlmfix.hf.branching import Joint
from vlmfix.hf.cache import BranchCache, BranchRows, StaticBranchCache
from vlmfix.hf.lens import lens
from vlmfix.hf.parts import Parts
from vlmfix.hf.reader import Reader
from vlmfix.hf.slots import Frame
from vlmfix.hf.vision import class_row, on_tokens
from vlmfix.layout import Layout
from vlmfix.method import Step
from vlmfix.plan import Plan
from vlmfix.shown import draws

OWN = -1
"""Place of the decoding method's own notes among those of the attention methods."""

NO_PICTURE = "no row has a picture"
"""Why a method did not act on a whole batch."""


def rewritten(compiled: Compiled, layout: Layout) -> bool:
    """Whether the recipe's decoding method rewrites the logits of any row."""
    return bool(_rewritten_rows(compiled, layout).any())


def _rewritten_rows(compiled: Compiled, layout: Layout) -> Tensor:
    method = compiled.decoding
    if method is None:
        return torch.zeros_like(layout.n_visual, dtype=torch.bool)
    return layout.n_visual > 0 if method.needs_picture else torch.ones_like(layout.n_visual, dtype=torch.bool)


class Request:
    """One call of generate (or one forward and its continuations).

    Args:
        parts: the model.
        compiled: the recipe.
        layout: the visible prompt.
        joint: the prompt with branch rows, where the recipe has branches.
        late: the prompt of branches that wait for the visible rows' prefill, where the recipe has such.
        counterfactual: how the prefill also runs the prompt without pictures, where head rules compare the two; `joint`
            then includes its rows, if it has any.
    """

    def __init__(
        self,
        parts: Parts,
        compiled: Compiled,
        layout: Layout,
        joint: Joint | None = None,
        late: LatePrompt | None = None,
        counterfactual: PackedText | TextRows | None = None,
    ) -> None:
        self.parts = parts
        self.compiled = compiled
        self.visible = layout.rows
        self.prompt_length = layout.length
        self.visual_tokens: list[int] = layout.n_visual.tolist()
        self.pictures: list[int] = layout.n_images.tolist()
        self.steps = 0
        self._rewritten = _rewritten_rows(compiled, layout)
        self.rows_rewritten = int(self._rewritten.sum())
        self._late = late
        joint = late.joint if late is not None else joint
        self.copies = 1 if joint is None else joint.copies
        self._branches = None if joint is None else BranchRun(joint, layout.length)
        first = late.first.layout if late is not None else layout if joint is None else joint.layout
        visible = torch.arange(first.rows, device=first.kinds.device) < layout.rows
        self.layers = Layers(compiled, first, visible, counterfactual)
        self._packed = counterfactual if isinstance(counterfactual, PackedText) else None
        self._text_rows = isinstance(counterfactual, TextRows)
        self.tail: Tail | None = None
        self.frame: Frame | None = None
        self._last: Tensor | None = None
        self.reader: Reader | None = None
        self._read: Tensor | None = None
        self._split = SplitPrefill(parts, self.cache) if self.layers.splits else None
        self._tracer = Tracer(compiled.saliency_layers) if compiled.saliency_layers else None
        self._looked: tuple[Look, tuple[Plan, ...]] | None = None
        self.observations = open_all(parts.model, compiled.facts)
        self.inputs: Mapping[str, Any] = {} if joint is None else joint.inputs
        self.layers.ids = None if joint is None else joint.inputs.get("input_ids")
        self._class_rows: dict[int, Tensor] = {}
        self._room = 0
        self._tables: dict[tuple[int, int], Tensor] = {}

    # --- the model's forward -----------------------------------------------------------------------------------------

    def before(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the forward with branch rows added."""
        run, late = self._branches, self._late
        if self.frame is not None or (late is not None and late.running):
            return kwargs
        cache = kwargs.get("past_key_values")
        if self.reader is not None:
            self._read = self._along(self.reader, kwargs, cache)
        if run is not None and self.steps == 0:
            if cache is None and kwargs.get("use_cache"):
                kwargs = {**kwargs, "past_key_values": self.cache()}
            kwargs = run.first(kwargs) if late is None else late.before(kwargs, run)
        elif run is not None:
            uncached = cache is None or cache.get_seq_length() == 0
            kwargs = run.again(kwargs) if uncached else run.following(kwargs)
        if self.steps == 0 and isinstance(kwargs.get("position_ids"), Tensor):
            self._last = kwargs["position_ids"][..., -1:]
        if self._packed is not None and self.steps == 0:
            kwargs = self._packed.before(kwargs, branches=run is not None)
            self.tail = self._packed.tail
        if self._split is not None:
            kwargs = self._split.before(kwargs, self.layers.layout, frozenset(self.inputs))
        return kwargs

    def after(self, output: Any) -> Any:
        """Contracts logits to the visible rows and lets the decoding method rewrite the last position."""
        run, method = self._branches, self.compiled.decoding
        if self._packed is not None and self.tail is not None:
            self._packed.after(output)
            self.tail = None
        if self._split is not None:
            output = self._split.after(output)
        if self._late is not None and self.steps == 0:
            if self._late.running:
                return output
            self._late.after(self, output)
        self.steps += 1
        blocks: tuple[Tensor, ...] = (output.logits,)
        if run is not None:
            logits = output.logits if self.steps > 1 else run.spread(output)
            if self.steps == 1 and run.repeats > 1 and output.get("past_key_values") is not None:
                self.layers.repeat(run.repeats)
            blocks = torch.split(run.cut(logits), logits.shape[0] // self.copies)
            run.trim(output, blocks[0].shape[0])
            output["logits"] = blocks[0]
            if self._text_rows:
                blocks = blocks[:-1]
                self._drop_text(run, output.get("past_key_values"))
        if method is not None and self.rows_rewritten:
            last, *branches = (block[:, -1].float() for block in blocks)
            branches = branches if self._read is None else [self._read, *branches]
            taps = tuple(sorted(self.compiled.taps))
            saliency = self._saliency(last)
            number = self.steps if self.frame is None else self.frame.number
            early = self._early(len(last))
            step = Step(number, tuple(branches), taps, early, self.notes, saliency, self._table)
            rewritten = method.scores(last.detach(), step)
            acting = self._rewritten.repeat_interleave(len(last) // self.visible)
            rewritten = torch.where(acting[:, None].to(last.device), rewritten, last.detach())
            output["logits"] = torch.cat([blocks[0][:, :-1].detach().float(), rewritten[:, None]], 1)
            if self._tracer is not None:
                self._tracer.stop(output.get("past_key_values"))
                self._looked = None
        return output

    def _along(self, reader: Reader, kwargs: dict[str, Any], cache: Any) -> Tensor:
        """Logits of the language model that reads along, for the tokens of this forward."""
        if self.steps == 0:
            return reader.start(BranchRun.rows(kwargs) // self.visible, keep=cache is not None)
        if cache is None or cache.get_seq_length() == 0:
            return reader.again(kwargs["input_ids"][:, self.prompt_length :])
        return reader.follow(kwargs["input_ids"])

    def _watch(self, layer: int, look: Look, plans: tuple[Plan, ...]) -> None:
        """Shows observers the query that predicts, if this forward has it."""
        first = self.past + len(self.q_pos) - look.query.shape[2]
        last = (self.past + len(self.q_pos) if self.tail is None else self.tail.start) - 1
        if last < self.layers.layout.length - 1 or (self._late is not None and self._late.running):
            return
        rows = int(self.layers.visible.sum())
        for i, observation in enumerate(self.observations):
            context = self.layers.context(OWN - 1 - i, layer, look.query)
            observation.watch(context, look, plans, last - first, rows)

    def _saliency(self, logits: Tensor) -> Callable[[Tensor], Tensor] | None:
        tracer = self._tracer
        if tracer is None or not tracer.tracing:
            return None

        def scores(candidates: Tensor) -> Tensor:
            start = self.layers.layout.length if self.frame is None else self.frame.answer
            parts = []
            for rows, k_pos in tracer.saliency(logits, candidates, self.frame is not None):
                generated = (k_pos >= start) & (k_pos <= self.q_pos[-1])
                parts.append(score(rows, generated[None]))
            return torch.cat(parts).mean(0)

        return scores

    def _table(self, seed: int, count: int) -> Tensor:
        """Draws of all steps that the cache has room for; made when a step runs before it is captured."""
        assert self.frame is not None
        if (seed, count) not in self._tables:
            made = torch.stack([draws(seed, number, count) for number in range(self._room + 2)])
            self._tables[seed, count] = made.to(self.frame.slot.device)
        return self._tables[seed, count]

    def _drop_text(self, run: BranchRun, cache: Any) -> None:
        """Lets the rows without pictures go, once the prefill is in the cache."""
        if not isinstance(cache, BranchRows):  # nothing is kept, or nothing that the next forward could find
            return
        kept = run.drop()
        cache.keep(kept)
        self.layers.take(torch.arange(kept))
        self.copies, cache.copies, self._text_rows = run.joint.copies, run.joint.copies, False

    def _early(self, visible: int) -> Callable[[bool], Tensor]:
        def early(norm: bool) -> Tensor:
            hidden = torch.stack([self.layers.tapped[layer] for layer in sorted(self.compiled.taps)])
            rows = hidden.shape[1] // self.copies
            logits = lens(self.parts, hidden[:, :rows].flatten(0, 1), norm)
            return logits.view(len(hidden), rows, -1).repeat_interleave(visible // rows, 1)

        return early

    def cache(self, static_length: int | None = None) -> BranchRows:
        """An empty cache for this request's rows; of fixed size if a length is given."""
        config = self.parts.text_config
        if static_length is None:
            cache: BranchRows = BranchCache(config=config)
        else:
            cache = StaticBranchCache(config=config, max_cache_len=static_length)
        cache.copies, cache.state = self.copies, self
        return cache

    @property
    def length(self) -> int:
        """Slots of the cache behind the prompt, branch rows included."""
        return self.prompt_length if self._branches is None else self._branches.joint.length

    def standing(self, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Where the rows of this request stand after the prefill, branch rows included.

        Args:
            valid: [B, K] bool, the caller's prompt.

        Returns:
            [rows, K] bool slots of the cache that are no padding, and [..., rows, 1] last position ids.
        """
        if self._branches is not None:
            return self._branches.standing()
        return valid, valid.long().sum(1, keepdim=True) - 1 if self._last is None else self._last

    def settle(self, frame: Frame, capacity: int) -> None:
        """Ends the prefill for good: plans for a cache of `capacity` slots, inputs let go."""
        self._room = capacity
        self.layers.settle(capacity)
        if not self.compiled.stepwise_layers:
            frame.prepare(self.layers.plans, self.compiled.facts.heads)
        self.inputs, self._late = {}, None
        if self._branches is not None:
            self._branches.joint = replace(self._branches.joint, inputs={})

    def overwrite(self, other: Request) -> bool:
        """Takes over a settled request at the addresses of this one; False where they differ in more than values."""
        same = self.rows_rewritten > 0, self.visible
        if same != (other.rows_rewritten > 0, other.visible) or not overwrite(self.notes, other.notes):
            return False
        if not self.layers.overwrite(other.layers):
            return False
        self._rewritten.copy_(other._rewritten)
        return True

    @property
    def notes(self) -> dict[str, Tensor]:
        """The decoding method's own notes."""
        return self.layers.notes.setdefault(OWN, {})

    @property
    def replanned(self) -> bool:
        """Whether a method made plans anew in a step."""
        return self.layers.replanned

    @property
    def extra_length(self) -> int:
        """Slots the prefill has beyond the visible prompt."""
        joint = 0 if self._branches is None else self._branches.joint.length - self.prompt_length
        return joint + (0 if self._packed is None else self._packed.count)

    def why_inactive(self, index: int) -> str:
        """Why an attention method touched no layer."""
        if not self.layers.rows_affected[index]:
            return NO_PICTURE
        return "it found nothing to change in any of its layers"

    def take(self, rows: Tensor) -> None:
        """Per-row state follows the rows of the cache, repeats allowed."""
        self.layers.take(rows)
        if self.reader is not None:
            self.reader.take(rows[: len(rows) // self.copies])

    # --- the decoder's forward ---------------------------------------------------------------------------------------

    @property
    def q_pos(self) -> Tensor:
        """[Q] slots of the current queries."""
        return self.layers.q_pos

    @property
    def past(self) -> int:
        """Slot of the first current query."""
        return self.layers.past

    def step(self, rows: int, queries: int, past: Any, device: Any) -> None:
        """A decoder forward begins."""
        if self.frame is not None:
            self.layers.follow(self.frame.slot)
            return
        if self.compiled.vision_layers and not self.layers.seen and any(self.visual_tokens):
            read, layout = self._class_rows or encoding.notes(), self.layers.layout
            if not read:
                raise Refusal("the vision tower did not run, so its class token cannot be read; pass pixel_values")
            self.layers.seen = {k: on_tokens(self.parts.model, layout, v, self.inputs) for k, v in read.items()}
        self.layers.step(rows, queries, past, device)

    def entering(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the decoder's forward, changed where a late branch asks for it."""
        return kwargs if self._late is None else self._late.entering(kwargs)

    def observe(self, layer: int, hidden: Tensor) -> Tensor:
        """[B, Q, width] residual stream entering a layer; the graph of a traced step starts in one."""
        self.layers.observe(layer, hidden)
        if self.past < self.layers.layout.length:
            for observation in self.observations:
                if observation.reads_hidden:
                    past = self.past + len(self.q_pos) - hidden.shape[1]
                    observation.read(layer, self.layers.layout, hidden.detach(), past)
        if self._tracer is None or self.steps == 0:
            return hidden
        if hidden.shape[1] != 1:
            raise Refusal("saliency is read off single-token steps and needs the cache; set use_cache=True")
        return self._tracer.enter(layer, hidden)

    def see(self, layer: int, attention: nn.Module, hidden: Tensor) -> None:
        """Reads off where the class token looks, in the vision layers that a method asks for."""
        for wanted in self.compiled.vision_layers:
            if layer == wanted % len(self.parts.tower):
                self._class_rows[wanted] = encoding.notes()[wanted] = class_row(attention, hidden)

    def watches(self, layer: int) -> bool:
        """Whether any method looks at a layer's attention in every step."""
        return layer in self.compiled.stepwise_layers

    def visit(self, layer: int, look: Look) -> tuple[tuple[Plan, ...], int]:
        """Plans of a layer and the first query position any of them changes."""
        plans = self.layers.visit(layer, look)
        if self._tracer is not None or self.observations:
            self._looked = look, plans[0]
        return plans

    def finish(self, layer: int, out: Tensor) -> Tensor:
        """Last word on a layer's output [B, Q, H, D]."""
        if self._tracer is not None and self._looked is not None:  # gradients hold the scales of heads, as plans do
            self._tracer.keep(layer, out, *self._looked)
        out = self.layers.finish(layer, out)
        if self.observations and self._looked is not None:
            self._watch(layer, *self._looked)
        return out
