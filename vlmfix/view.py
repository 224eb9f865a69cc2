"""What a view is: a rule that makes a branch's prompt from the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmfix.layout import Layout


@dataclass(frozen=True)
class RowText:
    """The text side of one row.

    Args:
        ids: token ids without padding.
        kinds: `Kind` of each.
        structure: True where a token frames a picture.
    """

    ids: Sequence[int]
    kinds: Sequence[int]
    structure: Sequence[bool]


@dataclass(frozen=True)
class Picture:
    """Where a picture stands.

    Args:
        row: of the batch.
        index: within its row.
        before: ids of the text before the row's first picture.
        behind: ids of the text behind its last picture.
    """

    row: int
    index: int
    before: tuple[int, ...]
    behind: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """Base of all views: the caller's prompt unchanged.

    A view changes the text by an edit list and the pictures by arithmetic on normalised pixels.
    """

    def keeps_pictures(self) -> bool:
        """Whether the branch has pictures at all."""
        return True

    def text(self, row: RowText) -> list[int | tuple[int]]:
        """The branch's row: an integer copies that position of the original row, a 1-tuple inserts that token id."""
        return list(range(len(row.ids)))

    def pixels(self, pixels: Tensor, picture: int) -> Tensor:
        """One picture's normalised pixels, changed.

        Args:
            pixels: [frames, channels, ...] one picture (all its tiles), or one picture's patches [patches, channels,
                frames, area].
            picture: index of the picture within its row.
        """
        return pixels

    def picture(self, pixels: Tensor, place: Picture) -> Tensor:
        """One picture as a whole, changed; an alternative to `pixels` that families with tiles refuse.

        Args:
            pixels: [channels, height, width] normalised, put together from patches where the family cuts it up.
            place: where it stands.
        """
        return pixels

    def describe(self, layout: Layout) -> str:
        """One line for the run report."""
        return type(self).__name__
