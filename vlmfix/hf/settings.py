"""Generation settings: greedy means greedy, and what cannot run is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlmfix.errors import Refusal, UsageError
from vlmfix.hf.draw import SeededDraw

NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
    "prompt_lookup_num_tokens": None,
}
"""Settings that change which token is chosen, at the values that change nothing."""

REFUSED = {
    "assistant_model": "assisted decoding verifies several tokens at once, which a mitigated step does not define",
    "prompt_lookup_num_tokens": "prompt-lookup decoding verifies several tokens at once, which a mitigated "
    "step does not define",
    "custom_generate": "a custom decoding loop may not call the model as generate does",
    "guidance_scale": "classifier-free guidance runs its own second forward; use a contrastive method instead",
    "penalty_alpha": "contrastive search runs its own forwards over candidates",
}


def spelled_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The caller's keywords of `generate`, those of a generation_config among them (it holds None for the rest)."""
    config = kwargs.get("generation_config")
    given = {} if config is None else {k: v for k, v in vars(config).items() if v is not None and k[0] != "_"}
    given.pop("transformers_version", None)
    return {**given, **{k: v for k, v in kwargs.items() if k != "generation_config"}}


def effective(name: str, kwargs: dict[str, Any], config: Any) -> Any:
    """A setting's value: the caller's word, or what the checkpoint's generation_config says."""
    return kwargs[name] if name in kwargs else getattr(config, name, None)


def plain(config: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fills in neutral settings wherever a checkpoint brings its own and the caller said nothing.

    Args:
        config: the checkpoint's generation_config.
        kwargs: the caller's keywords of `generate`, spelled out.

    Returns:
        Keywords with the fillings, and what was overridden: name -> the checkpoint's value.
    """
    filled, overridden = dict(kwargs), {}
    sampling = bool(kwargs.get("do_sample"))
    for name, neutral in NEUTRAL.items():
        if name in kwargs:
            continue
        value = getattr(config, name, None)
        if name == "top_k" and sampling:
            neutral = 0
        if value is not None and value != neutral:
            filled[name] = neutral
            overridden[name] = value
        elif name == "top_k" and sampling:
            filled[name] = 0
    return filled, overridden


def refuse(
    kwargs: dict[str, Any], branches: bool, config: Any = None, late: bool = False, gradients: bool = False
) -> None:
    """Refuses ways of decoding that a recipe cannot follow.

    Args:
        kwargs: the caller's keywords of `generate`, spelled out.
        branches: whether the recipe has branch rows.
        config: the checkpoint's generation_config.
        late: whether a branch waits for the visible rows' prefill.
        gradients: whether the recipe takes gradients of single-token steps.

    Raises:
        Refusal: names the setting and the reason.
    """
    for name, reason in REFUSED.items():
        value = effective(name, kwargs, config)
        if value and not (name == "guidance_scale" and value == 1):
            raise Refusal(f"{name}: {reason}")
    cache, chunks = (effective(name, kwargs, config) for name in ("cache_implementation", "prefill_chunk_size"))
    if cache == "paged":
        raise Refusal("continuous batching schedules rows by itself; run batches with vlm.generate instead")
    if kwargs.get("pixel_values_videos") is not None:
        raise Refusal("videos: only pictures are supported; give frames as pictures")
    if branches and kwargs.get("past_key_values") is not None:
        raise Refusal("a contrastive method needs its own cache for its branches; do not pass past_key_values")
    if branches and chunks:
        raise Refusal("a contrastive method prefills visible and branch rows together; leave prefill_chunk_size unset")
    if gradients and chunks:
        raise Refusal("saliency is read off single-token steps; leave prefill_chunk_size unset")
    if branches and cache not in (None, "dynamic", "static", "hybrid"):
        raise Refusal(f"cache_implementation={cache!r}: contrastive methods run with 'dynamic' or 'static'")
    if (late or gradients) and cache == "static":
        raise Refusal("cache_implementation='static': this method needs a cache that grows; use 'dynamic'")


def own_generate(model: Any) -> Any:
    """The generate of a model's class; Janus' own drops the logits processors of text generation."""
    cls = GenerationMixin if model.config.model_type == "janus" else type(model)
    return cls.generate.__get__(model)


def seeded(kwargs: dict[str, Any], seed: int, items: Sequence[str]) -> tuple[dict[str, Any], SeededDraw]:
    """Moves the draw of a sampling run into `SeededDraw`.

    Args:
        kwargs: keywords of `generate`; temperature, top_k, top_p and min_p are taken over.
        seed: of the run.
        items: name of each sample.

    Raises:
        UsageError: beams, where a draw per row has no meaning, or a truncation that the draw does not know.
    """
    if (kwargs.get("num_beams") or 1) > 1:
        raise UsageError("seed= draws one token per row and does not go with num_beams > 1; leave one of them out")
    for name in ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
        if kwargs.get(name) not in (None, NEUTRAL.get(name)):
            raise UsageError(f"seed= knows temperature, top_k, top_p and min_p; leave {name} or the seed out")
    warpers = LogitsProcessorList()
    if (temperature := kwargs.get("temperature", 1.0)) not in (None, 1.0):
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k := kwargs.get("top_k"):
        warpers.append(TopKLogitsWarper(top_k))
    if (top_p := kwargs.get("top_p")) is not None and top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p := kwargs.get("min_p"):
        warpers.append(MinPLogitsWarper(min_p))
    repeats = kwargs.get("num_return_sequences") or 1
    draw = SeededDraw(seed, items, repeats, warpers, bool(kwargs.get("output_scores")))
    processors = LogitsProcessorList([*(kwargs.get("logits_processor") or []), draw])
    return {**kwargs, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "logits_processor": processors}, draw


def stop_strings_as_criteria(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `generate` whose stop strings are stopping criteria, as loops of our own need them.

    Raises:
        UsageError: stop strings without the tokenizer.
    """
    kwargs = dict(kwargs)
    strings, tokenizer = kwargs.pop("stop_strings", None), kwargs.pop("tokenizer", None)
    config = kwargs.get("generation_config")
    if config is not None and config.stop_strings is not None:
        kwargs["generation_config"] = config = copy.deepcopy(config)
        strings, config.stop_strings = strings or config.stop_strings, None
    if strings is None:
        return kwargs
    if tokenizer is None:
        raise UsageError("stop_strings need the tokenizer; pass tokenizer=processor.tokenizer as well")
    given = kwargs.get("stopping_criteria") or []
    return {**kwargs, "stopping_criteria": StoppingCriteriaList([*given, StopStringCriteria(tokenizer, strings)])}
