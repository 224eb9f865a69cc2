"""What a method is: a frozen dataclass of hyper-parameters that answers a few small questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor

from vlmfix.errors import Refusal, UsageError
from vlmfix.layout import Layout
from vlmfix.plan import Plan
from vlmfix.shown import Glance as Glance
from vlmfix.shown import LayerContext as LayerContext
from vlmfix.shown import ModelFacts as ModelFacts
from vlmfix.shown import Rendering as Rendering
from vlmfix.shown import Step as Step
from vlmfix.view import View

LayerSpec = tuple[float, ...]
"""Two fractions of depth (from, to), or exact layer indices as integers."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. Subclasses are frozen dataclasses; every field is a hyper-parameter with a default."""

    kind: ClassVar[str] = ""
    replayable: ClassVar[bool | None] = None
    """Whether a decoding step is the same tensor operations every time, so that it can be captured once and replayed.

    Methods of vlmfix are unless they say otherwise; others are not until they say so, since a replay repeats none of
    their Python.
    """

    @property
    def replays(self) -> bool:
        """Whether a decoding step with it can be captured and replayed."""
        own = type(self).__module__.split(".")[0] == "vlmfix"
        return own if self.replayable is None else self.replayable

    def neutral(self) -> bool:
        """Whether these settings change nothing, so that the method is dropped when the recipe is compiled."""
        return False

    def resolve(self, facts: ModelFacts) -> Method:
        """These settings with everything that depends on the model filled in.

        Raises:
            Refusal: the model lacks something the method needs.
        """
        return self

    def settings(self) -> dict[str, Any]:
        """Hyper-parameters by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Greedy(Method):
    """Plain decoding: no method at all, the reference of every comparison."""

    kind: ClassVar[str] = "plain"

    def neutral(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class AttentionMethod(Method):
    """A method that asks for plans.

    Args:
        on: rows it acts on: "visible", "all" (branch rows too), or "branches".
    """

    kind: ClassVar[str] = "attention"
    reads_hidden: ClassVar[bool] = False
    needs_picture: ClassVar[bool] = True
    scales_scores: ClassVar[bool] = False
    prefix_plain: ClassVar[bool] = False
    """Whether the prompt up to its last picture runs as in the plain model and is not looked at."""
    by_distance: ClassVar[bool] = False
    """Whether it acts on keys by their distance from the query."""
    follows_rows: ClassVar[bool] = False
    """Whether it takes notes on generated tokens, which must move with beams."""
    replans_here: ClassVar[bool] = False
    """Whether what it sees of a layer changes the plans of that layer alone."""
    plans_alike: ClassVar[bool] = False
    """Whether what it plans for one layer holds for all it acts on."""
    watches_steps: ClassVar[bool] = True
    """Whether it looks at the attention of generated tokens; false where it has seen enough in the prompt."""
    vision_layers: ClassVar[tuple[int, ...]] = ()
    """Layers of the vision tower (negative from the end) whose class-token attention it reads."""

    on: Literal["visible", "all", "branches"] = field(default="visible", kw_only=True)

    def resolve(self, facts: ModelFacts) -> Method:
        """Refuses models whose attention makes the method meaningless."""
        if self.on not in ("visible", "all", "branches"):
            raise UsageError(f"on={self.on!r}: give 'visible', 'all' or 'branches'")
        if self.scales_scores and facts.softcap:
            raise Refusal(
                f"{type(self).__name__.lower()} changes attention scores, which {facts.family} soft-caps; the "
                "method has no meaning there"
            )
        return self

    def acts_on(self, depth: int) -> tuple[int, ...]:
        """Layers the method acts on, out of `depth`."""
        raise NotImplementedError

    def plan(self, context: LayerContext) -> Plan | None:
        """What the method asks of one layer; None to leave it alone."""
        raise NotImplementedError

    def without_pictures(self) -> View | None:
        """How a prompt reads without pictures, where a head rule compares the two; None without head rules."""
        return None

    def splits_prefill(self, depth: int) -> bool:
        """Whether the last prompt token must run by itself, once all layers have read the tokens before it."""
        return False

    @property
    def scales_text(self) -> bool:
        """Whether head scales hold for the prompt without pictures as well, while it runs."""
        return True

    def watches(self, depth: int) -> tuple[int, ...]:
        """Layers whose attention the method looks at; before the plans of the same layer are asked for."""
        return ()

    def watch(self, glance: Glance, notes: dict[str, Tensor]) -> bool:
        """Looks at a layer's attention in one forward.

        Args:
            glance: the attention.
            notes: the method's notes on the whole generation; tensors with B rows follow beams. `LayerContext.notes`
                shows them to `plan`.

        Returns:
            Whether plans made before must be made anew.
        """
        return False


class Search(Protocol):
    """The rules of a beam search that looks at the attention of its candidates and may go back.

    B beams of one sample, N candidates for each, t tokens so far; `sums` of a token grow with every row behind it.
    """

    @property
    def candidates(self) -> int:
        """N, tried after every beam."""
        ...

    @property
    def num_beams(self) -> int:
        """B where the caller says nothing."""
        ...

    @property
    def returns(self) -> int:
        """How often the search may go back to one length."""
        ...

    @property
    def history_follows_beams(self) -> bool:
        """Whether places noted for a beam follow it when beams are reordered."""
        ...

    def extend(self, sums: Tensor, weights: Tensor) -> Tensor:
        """Sums [..., t + 1] after one more row, from sums [..., t] and the row's weights [..., t + 1]."""
        ...

    def judge(self, sums: Tensor, visual: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """What is taken from candidates' logits [B, N], and the place each beam leans on.

        Args:
            sums: [B, N, t + 1].
            visual: [B, N] share of the candidate's attention that goes to pictures.
        """
        ...

    def fill(self, logits: Tensor) -> Tensor:
        """[B, V] what tokens that are no candidates count for, from raw logits [B, V]."""
        ...

    def back(self, history: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Lengths to go back to, the preferred one first; none to go on.

        Args:
            history: per step, the place each beam leans on.
        """
        ...


@dataclass(frozen=True)
class DecodingMethod(Method):
    """A method that rewrites the logits of each step, usually against branches."""

    kind: ClassVar[str] = "decoding"
    needs_picture: ClassVar[bool] = True
    same_uncached: ClassVar[bool] = True
    """Whether decoding without a cache gives the same; false where a step changes what older rows would see."""
    beams: ClassVar[bool] = True

    def branches(self) -> tuple[View, ...]:
        """One view per branch; none when the weight is zero for the whole run."""
        return ()

    def reads(self) -> tuple[Any, View] | None:
        """A text-only language model that reads along and speaks as the first branch, and what of the prompt it reads.

        None without one.
        """
        return None

    def late(self) -> bool:
        """Whether its one branch is the visible prompt with other pictures or wiped embeddings, after its prefill."""
        return False

    def probes(self) -> tuple[View, ...]:
        """Views whose rows run beside the visible rows' prefill and are dropped after it; for late methods."""
        return ()

    def wiped(self, notes: dict[str, Tensor], layout: Layout, visible: int) -> Tensor | None:
        """Positions whose embeddings a late branch sees as `blank` everywhere.

        Args:
            notes: what the method's own attention methods noted in the prefill; rows are visible rows, then probes.
            layout: of these rows.
            visible: number of visible rows.

        Returns:
            [visible, K] bool, or None for none.
        """
        return None

    def redrawn(self, notes: dict[str, Tensor], layout: Layout, visible: int) -> View:
        """How a late branch sees the pictures; arguments as in `wiped`. Its text must stay as it is."""
        return View()

    def blank(self) -> float:
        """What every entry of a wiped embedding becomes."""
        return 0.0

    def taps(self, depth: int) -> tuple[int, ...]:
        """Layers whose entering residual stream the method reads at the last position of every step."""
        return ()

    def saliency_layers(self, depth: int) -> tuple[int, ...]:
        """Target layers of the saliency the method asks for; gradients run from the logits to the lowest."""
        return ()

    def attention(self) -> tuple[AttentionMethod, ...]:
        """Attention methods that belong to it, on its branches for instance."""
        return ()

    def search(self) -> Search | None:
        """The rules of a beam search of its own; None to rewrite logits within transformers' loops.

        Its first attention method notes "rows": [B, Q, K] float32 attention of the queries of every step.
        """
        return None

    def scores(self, logits: Tensor, step: Step) -> Tensor:
        """Scores of the next token.

        Args:
            logits: [B, V] float32 raw logits of the visible rows.
            step: number, branches and early logits.

        Returns:
            [B, V] float32, -inf where a token is ruled out.
        """
        raise NotImplementedError


class Looker(Protocol):
    """Lets the plain model answer and reports where it looked."""

    def __call__(
        self, pictures: Sequence[Sequence[Any]], questions: Sequence[str], layers: Sequence[int], new_tokens: int
    ) -> list[list[Tensor]]:
        """Per item and picture [S, L, rows, columns]: attention of each predicting token, mean over heads."""
        ...


@dataclass(frozen=True)
class PictureMethod(Method):
    """A method that redraws pictures before anything else sees them; it acts where pictures are, in `answer`."""

    kind: ClassVar[str] = "view"

    def redraw(
        self, pictures: Sequence[Sequence[Any]], questions: Sequence[str], look: Looker, depth: int
    ) -> list[list[Any]]:
        """Other pictures for the same questions.

        Args:
            pictures: per item its pictures (PIL, RGB), at least one.
            questions: per item its question.
            look: where the plain model looks under a question.
            depth: L, the model's layers.

        Returns:
            Per item its pictures.
        """
        raise NotImplementedError


class Asker(Protocol):
    """Lets the rest of the recipe answer about other pictures, under the caller's own settings."""

    def __call__(
        self, items: Sequence[int], pictures: Sequence[Sequence[Any]], questions: Sequence[str], view: str
    ) -> list[str]:
        """Texts of the answers.

        Args:
            items: which of the items are asked, as indices; their tokens and seconds count for these.
            pictures: per asked item its pictures.
            questions: per asked item its question.
            view: a name of these pictures; seeded draws depend on it.
        """
        ...


@dataclass(frozen=True)
class Settled:
    """What became of one answer.

    Args:
        text: the final answer.
        notes: for the report; `inactive` says why the answer was left as it is.
    """

    text: str
    notes: dict[str, Any]


@dataclass(frozen=True)
class AnswerMethod(Method):
    """A method that settles whole answers, with more answers of the otherwise same recipe; it acts in `answer`."""

    kind: ClassVar[str] = "answer"

    def settle(
        self, texts: Sequence[str], pictures: Sequence[Sequence[Any]], questions: Sequence[str], ask: Asker
    ) -> list[Settled]:
        """Final answers.

        Args:
            texts: per item the answer of the rest of the recipe.
            pictures: per item its pictures (PIL, RGB), at least one.
            questions: per item its question.
            ask: the rest of the recipe.

        Returns:
            One for each item.
        """
        raise NotImplementedError


def resolve_layers(spec: LayerSpec, depth: int) -> tuple[int, ...]:
    """Layer indices of a specification.

    Args:
        spec: two fractions of depth, `from <= l / depth < to`, or exact indices as integers (negative from the end).
        depth: L.

    Raises:
        UsageError: an index outside the model, or fractions that select nothing.
    """
    if not isinstance(spec, tuple | list) or not all(isinstance(x, int | float) for x in spec):
        raise UsageError(f"layers={spec!r}: give two fractions of depth, (0.25, 0.75), or exact layer indices, (3, 4)")
    if spec and all(isinstance(x, int) for x in spec):
        layers = tuple(sorted({int(x) + depth if x < 0 else int(x) for x in spec}))
        bad = [x for x in layers if not 0 <= x < depth]
        if bad:
            raise UsageError(f"layers={spec}: {bad} outside the model's layers 0..{depth - 1}")
        return layers
    if len(spec) != 2 or not 0 <= spec[0] < spec[1] <= 1:
        raise UsageError(f"layers={spec}: give two fractions of depth with 0 <= from < to <= 1, or exact layer indices")
    first, last = (math.floor(x * depth + 0.5) for x in spec)
    layers = tuple(range(first, max(last, first + 1)))
    return tuple(x for x in layers if x < depth)


def check_range(method: Method, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Raises UsageError unless the hyper-parameter lies in [low, high] (or (low, high])."""
    value = getattr(method, name)
    ok = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and low <= value <= high
        and not (open_low and value == low)
    )
    if not ok:
        raise UsageError(f"{type(method).__name__.lower()}({name}={value!r}): give a number from {low} to {high}")
