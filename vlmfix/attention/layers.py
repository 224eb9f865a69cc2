"""The layers of one generation: plans, notes and positions, row by row."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmfix.attention.compiled import Compiled
from vlmfix.attention.counterfactual import PackedText, TextRows
from vlmfix.attention.values import overwrite
from vlmfix.hf.attend import Look
from vlmfix.kernels.grouped_attention.pack import renew
from vlmfix.layout import NEVER, Layout
from vlmfix.method import Glance, LayerContext
from vlmfix.plan import Plan


class Layers:
    """State of all layers for one set of rows.

    Args:
        compiled: the recipe.
        layout: the rows' prompts.
        visible: [B] bool, the rows the caller knows of; the others are branch rows.
        counterfactual: how head rules see the prompt without pictures.
    """

    def __init__(
        self,
        compiled: Compiled,
        layout: Layout,
        visible: Tensor,
        counterfactual: PackedText | TextRows | None = None,
    ) -> None:
        self.compiled = compiled
        self.counterfactual = counterfactual
        self.layout = layout
        self.visible = visible
        self.q_pos = torch.empty(0)
        self.past = 0
        self.rows_affected: list[int] = []
        self.layers_touched: list[set[int]] = []
        self.tapped: dict[int, Tensor] = {}
        self.notes: dict[int, dict[str, Tensor]] = {}
        self.seen: dict[int, Tensor] = {}
        self.ids: Tensor | None = None
        self._prefilling = True
        self.replanned = False
        self._hidden: dict[int, Tensor] = {}
        self._plans: dict[int, tuple[Plan, ...]] = {}
        self._alike: dict[int, Plan] = {}
        self._heads: dict[int, tuple[tuple[int, Plan], ...]] = {}
        self._scales: dict[tuple[int, int], Tensor] = {}
        self._first: dict[int, int] = {}
        self._memory: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._count = 0
        self._acting = self._acting_rows()

    @staticmethod
    def stack(upper: Layers, lower: Layers) -> Layers:
        """The rows of both, after their prefills; plans are made anew from the notes."""
        both = Layers(
            upper.compiled, Layout.stack([upper.layout, lower.layout]), torch.cat([upper.visible, lower.visible])
        )
        both.layers_touched = [a | b for a, b in zip(upper.layers_touched, lower.layers_touched, strict=True)]
        both.notes = _stacked(upper.notes, lower.notes)
        both._memory = _stacked(upper._memory, lower._memory)
        both._scales = {k: torch.cat([t, t.new_ones(lower.layout.rows, t.shape[1])]) for k, t in upper._scales.items()}
        return both

    def take(self, rows: Tensor) -> None:
        """Per-row state follows the rows of the cache, repeats allowed."""
        old, rows = self.layout.rows, rows.to(self.layout.kinds.device)

        def change(t: Tensor) -> Tensor:
            return t[rows] if t.dim() and t.shape[0] == old else t

        self.layout = self.layout.take(rows)
        self._alike.clear()
        self.visible = change(self.visible)
        self._acting = {i: change(acting) for i, acting in self._acting.items()}
        self._plans = {k: tuple(_rowwise(plan, change) for plan in plans) for k, plans in self._plans.items()}
        self._heads = {k: tuple((i, _rowwise(plan, change)) for i, plan in on) for k, on in self._heads.items()}
        self._scales = {k: change(t) for k, t in self._scales.items()}
        self._memory = {k: {name: change(t) for name, t in notes.items()} for k, notes in self._memory.items()}
        self.notes = {k: {name: change(t) for name, t in notes.items()} for k, notes in self.notes.items()}
        self.seen = {k: change(t) for k, t in self.seen.items()}
        self.ids = None if self.ids is None else change(self.ids)

    def repeat(self, repeats: int) -> None:
        """Every row several times in place."""
        self.take(torch.arange(self.layout.rows, device=self.layout.kinds.device).repeat_interleave(repeats))

    def step(self, rows: int, queries: int, past: Any, device: Any) -> None:
        """A decoder forward begins: positions of its queries, and rows that generate has repeated."""
        if rows != self.layout.rows:
            self.repeat(rows // self.layout.rows)
        self.past = past if isinstance(past, int) else self._count
        self._count = self.past + queries
        self.q_pos = past + torch.arange(queries, device=device)
        self._prefilling = self.past < self.layout.length
        self._hidden.clear()

    def follow(self, slot: Tensor) -> None:
        """A step of one token begins at a slot [1] that only the device knows."""
        self.q_pos, self.past, self._prefilling = slot, self.layout.length, False
        self._hidden.clear()

    def settle(self, length: int) -> None:
        """Makes plans what they are from now on: tables of `length` keys, heads scaled by plans and not afterwards."""
        for layer, on in self._plans.items():
            heads = self._heads.pop(layer, ())
            scaling = (replace(p, head_rule=None, head_scale=self._head_scale(i, layer, p)) for i, p in heads)
            self._plans[layer] = tuple(_lengthened(plan, length) for plan in (*on, *scaling))

    @property
    def plans(self) -> dict[int, tuple[Plan, ...]]:
        """What each layer follows."""
        return self._plans

    def overwrite(self, other: Layers) -> bool:
        """Takes over settled plans at the addresses of these; False where they differ in more than values."""
        mine, theirs = ({layer: on for layer, on in plans.items() if on} for plans in (self._plans, other._plans))
        if not overwrite(mine, theirs):
            return False
        for layer, plans in self._plans.items():
            renew(plans, self.compiled.facts.heads[layer])
        return True

    def observe(self, layer: int, hidden: Tensor) -> None:
        """Keeps the residual stream entering a layer: a prefill for methods that read it, the last row for taps."""
        if self._prefilling and layer in self.compiled.reading_layers:
            self._hidden[layer] = hidden
        if layer in self.compiled.taps:
            self.tapped[layer] = hidden[:, -1]

    @property
    def splits(self) -> bool:
        """Whether a method that acts on any row needs the last prompt token to run by itself."""
        depth, methods = self.compiled.facts.depth, enumerate(self.compiled.attention)
        return any(i in self._acting and method.splits_prefill(depth) for i, method in methods)

    def visit(self, layer: int, look: Look) -> tuple[tuple[Plan, ...], int]:
        """Plans of a layer and the first query position any of them changes.

        Plans are made at the first visit, at every prefill chunk for methods that read hidden states, and whenever a
        method that watches attention asks for it.
        """
        if layer in (self.compiled.watched_layers if self._prefilling else self.compiled.stepwise_layers):
            self._watch(layer, look)
        if layer not in self._plans or layer in self._hidden:
            self._build(layer, look.query)
            self._hidden.pop(layer, None)  # of all layers together they are as large as the cache
        return self._plans[layer], self._first[layer]

    def _watch(self, layer: int, look: Look) -> None:
        for i, method in enumerate(self.compiled.attention):
            if not self._prefilling and not method.watches_steps:
                continue
            if i in self._acting and layer in method.watches(self.compiled.facts.depth):
                context = self.context(i, layer, look.query, False)
                glance = Glance(context, look.query, look.key, look.rows, look.k_pos, look.value)
                if method.watch(glance, self.notes.setdefault(i, {})):
                    self.replanned = not self._prefilling
                    self._plans.pop(layer, None)
                    self._alike.pop(i, None)
                    if not method.replans_here:
                        self._plans.clear()

    def finish(self, layer: int, out: Tensor) -> Tensor:
        """Scales the heads of a layer's output [B, Q, H, D]; a head rule picks its scales in the prefill, for good."""
        for i, plan in self._heads.get(layer, ()):
            if plan.head_rule is not None and (i, layer) not in self._scales:
                assert self.counterfactual is not None
                self._scales[i, layer] = plan.head_rule(*self.counterfactual.pair(out, self.layout))
            scale = self._head_scale(i, layer, plan)
            assert scale is not None
            slots = self.q_pos[len(self.q_pos) - out.shape[1] :]
            active = (slots[None] >= plan.active_from[:, None])[:, :, None, None]
            out = torch.where(active, out * scale[:, None, :, None].to(out.dtype), out)
        return out

    def _head_scale(self, index: int, layer: int, plan: Plan) -> Tensor | None:
        return plan.head_scale if plan.head_rule is None else self._scales[index, layer]

    def _acting_rows(self) -> dict[int, Tensor]:
        """[rows] bool per attention method: the rows it is on, with a picture where the method needs one."""
        out: dict[int, Tensor] = {}
        for i, method in enumerate(self.compiled.attention):
            acting = {"visible": self.visible, "all": torch.ones_like(self.visible), "branches": ~self.visible}[
                method.on
            ]
            if method.needs_picture:
                acting = acting & (self.layout.n_visual > 0)
            self.rows_affected.append(int(acting.sum()))
            self.layers_touched.append(set())
            if method.scales_text and isinstance(self.counterfactual, TextRows):
                acting = acting[self.counterfactual.partner.to(acting.device)]
            if self.rows_affected[i]:
                out[i] = acting
        return out

    def _build(self, layer: int, query: Tensor) -> None:
        plans: list[tuple[int, Plan]] = []
        for i, method in enumerate(self.compiled.attention):
            if i not in self._acting or layer not in self.compiled.layers[i]:
                continue
            plan = self._alike.get(i) or self._plan(i, self.context(i, layer, query, method.reads_hidden))
            if plan is None:
                continue
            if method.plans_alike:
                self._alike[i] = plan
            plans.append((i, plan))
            self.layers_touched[i].add(layer)
        self._heads[layer] = tuple((i, plan) for i, plan in plans if plan.only_scales_heads)
        self._plans[layer] = _aligned([plan for _, plan in plans if not plan.only_scales_heads])
        starts = [
            t for plan in self._plans[layer] for t in (plan.active_from, *(part.query_from for part in plan.hidden))
        ]
        if self._prefilling:
            self._first[layer] = int(torch.stack(starts).min()) if starts else NEVER
        else:  # every row of a decoding step lies past the prompt; asking the device would wait for it
            self._first[layer] = 0 if starts else NEVER

    def _plan(self, index: int, context: LayerContext) -> Plan | None:
        """A method's plan of a layer, on the rows it acts on."""
        plan = self.compiled.attention[index].plan(context)
        if plan is None:
            return None
        return replace(plan, active_from=torch.where(self._acting[index], plan.active_from, NEVER))

    def context(self, index: int, layer: int, query: Tensor, reads_hidden: bool = True) -> LayerContext:
        """One layer as the method (or observer) of that place sees it."""
        hidden = self._hidden.get(layer) if reads_hidden else None
        past = self.past + len(self.q_pos) - query.shape[2]
        memory = self._memory.setdefault((index, layer), {})
        notes = self.notes.setdefault(index, {})
        facts = self.compiled.facts
        return LayerContext(layer, self.layout, query.shape[1], hidden, past, memory, notes, facts, self.seen, self.ids)


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


def _aligned(plans: list[Plan]) -> tuple[Plan, ...]:
    """Plans whose tables over keys have one length, each filled up as its keys past the end count."""
    if len({plan.groups.shape[1] for plan in plans}) < 2:
        return tuple(plans)
    length = max(plan.groups.shape[1] for plan in plans)
    return tuple(_lengthened(plan, length) for plan in plans)


def _lengthened(plan: Plan, length: int) -> Plan:
    """A plan whose tables have `length` keys, filled up as keys past their end count."""
    if plan.groups.shape[1] == length:
        return plan
    return replace(
        plan,
        groups=pad(plan.groups, (0, length - plan.groups.shape[1])),
        key_slope=_filled(plan.key_slope, length, 1),
        key_weight=_filled(plan.key_weight, length, 0),
    )


def _filled(table: Tensor | None, length: int, fill: int) -> Tensor | None:
    return None if table is None else pad(table, (0, length - table.shape[-1]), value=fill)


def _stacked(upper: dict[Any, dict[str, Tensor]], lower: dict[Any, dict[str, Tensor]]) -> dict[Any, dict[str, Tensor]]:
    """Notes of both sets of rows; rows a method took no notes on repeat the other set's, where it does not act."""
    out: dict[Any, dict[str, Tensor]] = {}
    for key in (*upper, *(k for k in lower if k not in upper)):
        one, two = upper.get(key) or lower.get(key, {}), lower.get(key) or upper.get(key, {})
        out[key] = {name: torch.cat([one[name], two[name]]) for name in one if name in two}
    return out
