"""Statistics of attention while a model generates, at every predicting token, without changing any."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlmfix.decoders.var import VAR, sink_score
from vlmfix.diagnostics.measures import Dominance, sink_ratio, text_dominance
from vlmfix.errors import UsageError, nearest
from vlmfix.hf.attend import Look
from vlmfix.layout import Layout
from vlmfix.method import LayerContext, ModelFacts
from vlmfix.plan import Plan

GENERATED, TEXT, FIRST, VISUAL, SINK = range(5)
WHAT = ("visual_mass", "text_mass", "sink_share", "vhd", "lse", "map")
"""What can be recorded: `sink_share` needs the residual stream of the prompt, `vhd` a second look at each row, `map`
keeps the row itself (mean over heads)."""


class Recording:
    """What `vlmfix.record` yields: one `Run` per generation, the last one's statistics as attributes.

    Args:
        model: the model that is watched.
        what: names among `WHAT`.
        layers: decoder layers; all by default.
        sink_dims: hidden dimensions whose massive activation makes a sink; measured by default.
        tau: a token is a sink where such a dimension exceeds tau root mean squares; scaled from 20 at width 4096 by
            default.

    Raises:
        UsageError: a name that is not in `WHAT`.
    """

    def __init__(
        self,
        model: Any,
        what: Sequence[str],
        layers: Sequence[int] | None = None,
        sink_dims: tuple[int, ...] | None = None,
        tau: float | None = None,
    ) -> None:
        for name in what:
            if name not in WHAT:
                raise UsageError(f"record(what=...): nothing is called {name!r}{nearest(name, WHAT)}")
        self.model = model
        self.what = tuple(what)
        self._wanted = None if layers is None else frozenset(layers)
        self.runs: list[Run] = []
        self._sinks = VAR(sink_dims=sink_dims, tau=tau)

    def open(self, model: Any, facts: ModelFacts) -> Run | None:
        """A new run, for the watched model."""
        if model is not self.model:
            return None
        sinks = self._sinks.resolve(facts) if "sink_share" in self.what else None
        self.runs.append(Run(self.what, self._wanted, sinks if isinstance(sinks, VAR) else None))
        return self.runs[-1]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Run, name):
            raise AttributeError(name)
        if not self.runs:
            raise UsageError(f"nothing was generated inside record(...), so there is no {name}")
        return getattr(self.runs[-1], name)


@dataclass(eq=False)
class Run:
    """Statistics of one generation: S predicting tokens, B rows, L recorded layers, H heads.

    Rows are those of the forward: under beam search the search moves between them, see `follow`. Statistics are those
    of the softmax as a recipe's slopes and biases left it; factors that a recipe applies to it afterwards are not in
    them. Rows without pictures, and layers with fewer heads than H, hold nan.
    """

    what: tuple[str, ...]
    wanted: frozenset[int] | None = None
    sinks: VAR | None = None
    layout: Layout | None = None
    _steps: list[dict[int, dict[str, Tensor]]] = field(default_factory=list, repr=False)
    _sinks_of: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def reads_hidden(self) -> bool:
        """For sinks."""
        return self.sinks is not None

    def read(self, layer: int, layout: Layout, hidden: Tensor, past: int) -> None:
        """Finds the sinks among the prompt's tokens of one forward."""
        if self.sinks is None or (self.wanted is not None and layer not in self.wanted):
            return
        assert self.sinks.sink_dims is not None
        assert self.sinks.tau is not None
        part = slice(past, min(past + hidden.shape[1], layout.length))
        sinks = self._sinks_of.setdefault(layer, torch.zeros_like(layout.visual))
        score = sink_score(hidden[:, : part.stop - part.start], self.sinks.sink_dims)
        sinks[:, part] = score > self.sinks.tau

    def watch(self, context: LayerContext, look: Look, plans: Sequence[Plan], at: int, rows: int) -> None:
        """Measures one query of one layer."""
        layer = context.layer
        if self.wanted is not None and layer not in self.wanted:
            return
        if not self._steps or layer in self._steps[-1]:
            self._steps.append({})
        self.layout = context.layout.take(torch.arange(rows, device=context.layout.kinds.device))
        found: dict[str, Tensor] = {}
        groups = self._groups(context)
        start = torch.zeros_like(context.layout.last)
        masses = Plan(groups, 5, start, statistics=frozenset({"mass", "lse"}), sink=found.__setitem__)
        out = look.attend(at, (*plans, masses))
        if "vhd" in self.what:
            closed = torch.tensor([0.0, 0.0, 0.0, -math.inf, -math.inf], device=groups.device)[None, None]
            without = look.attend(at, (*plans, Plan(groups, 5, start, bias=closed)))
            found["vhd"] = (out.float() - without.float()).norm(dim=-1)
        if "map" in self.what:
            row = look.rows(torch.tensor([at], device=groups.device), plans)[:, :, 0].mean(1)
            table = row.new_zeros(len(row), context.layout.length)
            known = look.k_pos < context.layout.length
            table[:, look.k_pos[known]] = row[:, known]
            found["map"] = table
        kept = {name: t[:rows].detach().squeeze(2) if name != "map" else t[:rows] for name, t in found.items()}
        self._steps[-1][layer] = kept

    def follow(self, beams: Tensor) -> Run:
        """The statistics of the sequences that a beam search returned.

        Args:
            beams: [N, S'] `beam_indices` of transformers' result: for each sequence and token the row it came from, -1
                past its end.

        Returns:
            A run with N rows and S' steps; nan past the end of a sequence.
        """
        assert self.layout is not None
        rows, first = self.layout.rows, beams[:, 0].clamp(min=0).cpu()
        out = Run(self.what, self.wanted, self.sinks, self.layout.take(first.to(self.layout.kinds.device)))
        for step, index in zip(self._steps, beams.cpu().unbind(1), strict=False):
            gone, taken = index < 0, index.clamp(min=0)
            out._steps.append({})
            for layer, found in step.items():
                moved = {name: _repeated(t, rows)[taken.to(t.device)] for name, t in found.items()}
                out._steps[-1][layer] = {name: _lost(t, gone.to(t.device)) for name, t in moved.items()}
        return out

    @property
    def layers(self) -> tuple[int, ...]:
        """The recorded layers, L of them."""
        return tuple(sorted(self._steps[0])) if self._steps else ()

    @property
    def visual_mass(self) -> Tensor:
        """[S, B, L, H] share of attention that falls on pictures."""
        return self._seen(self._mass[..., VISUAL] + self._mass[..., SINK])

    @property
    def text_mass(self) -> Tensor:
        """[S, B, L, H] share that falls on the prompt's text, its first token left out."""
        return self._mass[..., TEXT]

    @property
    def first_mass(self) -> Tensor:
        """[S, B, L, H] share that falls on the first token."""
        return self._mass[..., FIRST]

    @property
    def sink_share(self) -> Tensor:
        """[S, B, L, H] share of the visual mass that falls on visual sinks; 0 in layers without any."""
        self._need("sink_share")
        mass, counts = self._mass, self._counts(VISUAL)
        return self._seen(sink_ratio(mass[..., SINK], mass[..., VISUAL] + mass[..., SINK], counts))

    @property
    def vhd(self) -> Tensor:
        """[S, B, L, H] local divergence: how far a head's output moves when its layer does not see the pictures.

        The direct effect in one layer, not the divergence of the paper (see `vision_divergence`), which also removes
        what other tokens took from the pictures.
        """
        self._need("vhd")
        return self._seen(self._stacked("vhd"))

    @property
    def lse(self) -> Tensor:
        """[S, B, L, H] log-sum-exp of the scores."""
        return self._stacked("lse")

    @property
    def map(self) -> Tensor:
        """[S, B, L, K] attention to each prompt token, mean over heads; take the columns of `layout.visual`."""
        self._need("map")
        return self._stacked("map")

    def dominance(self, exclude_first: bool = True) -> Dominance:
        """MDI and AEI [B, L], means over predicting tokens and heads.

        Args:
            exclude_first: leave the first token, a sink, out of the text.
        """
        text = self.text_mass if exclude_first else self.text_mass + self.first_mass
        n_text = self._counts(TEXT)[:, :, 0] + (0 if exclude_first else 1)
        on_text, on_pictures = text.nanmean((0, 3)), self.visual_mass.nanmean((0, 3))
        return text_dominance(on_text, on_pictures, n_text, self._counts(VISUAL)[:, :, 0])

    def save(self, path: str | Path, **about: str) -> None:
        """Writes the raw arrays as safetensors, with the layers, the spans and what the caller says about them."""
        if self.layout is None:
            raise UsageError("nothing was generated inside record(...), so there is nothing to save")
        arrays = {name: getattr(self, name) for name in (*self.what, "text_mass", "first_mass")}
        arrays |= {"kinds": self.layout.kinds, "images": self.layout.images}
        notes = {"layers": json.dumps(self.layers), **about}
        save_file({name: t.contiguous().cpu() for name, t in arrays.items()}, str(path), metadata=notes)

    @property
    def _mass(self) -> Tensor:
        return self._stacked("mass")

    def _stacked(self, name: str) -> Tensor:
        """[S, B, L, H, ...]; layers of fewer heads are filled up with nan."""
        if not self._steps:
            raise UsageError("nothing was generated inside record(...), or no layer was asked for")
        assert self.layout is not None
        rows, heads = self.layout.rows, max(found[name].shape[1] for found in self._steps[0].values())

        def filled(t: Tensor) -> Tensor:
            t = _repeated(t, rows)
            if t.shape[1] == heads:
                return t
            return torch.cat([t, t.new_full((rows, heads - t.shape[1], *t.shape[2:]), math.nan)], 1)

        return torch.stack(
            [torch.stack([filled(step[layer][name]) for layer in self.layers], 1) for step in self._steps]
        )

    def _seen(self, values: Tensor) -> Tensor:
        """Nan in rows without pictures."""
        assert self.layout is not None
        return values.masked_fill((self.layout.n_visual == 0)[None, :, None, None].to(values.device), math.nan)

    def _counts(self, group: int) -> Tensor:
        """[B, 1, 1] number of visual tokens, or of the prompt's text tokens without the first."""
        assert self.layout is not None
        n = self.layout.n_visual if group == VISUAL else self.layout.valid.sum(1) - self.layout.n_visual - 1
        return n[:, None, None]

    def _need(self, name: str) -> None:
        if name not in self.what:
            raise UsageError(f"{name} was not recorded; ask for it: record(..., what=[{name!r}, ...])")

    def _groups(self, context: LayerContext) -> Tensor:
        """[B, K] what each prompt token is, sinks layer by layer."""
        layout, memory = context.layout, context.memory
        if "groups" not in memory:
            first = layout.valid & (layout.valid.cumsum(1) == 1)
            groups = torch.where(layout.valid, TEXT, GENERATED)
            groups = torch.where(first, FIRST, groups)
            groups = torch.where(layout.visual, VISUAL, groups)
            if context.layer in self._sinks_of:
                groups = torch.where(layout.visual & self._sinks_of.pop(context.layer), SINK, groups)
            memory["groups"] = groups.to(torch.uint8)
        return memory["groups"]


def _repeated(t: Tensor, rows: int) -> Tensor:
    """A prefill's rows as often as generate repeated them for beams or return sequences."""
    return t if len(t) == rows else t.repeat_interleave(rows // len(t), 0)


def _lost(t: Tensor, gone: Tensor) -> Tensor:
    """Nan in some rows."""
    return t.masked_fill(gone.view(-1, *[1] * (t.dim() - 1)), math.nan)
