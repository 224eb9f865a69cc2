"""Finding the parts of a vision-language model: decoder, attention layers, heads, image tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vlmfix.errors import Refusal
from vlmfix.hf import attend
from vlmfix.hf.vision import class_tower
from vlmfix.plan import Plan


@dataclass(frozen=True)
class Parts:
    """Where the methods take hold of a model.

    Args:
        model: the whole model.
        top: the module whose forward yields logits inside `generate`; the language model for families whose
            `generate` hands embeddings to it.
        decoder: the text decoder, whose keywords reach the attention function.
        blocks: layer index -> decoder block (the residual stream enters here).
        heads: layer index -> query heads; layers without attention are absent.
        kv_heads: layer index -> key/value heads.
        image_ids: token ids that stand for visual tokens.
        structure_ids: token ids that frame pictures (start, end, row and tile separators).
        hidden_size: width of the residual stream.
    """

    model: Any
    top: Any
    decoder: Any
    blocks: dict[int, nn.Module]
    heads: dict[int, int]
    kv_heads: dict[int, int]
    image_ids: tuple[int, ...]
    structure_ids: tuple[int, ...]
    hidden_size: int
    text_config: Any = field(repr=False)

    @property
    def family(self) -> str:
        """Transformers' model_type."""
        return str(self.model.config.model_type)

    @property
    def depth(self) -> int:
        """Number of decoder layers, those without attention included."""
        return max([*self.heads, len(self.blocks) - 1]) + 1

    @cached_property
    def tower(self) -> dict[int, nn.Module]:
        """Vision layer -> attention module, where the tower has a class token and its patches are visual tokens."""
        return class_tower(self.model)

    @property
    def embeds(self) -> bool:
        """Whether `generate` hands embeddings to an inner language model."""
        return self.top is not self.model

    @property
    def device(self) -> torch.device:
        """Device of the text embeddings."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def find(model: Any, require_pictures: bool = True) -> Parts:
    """Finds the parts of a model that is installed (see `hooks.install`), by one forward of two text tokens.

    Args:
        model: a model of AutoModelForImageTextToText.
        require_pictures: refuse text-only models.

    Raises:
        Refusal: an encoder-decoder or text-only model, or one whose attention cannot be reached.
    """
    config = model.config
    name = type(model).__name__
    if config.is_encoder_decoder or getattr(config.get_text_config(decoder=True), "is_encoder_decoder", False):
        raise Refusal(
            f"{name}: encoder-decoder models keep the picture in the encoder; vlmfix acts on decoder-only VLMs "
            "(`vlmfix models` lists them)"
        )
    image_ids = _image_ids(config)
    if require_pictures and not image_ids and not hasattr(config, "vision_config"):
        raise Refusal(
            f"{name} ({config.model_type}) is a text-only model: it has no image token and no vision tower; give a VLM"
        )
    top = _language_model(model)
    decoder = _decoder(top)
    probe = _Probe()
    _probe(model, decoder, probe)
    if not probe.heads:
        raise Refusal(
            f"{name}: no attention layer of the text decoder goes through transformers' attention interface, so "
            "nothing can act"
        )
    blocks = _blocks(decoder, set(probe.heads))
    return Parts(
        model,
        top,
        decoder,
        blocks,
        probe.heads,
        probe.kv_heads,
        image_ids,
        _structure_ids(config),
        model.get_input_embeddings().weight.shape[-1],
        config.get_text_config(decoder=True),
    )


def _image_ids(config: Any) -> tuple[int, ...]:
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(config, name, None) for name in names)
    return tuple(dict.fromkeys(int(i) for i in found if isinstance(i, int)))


def _structure_ids(config: Any) -> tuple[int, ...]:
    names = (
        "vision_start_token_id",
        "vision_end_token_id",
        "image_start_token_id",
        "image_end_token_id",
        "boi_token_id",
        "eoi_token_id",
        "boi_token_index",
        "eoi_token_index",
    )
    found = (getattr(config, name, None) for name in names)
    indicators = getattr(config, "visual_indicator_token_ids", None) or ()
    return tuple(dict.fromkeys(int(i) for i in (*found, *indicators) if isinstance(i, int)))


def _language_model(model: Any) -> Any:
    """The inner language model where `generate` is overridden to feed it embeddings, else the model itself."""
    inner = getattr(model, "language_model", None) or getattr(model, "text_model", None)
    own = "generate" in type(model).__dict__
    return inner if own and inner is not None and hasattr(inner, "generate") else model


def _decoder(top: Any) -> Any:
    return top.get_decoder() if hasattr(top, "get_decoder") else top


class _Probe:
    """Stands in for a request and learns the layers."""

    past = 0
    tail = None
    frame = None

    def __init__(self) -> None:
        self.heads: dict[int, int] = {}
        self.kv_heads: dict[int, int] = {}
        self.q_pos = torch.empty(0)

    def watches(self, layer: int) -> bool:
        return False

    def visit(self, layer: int, look: attend.Look) -> tuple[tuple[Plan, ...], int]:
        self.heads[layer] = look.query.shape[1]
        self.kv_heads[layer] = look.key.shape[1]
        return (), 0

    def finish(self, layer: int, out: Tensor) -> Tensor:
        return out


@torch.no_grad()
def _probe(model: Any, decoder: Any, probe: _Probe) -> None:
    embedding = model.get_input_embeddings()
    ids = torch.zeros(1, 2, dtype=torch.long, device=embedding.weight.device)

    def pre(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, attend.STATE: probe}

    training = model.training
    hook = decoder.register_forward_pre_hook(pre, with_kwargs=True)
    try:
        model.eval()
        decoder(inputs_embeds=embedding(ids), attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        hook.remove()
        model.train(training)


def _blocks(decoder: nn.Module, layers: set[int]) -> dict[int, nn.Module]:
    """Decoder blocks by layer index: the module list whose members own the attention modules."""

    def owned(block: nn.Module) -> Iterator[int]:
        for module in block.modules():
            index = getattr(module, "layer_idx", None)
            if isinstance(index, int):
                yield index

    best: dict[int, nn.Module] = {}
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList):
            blocks = {i: block for block in module for i in set(owned(block))}
            if layers <= set(blocks) and len(blocks) >= len(best) and len(blocks) <= len(module):
                best = blocks
    if not best:
        raise Refusal(f"{type(decoder).__name__}: the decoder's list of layers could not be found")
    return best
