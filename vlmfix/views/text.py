"""Views that change the text of a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from vlmfix.layout import Kind
from vlmfix.view import RowText, View


@dataclass(frozen=True)
class WithoutPictures(View):
    """The same text with every picture removed: visual tokens and the tokens that frame them are deleted.

    Positions close up.
    """

    def keeps_pictures(self) -> bool:
        """No."""
        return False

    def text(self, row: RowText) -> list[int | tuple[int]]:
        """All text positions."""
        triples = enumerate(zip(row.kinds, row.structure, strict=True))
        return [i for i, (kind, frame) in triples if kind != Kind.VISUAL and not frame]


@dataclass(frozen=True)
class Inserted(View):
    """The same pictures with other text.

    Args:
        ids: tokens that come in.
        place: "first" after the first token (which may open the sequence), "system" instead of the text before the
        first
            picture, "last" behind the last picture; rows without a picture take them first.
    """

    ids: tuple[int, ...]
    place: str = "first"

    def text(self, row: RowText) -> list[int | tuple[int]]:
        """The edited row."""
        new: list[int | tuple[int]] = [(token,) for token in self.ids]
        old = list(range(len(row.ids)))
        visual = [i for i in old if row.kinds[i] == Kind.VISUAL]
        if not visual or self.place == "first":
            return [*old[:1], *new, *old[1:]]
        if self.place == "last":
            end = visual[-1] + 1
            while end < len(old) and row.structure[end]:
                end += 1
            return [*old[:end], *new, *old[end:]]
        start = visual[0]
        while start > 1 and row.structure[start - 1]:
            start -= 1
        return [*old[:1], *new, *old[start:]]


@dataclass(frozen=True)
class Asked(View):
    """The same pictures and what stands before them, with other text behind the last one.

    Args:
        ids: all tokens behind the last picture; rows without a picture stay as they are.
    """

    ids: tuple[int, ...]

    def text(self, row: RowText) -> list[int | tuple[int]]:
        """The row up to its last visual token, then the ids."""
        visual = [i for i, kind in enumerate(row.kinds) if kind == Kind.VISUAL]
        if not visual:
            return super().text(row)
        return [*range(visual[-1] + 1), *((token,) for token in self.ids)]
