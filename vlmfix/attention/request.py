"""The state of one generation: what its layers, rows and steps are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmfix.attention.branches import BranchRun
from vlmfix.attention.compiled import Compiled
from vlmfix.hf.attend import Look
from vlmfix.hf.branching import Joint
from vlmfix.hf.cache import BranchCache, BranchRows, StaticBranchCache
from vlmfix.hf.lens import lens
from vlmfix.hf.parts import Parts
from vlmfix.layout import NEVER, Layout
from vlmfix.method import Glance, LayerContext, Step
from vlmfix.plan import Plan


class Request:
    """One call of generate (or one forward and its continuations).

    Args:
        parts: the model.
        compiled: the recipe.
        layout: the visible prompt.
        joint: the prompt with branch rows, where the recipe has branches.
    """

    def __init__(self, parts: Parts, compiled: Compiled, layout: Layout, joint: Joint | None = None) -> None:
        self.parts = parts
        self.compiled = compiled
        self.layout = layout if joint is None else joint.layout
        self.visible = layout.rows
        self.copies = 1 if joint is None else joint.copies
        self.prompt_length = layout.length
        self.q_pos = torch.empty(0)
        self.past = 0
        self.visual_tokens: list[int] = layout.n_visual.tolist()
        self.pictures: list[int] = layout.n_images.tolist()
        self.rows_affected: list[int] = []
        self.layers_touched: list[set[int]] = []
        self.steps = 0
        self._branches = None if joint is None else BranchRun(joint, layout.length)
        self._taps = tuple(sorted(compiled.taps))
        self._tapped: dict[int, Tensor] = {}
        self._notes: dict[int, dict[str, Tensor]] = {}
        self._prefilling = True
        self._hidden: dict[int, Tensor] = {}
        self._plans: dict[int, tuple[Plan, ...]] = {}
        self._first: dict[int, int] = {}
        self._memory: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._count = 0
        self._readers = compiled.reading_layers
        self._acting = self._acting_rows()

    # --- the model's forward -----------------------------------------------------------------------------------------

    def before(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the forward with branch rows added."""
        run = self._branches
        if run is None:
            return kwargs
        cache = kwargs.get("past_key_values")
        if self.steps == 0:
            if cache is None and kwargs.get("use_cache"):
                kwargs = {**kwargs, "past_key_values": self.cache()}
            return run.first(kwargs)
        if cache is None or cache.get_seq_length() == 0:
            return run.again(kwargs)
        return run.following(kwargs)

    def after(self, output: Any) -> Any:
        """Contracts logits to the visible rows and lets the decoding method rewrite the last position."""
        self.steps += 1
        run, method = self._branches, self.compiled.decoding
        blocks: tuple[Tensor, ...] = (output.logits,)
        if run is not None:
            logits = output.logits if self.steps > 1 else run.spread(output)
            if self.steps == 1 and run.repeats > 1 and output.get("past_key_values") is not None:
                self._repeat(run.repeats)
            blocks = torch.split(logits, logits.shape[0] // self.copies)
            run.trim(output, blocks[0].shape[0])
            output["logits"] = blocks[0]
        if method is not None:
            last, *branches = (block[:, -1].float() for block in blocks)
            scores = method.scores(last, Step(self.steps, tuple(branches), self._taps, self._early(len(last))))
            output["logits"] = torch.cat([blocks[0][:, :-1].float(), scores[:, None]], 1)
        return output

    def _early(self, visible: int) -> Callable[[int, bool], Tensor]:
        def early(layer: int, norm: bool) -> Tensor:
            hidden = self._tapped[layer]
            rows = hidden.shape[0] // self.copies
            return lens(self.parts, hidden[:rows], norm).repeat_interleave(visible // rows, 0)

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
    def extra_length(self) -> int:
        """Slots the joint prompt has beyond the visible one."""
        return 0 if self._branches is None else self._branches.joint.length - self.prompt_length

    def why_inactive(self, index: int) -> str:
        """Why an attention method touched no layer."""
        if not self.rows_affected[index]:
            return "no row has a picture"
        return "it found nothing to change in any of its layers"

    def take(self, rows: Tensor) -> None:
        """Per-row state follows the rows of the cache, repeats allowed."""
        old, rows = self.layout.rows, rows.to(self.layout.kinds.device)

        def change(t: Tensor) -> Tensor:
            return t[rows] if t.dim() and t.shape[0] == old else t

        self.layout = self.layout.take(rows)
        self._acting = {i: change(acting) for i, acting in self._acting.items()}
        self._plans = {k: tuple(_rowwise(plan, change) for plan in plans) for k, plans in self._plans.items()}
        self._memory = {k: {name: change(t) for name, t in notes.items()} for k, notes in self._memory.items()}
        self._notes = {k: {name: change(t) for name, t in notes.items()} for k, notes in self._notes.items()}

    # --- the decoder's forward ---------------------------------------------------------------------------------------

    def step(self, rows: int, queries: int, past: Any, device: Any) -> None:
        """A decoder forward begins: positions of its queries, and rows that generate has repeated."""
        if rows != self.layout.rows:
            self._repeat(rows // self.layout.rows)
        self.past = past if isinstance(past, int) else self._count
        self._count = self.past + queries
        self.q_pos = past + torch.arange(queries, device=device)
        self._prefilling = self.past < self.layout.length
        self._hidden.clear()

    def observe(self, layer: int, hidden: Tensor) -> None:
        """Keeps the residual stream entering a layer: a prefill for methods that read it, the last row for taps."""
        if self._prefilling and layer in self._readers:
            self._hidden[layer] = hidden
        if layer in self.compiled.taps:
            self._tapped[layer] = hidden[:, -1]

    def visit(self, layer: int, look: Look) -> tuple[tuple[Plan, ...], int]:
        """Plans of a layer and the first query position any of them changes.

        Plans are made at the first visit, at every prefill chunk for methods that read hidden states, and whenever a
        method that watches attention asks for it.
        """
        if layer in self.compiled.watched_layers:
            self._watch(layer, look)
        if layer not in self._plans or layer in self._hidden:
            self._build(layer, look.query.shape[1])
        return self._plans[layer], self._first[layer]

    def _watch(self, layer: int, look: Look) -> None:
        for i, method in enumerate(self.compiled.attention):
            if i in self._acting and layer in method.watches(self.parts.depth):
                context = self._context(i, layer, look.query.shape[1], None)
                glance = Glance(context, look.query, look.key, look.rows, look.k_pos)
                if method.watch(glance, self._notes.setdefault(i, {})):
                    self._plans.clear()

    def finish(self, layer: int, out: Tensor) -> Tensor:
        """Lets a head rule pick its scales from the prefill's outputs, then keeps them for the generation."""
        plans = self._plans[layer]
        if not any(plan.head_rule for plan in plans):
            return out
        kept: list[Plan] = []
        for plan in plans:
            if plan.head_rule is not None:
                scale = plan.head_rule(out.transpose(1, 2))
                active = (self.q_pos[None] >= plan.active_from[:, None])[:, :, None, None]
                out = torch.where(active, out * scale[:, None, :, None], out)
                plan = replace(plan, head_rule=None, head_scale=scale)
            kept.append(plan)
        self._plans[layer] = tuple(kept)
        return out

    # --- inside -------------------------------------------------------------------------------------------------------

    def _acting_rows(self) -> dict[int, Tensor]:
        """[rows] bool per attention method: the rows it is on, with a picture where the method needs one."""
        block = torch.arange(self.layout.rows, device=self.layout.kinds.device) < self.visible
        out: dict[int, Tensor] = {}
        for i, method in enumerate(self.compiled.attention):
            acting = {"visible": block, "all": torch.ones_like(block), "branches": ~block}[method.on]
            if method.needs_picture:
                acting = acting & (self.layout.n_visual > 0)
            self.rows_affected.append(int(acting.sum()))
            self.layers_touched.append(set())
            if self.rows_affected[i]:
                out[i] = acting
        return out

    def _build(self, layer: int, heads: int) -> None:
        plans: list[Plan] = []
        for i, method in enumerate(self.compiled.attention):
            if i not in self._acting or layer not in self.compiled.layers[i]:
                continue
            hidden = self._hidden.get(layer) if method.reads_hidden else None
            plan = method.plan(self._context(i, layer, heads, hidden))
            if plan is None:
                continue
            acting = self._acting[i]
            plans.append(replace(plan, active_from=torch.where(acting, plan.active_from, NEVER)))
            self.layers_touched[i].add(layer)
        self._plans[layer] = tuple(plans)
        starts = [t for plan in plans for t in (plan.active_from, *(part.query_from for part in plan.hidden))]
        if self._prefilling:
            self._first[layer] = int(torch.stack(starts).min()) if starts else NEVER
        else:  # every row of a decoding step lies past the prompt; asking the device would wait for it
            self._first[layer] = 0 if starts else NEVER

    def _context(self, index: int, layer: int, heads: int, hidden: Tensor | None) -> LayerContext:
        memory = self._memory.setdefault((index, layer), {})
        notes = self._notes.setdefault(index, {})
        return LayerContext(layer, self.layout, heads, hidden, self.past, memory, notes, self.compiled.facts)

    def _repeat(self, repeats: int) -> None:
        rows = torch.arange(self.layout.rows, device=self.layout.kinds.device).repeat_interleave(repeats)
        self.take(rows)


def _rowwise(value: Any, change: Any) -> Any:
    """A dataclass with every tensor changed, also inside its parts (rules, rolling groups, hidden intervals)."""
    updates: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if isinstance(item, Tensor):
            updates[f.name] = change(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            updates[f.name] = _rowwise(item, change)
        elif isinstance(item, tuple) and item and dataclasses.is_dataclass(item[0]):
            updates[f.name] = tuple(_rowwise(part, change) for part in item)
    return replace(value, **updates)
