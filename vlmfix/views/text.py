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
