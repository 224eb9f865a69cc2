"""What stands where in a prompt: the one description that every method reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from functools import cached_property

import torch
from torch import Tensor

NEVER = 2**30
"""A position no sequence reaches: `active_from` of a row on which nothing acts."""


class Kind(IntEnum):
    """What one prompt position holds."""

    PAD = 0
    SYSTEM = 1
    VISUAL = 2
    QUERY = 3


class MaskKind(StrEnum):
    """How the prompt's rows see each other in prefill."""

    CAUSAL = "causal"
    WINDOW = "window"
    CHUNK = "chunk"
    PREFIX = "prefix"
    IMAGE_BLOCKS = "image-blocks"


@dataclass(frozen=True)
class Layout:
    """Per-row description of a batch of prompts; generated positions lie beyond K and are text.

    Args:
        kinds: [B, K] uint8, a `Kind` for each position. Text before the first visual token is SYSTEM, text after it
            QUERY; a row without a picture is all QUERY.
        images: [B, K] int16, index within its row of the picture a visual token belongs to, -1 elsewhere.
        mask: how prompt rows see each other.
    """

    kinds: Tensor
    images: Tensor
    mask: MaskKind = MaskKind.CAUSAL

    @staticmethod
    def of(
        visual: Tensor, valid: Tensor | None = None, images: Tensor | None = None, mask: MaskKind = MaskKind.CAUSAL
    ) -> Layout:
        """Builds a layout from masks.

        Args:
            visual: [B, K] bool, visual positions.
            valid: [B, K] bool or 0/1, positions that are not padding; all by default.
            images: [B, K] index of the picture per visual position; contiguous runs by default.
            mask: how prompt rows see each other.
        """
        visual = visual.bool()
        valid = torch.ones_like(visual) if valid is None else valid.bool()
        seen = visual.cumsum(1) > 0
        has = visual.any(1, keepdim=True)
        kinds = torch.where(seen | ~has, int(Kind.QUERY), int(Kind.SYSTEM))
        kinds = torch.where(visual, int(Kind.VISUAL), kinds)
        kinds = torch.where(valid, kinds, int(Kind.PAD)).to(torch.uint8)
        if images is None:
            starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
            images = starts.cumsum(1) - 1
        images = torch.where(visual, images, -1).to(torch.int16)
        return Layout(kinds, images, mask)

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.kinds.shape[0]

    @property
    def length(self) -> int:
        """K, the padded prompt length."""
        return self.kinds.shape[1]

    @cached_property
    def visual(self) -> Tensor:
        """[B, K] bool, visual tokens of all pictures of the row."""
        return self.kinds == Kind.VISUAL

    @cached_property
    def valid(self) -> Tensor:
        """[B, K] bool, positions that are not padding."""
        return self.kinds != Kind.PAD

    @cached_property
    def n_visual(self) -> Tensor:
        """[B] number of visual tokens."""
        return self.visual.sum(1)

    @cached_property
    def n_images(self) -> Tensor:
        """[B] number of pictures."""
        return self.images.amax(1) + 1

    @cached_property
    def after_visual(self) -> Tensor:
        """[B] first position after the last visual token; `NEVER` for a row without a picture."""
        index = torch.arange(self.length, device=self.kinds.device)
        last = torch.where(self.visual, index, -1).amax(1)
        return torch.where(self.n_visual > 0, last + 1, NEVER)

    @cached_property
    def last(self) -> Tensor:
        """[B] position of the last prompt token that is not padding."""
        index = torch.arange(self.length, device=self.kinds.device)
        return torch.where(self.valid, index, 0).amax(1)

    def take(self, rows: Tensor) -> Layout:
        """The layout of the given rows, repeats allowed (beams, return sequences)."""
        return replace(self, kinds=self.kinds[rows], images=self.images[rows])

    def padded(self, length: int) -> Layout:
        """The layout left-padded to a longer length."""
        extra = length - self.length
        pad = torch.nn.functional.pad
        return replace(self, kinds=pad(self.kinds, (extra, 0)), images=pad(self.images, (extra, 0), value=-1))

    @staticmethod
    def stack(layouts: list[Layout]) -> Layout:
        """Rows of several layouts, left-padded to the longest."""
        length = max(layout.length for layout in layouts)
        layouts = [layout.padded(length) for layout in layouts]
        return replace(
            layouts[0], kinds=torch.cat([x.kinds for x in layouts]), images=torch.cat([x.images for x in layouts])
        )
