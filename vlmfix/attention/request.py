"""The state of one generation: what its layers, rows and steps are."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmfix.attention.compiled import Compiled
from vlmfix.hf.branching import REPLACED, Joint, repeat_pictures
from vlmfix.hf.cache import BranchCache, BranchRows, StaticBranchCache
from vlmfix.hf.inputs import TOKEN_KEYS
from vlmfix.hf.parts import Parts
from vlmfix.layout import NEVER, Layout
from vlmfix.method import LayerContext
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
        self.joint = joint
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
        self._repeats = 1
        self.steps = 0
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
        if self.joint is None:
            return kwargs
        entry = kwargs.get("input_ids")
        rows = (entry if entry is not None else kwargs["inputs_embeds"]).shape[0]
        cache = kwargs.get("past_key_values")
        if self.steps == 0:
            return self._first_forward(kwargs, rows)
        if cache is None or cache.get_seq_length() == 0:
            return self._whole_forward(kwargs, rows)
        return self._next_forward(kwargs)

    def after(self, output: Any) -> Any:
        """Contracts logits to the visible rows and lets the decoding method rewrite the last position."""
        self.steps += 1
        logits: Tensor = output.logits
        if self.joint is not None:
            if self.steps == 1 and self._repeats > 1:
                logits = self._spread(output, logits)
            visible = logits.shape[0] // self.copies
            blocks = torch.split(logits, visible)
            self._trim(output, visible)
        else:
            blocks = (logits,)
        method = self.compiled.decoding
        if method is not None:
            last = [block[:, -1].float() for block in blocks]
            scores = method.scores(last[0], tuple(last[1:]), self.steps)
            output["logits"] = torch.cat([blocks[0][:, :-1].float(), scores[:, None]], 1)
        elif self.joint is not None:
            output["logits"] = blocks[0]
        return output

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
        return 0 if self.joint is None else self.joint.length - self.prompt_length

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
        """Keeps the residual stream entering a layer that a method reads, in prefill."""
        if self._prefilling and layer in self._readers:
            self._hidden[layer] = hidden

    def visit(self, layer: int, query: Tensor, key: Tensor) -> tuple[tuple[Plan, ...], int]:
        """Plans of a layer, made at its first visit (and at every prefill chunk.

        For methods that read hidden states).
        """
        if layer not in self._plans or layer in self._hidden:
            self._build(layer, query.shape[1])
        return self._plans[layer], self._first[layer]

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
        """[rows] bool per attention method: visible rows (or all), with a picture where the method needs one."""
        block = torch.arange(self.layout.rows, device=self.layout.kinds.device) < self.visible
        out: dict[int, Tensor] = {}
        for i, method in enumerate(self.compiled.attention):
            acting = torch.ones_like(block) if method.on == "all" else block
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
            memory = self._memory.setdefault((i, layer), {})
            hidden = self._hidden.get(layer) if method.reads_hidden else None
            context = LayerContext(layer, self.layout, heads, hidden, self.past, memory, self.compiled.facts)
            plan = method.plan(context)
            if plan is None:
                continue
            acting = self._acting[i]
            plans.append(replace(plan, active_from=torch.where(acting, plan.active_from, NEVER)))
            self.layers_touched[i].add(layer)
        self._plans[layer] = tuple(plans)
        starts = [t for plan in plans for t in (plan.active_from, *(part.query_from for part in plan.hidden))]
        self._first[layer] = int(torch.stack(starts).min()) if starts else NEVER

    def _repeat(self, repeats: int) -> None:
        rows = torch.arange(self.layout.rows, device=self.layout.kinds.device).repeat_interleave(repeats)
        self.take(rows)

    def _first_forward(self, kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
        assert self.joint is not None
        self._repeats = rows // self.visible
        rest = {
            k: v for k, v in kwargs.items() if k not in REPLACED and k not in TOKEN_KEYS and k not in self.joint.inputs
        }
        self._mask = self.joint.mask
        self._last = self.joint.positions[..., -1:]
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache"):
            rest["past_key_values"] = self.cache()
        return {**rest, **self.joint.inputs}

    def _whole_forward(self, kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
        """Without a cache: the whole joint prompt again, with the tokens generated so far."""
        assert self.joint is not None
        n, ids = rows // self.visible, kwargs["input_ids"]
        new = ids[:, self.prompt_length :].repeat(self.copies, 1)
        inputs = self.joint.inputs
        spread = {
            k: v.repeat_interleave(n, 0)
            for k, v in inputs.items()
            if k in ("input_ids", "attention_mask", *TOKEN_KEYS) and k != "position_ids"
        }
        pictures = {k: v for k, v in inputs.items() if k not in spread and k not in REPLACED}
        pictures = repeat_pictures(self.joint.layout, pictures, n) if n > 1 else pictures
        out = {k: v for k, v in kwargs.items() if k not in REPLACED and k not in TOKEN_KEYS and k not in inputs}
        for key, value in spread.items():
            filler = new if key == "input_ids" else torch.full_like(new, int(key == "attention_mask"))
            out[key] = torch.cat([value, filler.to(value.dtype)], 1)
        base = self.joint.positions.repeat_interleave(n, -2)
        ahead = base[..., -1:] + torch.arange(1, new.shape[1] + 1, device=ids.device)
        return {**out, **pictures, "position_ids": torch.cat([base, ahead], -1)}

    def _next_forward(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        ids: Tensor = kwargs["input_ids"].repeat(self.copies, 1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(ids.shape)], 1)
        ahead = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        positions = self._last + ahead
        self._last = positions[..., -1:]
        out = {k: v for k, v in kwargs.items() if k not in REPLACED}
        for key in TOKEN_KEYS:
            if key in out and isinstance(out[key], Tensor):
                out[key] = out[key][:, -ids.shape[1] :].repeat(self.copies, 1)
        return {**out, "input_ids": ids, "attention_mask": self._mask, "position_ids": positions}

    def _spread(self, output: Any, logits: Tensor) -> Tensor:
        """After a prefill of unrepeated rows: repeats the cache.

        The state and the logits for beams or return sequences.
        """
        n = self._repeats
        cache = output.get("past_key_values")
        if cache is not None:
            cache.repeat(n, logits.shape[0], logits.device)
            self._repeat(n)
            self._mask = self._mask.repeat_interleave(n, 0)
            self._last = self._last.repeat_interleave(n, -2)
        return logits.repeat_interleave(n, 0)

    def _trim(self, output: Any, visible: int) -> None:
        """Cuts hidden states and attentions, where asked for, to the visible rows."""
        joint_rows = self.joint.mask.shape[0] if self.joint is not None else 0
        for key in ("hidden_states", "attentions"):
            values = output.get(key)
            if values:
                n = visible // self.visible if values[0].shape[0] == joint_rows else 1
                keep = visible // n
                output[key] = tuple(v[:keep].repeat_interleave(n, 0) for v in values)


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
