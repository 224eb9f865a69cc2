"""Questions about one picture share its prefix: the text before and the picture itself are read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmfix.hf.families import FAMILIES, UNBRANCHED
from vlmfix.hf.inputs import PER_ROW, by_row, read
from vlmfix.hf.parts import Parts


def shareable(parts: Parts) -> bool:
    """Whether a prefix's keys and values are the same whatever follows, at positions that the attention mask tells."""
    family = FAMILIES.get(parts.family)
    plain = family is not None and family.mask == "causal" and not family.types and family.name not in UNBRANCHED
    return plain and not parts.embeds and set(parts.blocks) == set(parts.heads)


@torch.no_grad()
def share(parts: Parts, inputs: dict[str, Any], pictures: Sequence[str]) -> dict[str, Any]:
    """Reads every distinct prefix once and returns what is left for generate.

    Args:
        parts: a shareable model.
        inputs: what the processor returned for B rows, every row with pictures.
        pictures: content of each row's pictures, by any name.

    Returns:
        Keywords of generate: ids as [prefix, padding, rest], their mask, and a cache that holds the prefixes; or
        `inputs` themselves where no two rows share a prefix.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = torch.isin(ids, torch.tensor(parts.image_ids, device=ids.device))
    cut = (torch.arange(ids.shape[1], device=ids.device) * visual).amax(1) + 1
    rows = [(row[ok & before], row[ok & ~before]) for row, ok, before in zip(ids, mask, _before(ids, cut), strict=True)]
    names = [(key, tuple(prefix.tolist())) for key, (prefix, _) in zip(pictures, rows, strict=True)]
    distinct = list(dict.fromkeys(names))
    if len(distinct) == len(names):
        return inputs
    index = torch.tensor([distinct.index(name) for name in names], device=ids.device)
    first = [names.index(name) for name in distinct]
    prefix, prefix_mask = _left_padded([rows[i][0] for i in first])
    cache = DynamicCache(config=parts.text_config)
    parts.model(
        input_ids=prefix,
        attention_mask=prefix_mask,
        position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **_of_rows(parts, inputs, first),
    )
    cache.reorder_cache(index)
    rest, rest_mask = _left_padded([tail for _, tail in rows])
    return {
        "input_ids": torch.cat([prefix[index], rest], 1),
        "attention_mask": torch.cat([prefix_mask[index], rest_mask], 1),
        "past_key_values": cache,
    }


def _before(ids: Tensor, cut: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device) < cut[:, None]


def _left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids [B, longest] and their mask."""
    length = max(len(row) for row in rows)
    pad = torch.nn.functional.pad
    ids = torch.stack([pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return ids, mask


def _of_rows(parts: Parts, inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """Picture inputs of some rows."""
    prompt = read(parts, inputs)
    per_row = parts.family in PER_ROW
    cut = {key: by_row(prompt.layout, value, per_row) for key, value in prompt.pictures.items()}
    return {key: torch.cat([pieces[i] for i in rows]) for key, pieces in cut.items()}
