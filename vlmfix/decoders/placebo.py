"""Placebos: a method with everything but its own choice, to tell what the choice is worth.

A placebo is the method's class with one answer replaced, so that every other duty stays the method's own:

- `text-keys`: it takes text keys drawn at random for the visual ones;
- `heads`: what it does to a head happens to another head, drawn at random;
- `other-picture`: its contrast branch is the same prompt with the picture of another item, undisturbed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import interpolate

from vlmfix import registry
from vlmfix.errors import Refusal, UsageError, nearest
from vlmfix.layout import Kind, Layout
from vlmfix.method import AttentionMethod, DecodingMethod, Glance, LayerContext, Method, ModelFacts
from vlmfix.plan import Plan
from vlmfix.view import Picture, View

if TYPE_CHECKING:  # a mixin stands before a class of this kind
    from vlmfix.method import AttentionMethod as _Attention
    from vlmfix.method import DecodingMethod as _Decoding
else:
    _Attention = _Decoding = object

_SHOWN: ContextVar[Sequence[Image]] = ContextVar("vlmfix_placebo_pictures", default=())


def placebo(method: Method, kind: str, seed: int = 0) -> Method | None:
    """A method that makes its choice at random; None where such a choice does not concern this kind of method.

    Args:
        method: the method.
        kind: `text-keys`, `heads` or `other-picture`.
        seed: of the choice.

    Raises:
        UsageError: for an unknown kind.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown placebo {kind!r}{nearest(kind, KINDS)}")
    mixin, base = KINDS[kind]
    if not isinstance(method, base):
        return None
    own: Any = type(method)
    made: Method = _class(mixin, own, kind, seed)(**{f.name: getattr(method, f.name) for f in fields(method)})
    return made


@cache
def _class(mixin: type, method: type[Method], kind: str, seed: int) -> type[Method]:
    row = next((row for row in registry.ROWS if row.class_name == method.__name__), None)
    name = row.name if row else method.__name__
    extra = {"seed_of_placebo": seed, "recipe_name": f"{name}[{kind}, seed {seed}]"}
    return type(f"{method.__name__}Placebo", (mixin, method), extra)


class TextKeys(_Attention):
    """Mixin: text keys drawn by seed and row stand in for the visual keys."""

    seed_of_placebo: int

    def resolve(self, facts: ModelFacts) -> Method:
        """As the method.

        Raises:
            Refusal: the method does not choose visual keys.
        """
        if not self.needs_picture or self.without_pictures() is not None:
            raise Refusal(f"{_name(self)}: the method does not choose visual keys, so that text keys are no placebo")
        return super().resolve(facts)

    def plan(self, context: LayerContext) -> Plan | None:
        """The method's plan for the drawn keys."""
        return super().plan(_elsewhere(context, self.seed_of_placebo))

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """What the method notes, with its eyes on the drawn keys."""
        context = _elsewhere(glance.context, self.seed_of_placebo)
        return super().watch(replace(glance, context=context), notes)


class Heads(_Attention):
    """Mixin: a layer's heads exchange what is done to them, by a permutation drawn by seed and layer."""

    seed_of_placebo: int

    def plan(self, context: LayerContext) -> Plan | None:
        """The method's plan with heads permuted.

        Raises:
            Refusal: the method treats all heads alike.
        """
        plan = super().plan(context)
        if plan is None:
            return None
        tables = {
            name: table
            for name in ("slope_pos", "slope_neg", "bias", "key_slope", "head_scale")
            if (table := getattr(plan, name)) is not None and table.shape[1] > 1
        }
        if not tables and plan.rule is None and plan.head_rule is None:
            raise Refusal(f"{_name(self)}: the method treats all heads alike, so that other heads are no placebo")
        generator = torch.Generator().manual_seed(self.seed_of_placebo * 1_000_003 + context.layer)
        order = torch.randperm(context.heads, generator=generator).to(plan.groups.device)
        changed: dict[str, Any] = {name: table[:, order] for name, table in tables.items()}
        for name in ("rule", "head_rule"):
            if (rule := getattr(plan, name)) is not None:
                changed[name] = Exchanged(rule, order)
        return replace(plan, **changed)


@dataclass(frozen=True)
class Exchanged:
    """A rule whose result is dealt to other heads.

    Args:
        rule: a factor rule or a head rule; heads are the second axis of its result.
        order: [H] head h gets what the rule says of head order[h].
    """

    rule: Callable[..., Tensor]
    order: Tensor

    def __call__(self, *values: Tensor) -> Tensor:
        """The rule's result, heads permuted."""
        return self.rule(*values)[:, self.order]


class OtherPicture(_Decoding):
    """Mixin: every branch is the visible prompt with the picture of another item (see `showing`)."""

    seed_of_placebo: int
    _colours: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,) * 3, (1.0,) * 3)

    def resolve(self, facts: ModelFacts) -> Method:
        """As the method.

        Raises:
            Refusal: the method contrasts with no branch, or there is no processor.
        """
        if not self._count() or facts.rendering is None:
            lacks = "no branch that could see another item's picture" if facts.rendering else "no processor"
            raise Refusal(f"{_name(self)}: the method has {lacks}")
        ready = super().resolve(facts)
        object.__setattr__(ready, "_colours", facts.rendering.colours())
        return ready

    def branches(self) -> tuple[View, ...]:
        """As many as the method's, all of them the prompt with another picture."""
        return tuple(Others(*self._colours) for _ in range(self._count()))

    def _count(self) -> int:
        return len(super().branches()) or int(super().late())

    def attention(self) -> tuple[AttentionMethod, ...]:
        """None: the branch sees all of the other picture."""
        return ()

    def late(self) -> bool:
        """No: the other picture is known from the start."""
        return False

    def probes(self) -> tuple[View, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class Others(View):
    """The same text with the pictures of `showing`, scaled to the size of the row's own pictures.

    Args:
        mean: per channel, of pixels in [0, 1].
        deviation: per channel.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def picture(self, pixels: Tensor, place: Picture) -> Tensor:
        """The other picture, normalised."""
        shown = _SHOWN.get()
        if place.row >= len(shown):
            raise Refusal("the placebo other-picture runs only where a table is made, since it needs the other items")
        array = np.asarray(shown[place.row].convert("RGB"), dtype=np.float32)
        other = torch.from_numpy(array.copy()).permute(2, 0, 1).to(pixels.device)[None] / 255
        scaled = interpolate(other, pixels.shape[-2:], mode="bilinear", antialias=True, align_corners=False)[0]
        mean, deviation = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (self.mean, self.deviation))
        return ((scaled - mean) / deviation).to(pixels.dtype)


def _elsewhere(context: LayerContext, seed: int) -> LayerContext:
    """The layer with its visual keys exchanged for text keys."""
    moved = Moved.from_layout(context.layout, seed)
    seen = {layer: moved.values(table) for layer, table in context.seen.items()}
    return replace(context, layout=moved, seen=seen)


@dataclass(frozen=True)
class Moved(Layout):
    """A layout whose visual keys are text keys; what stands before and after the pictures stays as it is.

    Args:
        source: [B, K] for a drawn key, the visual key whose place it takes; -1 elsewhere.
        end: [B] the true layout's `after_visual`.
    """

    source: Tensor = field(kw_only=True)
    end: Tensor = field(kw_only=True)

    @staticmethod
    def from_layout(layout: Layout, seed: int) -> Moved:
        """Draws, by the seed and the number of text keys alone, as many text keys as a row has visual ones, or all.

        The first and the last key of a prompt are not drawn: they are the usual sink and the row that answers.
        """
        kinds, images = layout.kinds.cpu(), layout.images.cpu()
        source = torch.full(kinds.shape, -1, dtype=torch.long)
        for row in range(len(kinds)):
            visual = (kinds[row] == Kind.VISUAL).nonzero()[:, 0]
            text = ((kinds[row] == Kind.SYSTEM) | (kinds[row] == Kind.QUERY)).nonzero()[1:-1, 0]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(text))
            count = min(len(visual), len(text))
            keys = text[torch.randperm(len(text), generator=generator)[:count]].sort().values
            taken = torch.randperm(len(visual), generator=generator)[:count].sort().values
            source[row, keys] = visual[taken]
        drawn = source >= 0
        text_kind = torch.where(kinds == Kind.VISUAL, int(Kind.SYSTEM), kinds.long())
        new = torch.where(drawn, int(Kind.VISUAL), text_kind).to(kinds.dtype)
        pictures = torch.where(drawn, images.gather(1, source.clamp(min=0)), -1).to(images.dtype)
        device = layout.kinds.device
        moved = (new.to(device), pictures.to(device), layout.mask)
        return Moved(*moved, source=source.to(device), end=layout.after_visual)

    @cached_property
    def after_visual(self) -> Tensor:
        """Of the true layout, so that the same rows are active."""
        return self.end

    def values(self, table: Tensor) -> Tensor:
        """[B, K] values of visual keys at the keys that took their places, nan elsewhere."""
        return torch.where(self.source >= 0, table.gather(1, self.source.clamp(min=0)), torch.nan)


def _name(method: Method) -> str:
    return str(getattr(type(method), "recipe_name", type(method).__name__))


@contextlib.contextmanager
def showing(pictures: Sequence[Image]) -> Iterator[None]:
    """Lets the branches of `OtherPicture` see these pictures, one for each row of the batch that has a picture."""
    token = _SHOWN.set(pictures)
    try:
        yield
    finally:
        _SHOWN.reset(token)


KINDS: Mapping[str, tuple[type, type[Method]]] = {
    "text-keys": (TextKeys, AttentionMethod),
    "heads": (Heads, AttentionMethod),
    "other-picture": (OtherPicture, DecodingMethod),
}
"""Kind -> mixin, and the kind of method that it is for."""
