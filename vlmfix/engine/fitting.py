"""Which calls a captured step can serve, and what it takes for granted besides them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from vlmfix import registry
from vlmfix.attention.compiled import Compiled
from vlmfix.hf.families import FAMILIES
from vlmfix.hf.parts import Parts
from vlmfix.hf.searching import FULL, SLIDING, layer_kinds
from vlmfix.hf.settings import effective
from vlmfix.hf.slots import GrowingLayer
from vlmfix.hf.stepping import Prefilled


def why_not(parts: Parts, compiled: Compiled, kwargs: dict[str, Any], watched: bool, automatic: bool) -> str:
    """Why a call cannot replay a captured step; empty where it can.

    Args:
        parts: the model.
        compiled: the recipe.
        kwargs: the caller's keywords of generate.
        watched: whether observers read along.
        automatic: whether the caller left the choice open, so that the result must hold the cache too.
    """
    config = parts.model.generation_config

    def asked(name: str) -> Any:
        return effective(name, kwargs, config)

    family = FAMILIES.get(parts.family)
    if family is not None and family.replay:
        return f"{parts.family}: {family.replay}"
    others = sorted(set(layer_kinds(parts.text_config)) - {FULL, SLIDING})
    if others:
        return f"{parts.family} has layers of kind {', '.join(others)}"
    decoding = compiled.decoding
    if decoding is not None and decoding.search() is not None:
        return f"{registry.name_of(decoding)} searches over beams"
    if compiled.reads is not None:
        return f"{registry.name_of(decoding)} has another language model read along"
    methods = [*compiled.attention, *(() if compiled.decoding is None else (compiled.decoding,))]
    for method in methods:
        if not method.replays:
            return f"{registry.name_of(method)} does not say that its steps can be replayed (`replayable = True`)"
    for method in compiled.attention:
        if method.follows_rows:
            return f"{registry.name_of(method)} takes notes on every token"
    if watched:
        return "attention is being recorded"
    if (asked("num_beams") or 1) > 1:
        return "beam search"
    if asked("use_cache") is False:
        return "use_cache=False"
    for name in ("cache_implementation", "prefill_chunk_size", "output_attentions", "output_hidden_states"):
        if asked(name):
            return f"{name}={asked(name)!r}"
    if kwargs.get("past_key_values") is not None:
        return "past_key_values: a cache of the caller's grows with the answer, that of a captured step does not"
    if torch.is_autocast_enabled(parts.device.type):
        return "torch.autocast is on"
    if kwargs.get("synced_gpus"):
        return "synced_gpus=True"
    if hooked := strangers(parts):
        return f"{hooked} has a forward hook, which a replay would not call"
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and (mask.dim() != 2 or bool((mask.bool() != (mask.cumsum(1) > 0)).any())):
        return "the prompt has padding behind its first token, or a mask of more than two dimensions"
    if automatic and asked("return_dict_in_generate"):
        return "return_dict_in_generate=True hands out the cache, which a captured step keeps"
    if getattr(parts.model, "hf_device_map", None) and len(set(parts.model.hf_device_map.values())) > 1:
        return "the model is spread over several devices"
    return ""


def strangers(parts: Parts) -> str:
    """The first module of a step with a forward hook that is neither ours nor transformers'; empty if none has one."""
    for name, module in (("the model", parts.top), *parts.decoder.named_modules()):
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if (getattr(hook, "__module__", None) or "").split(".")[0] not in ("vlmfix", "transformers"):
                return name or "the decoder"
    return ""


def addresses(parts: Parts) -> int:
    """Where the weights lie, which a captured step reads there."""

    def address(weight: Tensor) -> int:
        try:
            return weight.data_ptr()
        except RuntimeError:  # kinds of tensors that have no storage of their own
            return id(weight)

    return hash(tuple(address(weight) for weight in parts.model.parameters()))


def numbers(prefilled: Prefilled) -> Hashable:
    """Kind of numbers; those made in inference mode cannot be written outside of it."""
    keys = prefilled.cache.layers[0].keys
    return keys.dtype, keys.device, torch.is_inference_mode_enabled()


def lacking(prefilled: Prefilled, capacity: int) -> int:
    """Bytes that a device lacks for a cache of fixed size; 0 where it fits.

    Args:
        prefilled: a growing cache, which is freed while the other one is filled.
        capacity: most slots.
    """
    more = 0
    for layer in prefilled.cache.layers:
        if isinstance(layer, GrowingLayer) and layer.capacity == capacity and layer.own is not None:
            continue  # it lies in buffers of its own, which stay
        slots = min(capacity, getattr(layer, "sliding_window", None) or capacity)
        for tensor in (layer.keys, layer.values):
            more += tensor[:, :, :1].nbytes * (slots - tensor.shape[2])
    return max(0, more - unused(prefilled.logits.device))


def unused(device: torch.device) -> int:
    """Bytes of a device that tensors can still take; more than there are where nobody counts them."""
    if device.type != "cuda":
        return 1 << 62
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held
