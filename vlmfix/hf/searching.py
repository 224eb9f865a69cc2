"""What a search of our own needs from transformers: settings, prefill, a tree of hypotheses in one cache, results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput

from vlmfix.errors import Refusal, UsageError
from vlmfix.hf.attend import NAMES
from vlmfix.hf.calls import Call
from vlmfix.hf.families import FAMILIES, UNBRANCHED
from vlmfix.hf.parts import Parts
from vlmfix.hf.settings import stop_strings_as_criteria

FULL, SLIDING = "full_attention", "sliding_attention"

BEAM: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False}
"""Settings the search takes over, with what generate is told instead: rows are not repeated, pictures read once."""

REFUSED = {
    "do_sample": "the search keeps the best beams and draws nothing; leave do_sample out",
    "streamer": "the search may take tokens back; leave streamer out",
    "prefix_allowed_tokens_fn": "the search does not number rows as it expects; use a logits processor",
    "past_key_values": "the search lays out a cache of its own; leave past_key_values out",
    "output_attentions": "candidates that were not taken would be among them; leave output_attentions out",
    "output_hidden_states": "candidates that were not taken would be among them; leave output_hidden_states out",
}


@dataclass(frozen=True)
class Settings:
    """How the beams of a search are kept and returned.

    Args:
        beams: B.
        returned: sequences per sample.
        length_penalty: exponent of the length that a finished sequence's score is divided by.
        early_stopping: as in transformers.
    """

    beams: int
    returned: int
    length_penalty: float
    early_stopping: bool | str


@dataclass(frozen=True)
class Task(Call):
    """A call that is searched.

    Args:
        tree: the model and its cache.
        settings: of the beams.
    """

    tree: Tree
    settings: Settings

    @property
    def end_tokens(self) -> int:
        """How many tokens end a sequence."""
        tokens = self.config._eos_token_tensor
        return 0 if tokens is None else len(tokens)

    def result(
        self, sequences: Tensor, scores: Tensor, indices: Tensor, logits: list[Tensor], processed: list[Tensor]
    ) -> Any:
        """What generate returns."""
        config = self.config
        if not config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(
            sequences=sequences,
            sequences_scores=scores if config.output_scores else None,
            scores=tuple(processed) if config.output_scores else None,
            logits=tuple(logits) if config.output_logits else None,
            beam_indices=indices,
        )


def call(
    parts: Parts, generate: Callable[..., Any], num_beams: int, loop: Callable[[Task], Any], kwargs: dict[str, Any]
) -> Any:
    """Runs transformers' generate with a decoding loop of ours.

    Args:
        parts: the model.
        generate: its generate.
        num_beams: beams where the caller says nothing above 1.
        loop: the loop.
        kwargs: the caller's keywords.

    Raises:
        Refusal: a setting or family that cannot be searched.
        UsageError: more sequences wanted than there are beams.
    """
    _refuse(parts, kwargs)
    given = {name: _effective(parts, kwargs, name) for name in BEAM}
    beams = max(given["num_beams"] or 1, 1)
    beams = beams if beams > 1 else num_beams
    returned = given["num_return_sequences"] or 1
    if returned > beams:
        raise UsageError(f"num_return_sequences={returned} is more than there are beams ({beams}); raise num_beams")
    penalty = given["length_penalty"]
    settings = Settings(beams, returned, 1.0 if penalty is None else penalty, given["early_stopping"] or False)
    kwargs = stop_strings_as_criteria({**kwargs, **BEAM, "past_key_values": DynamicCache()})

    def decoding(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **rest: Any,
    ) -> Any:
        if generation_config.do_sample:
            raise Refusal(f"do_sample: {REFUSED['do_sample']}")
        tree = Tree(parts, model, input_ids, generation_config, rest)
        return loop(Task(input_ids, logits_processor, stopping_criteria, generation_config, tree, settings))

    return generate(**kwargs, custom_generate=decoding)


def _effective(parts: Parts, kwargs: dict[str, Any], name: str) -> Any:
    """A setting: the caller's keyword, the caller's generation_config, the checkpoint's."""
    if name in kwargs:
        return kwargs[name]
    given = getattr(kwargs.get("generation_config"), name, None)
    return getattr(parts.model.generation_config, name, None) if given is None else given


def _refuse(parts: Parts, kwargs: dict[str, Any]) -> None:
    for name, reason in REFUSED.items():
        if kwargs.get(name):
            raise Refusal(f"{name}: {reason}")
    if kwargs.get("use_cache") is False:
        raise Refusal("use_cache: the search keeps its hypotheses in the cache; leave use_cache=True")
    if kwargs.get("cache_implementation") not in (None, "dynamic"):
        raise Refusal("cache_implementation: the search cuts tokens out of its cache, which only 'dynamic' allows")
    if parts.family in UNBRANCHED:
        reason = FAMILIES[parts.family].branches.removeprefix("no: ")
        raise Refusal(f"{parts.family} cannot be searched: {reason}")
    kinds = set(layer_kinds(parts.text_config)) - {FULL, SLIDING}
    if kinds:
        raise Refusal(
            f"{parts.family} cannot be searched: its layers of kind {', '.join(sorted(kinds))} cannot hold several "
            "hypotheses behind one prompt"
        )


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Kinds of the decoder's layers, in the words of transformers' configurations."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(dict.fromkeys(kinds))
    if getattr(config, "attention_chunk_size", None):
        return ("chunked_attention",)
    return (SLIDING,) if getattr(config, "sliding_window", None) else (FULL,)


class Tree:
    """The prompt of every sample and behind it the tokens of all its hypotheses, in one row of one cache.

    A token sees the prompt and the tokens it descends from, wherever they lie, and stands at the position it has in
    its hypothesis. So all continuations of one sample are queries of one row, the prompt is held and read once, and
    going back needs nothing but other ancestors.

    Args:
        parts: the model as installed.
        model: the module that generate runs, an inner language model for families that hand it embeddings.
        ids: [B, L] prompt ids.
        config: generation config, for the prefill.
        kwargs: the model's keywords as generate prepared them.
    """

    def __init__(self, parts: Parts, model: Any, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> None:
        self.model = model
        self.kinds = layer_kinds(parts.text_config)
        self.window = getattr(parts.text_config, "sliding_window", None)
        self.eager = parts.text_config._attn_implementation == NAMES["eager"]
        self.cache = kwargs["past_key_values"]
        output = model._prefill(ids, config, kwargs)
        self.prompt_logits: Tensor = output.logits[:, -1]
        self.length: int = self.cache.get_seq_length()
        rows, device = self.prompt_logits.shape[0], self.prompt_logits.device
        mask = kwargs.get("attention_mask")
        self.valid = torch.ones(rows, self.length, device=device) if mask is None else mask
        self.valid = self.valid.to(device).bool()
        positions = kwargs.get("position_ids")
        self._last = self.valid.sum(1, keepdim=True) - 1 if positions is None else positions[..., -1:]
        self._order = torch.arange(self.length, device=device).expand(rows, -1)
        self._fed = 0
        skipped = ("past_key_values", "attention_mask", "position_ids", "inputs_embeds", "logits_to_keep")
        self._rest = {k: v for k, v in kwargs.items() if k not in skipped}

    @property
    def rows(self) -> int:
        """Samples."""
        return len(self.valid)

    def feed(self, tokens: Tensor, ancestors: Sequence[Tensor]) -> Tensor:
        """Logits [B, Q, V] behind tokens [B, Q], each behind its ancestors: per sample, slots [Q, t] in the cache."""
        count, device = tokens.shape[1], tokens.device
        past = self.cache.get_seq_length()
        depth = torch.tensor([slots.shape[1] for slots in ancestors], device=device)
        seen = torch.zeros(self.rows, count, past + count, dtype=torch.bool, device=device)
        seen[..., : self.length] = self.valid[:, None]
        for row, slots in zip(seen, ancestors, strict=True):
            row.scatter_(1, slots, True)
        own = torch.arange(count, device=device)
        seen[:, own, past + own] = True
        order = (self.length + depth)[:, None].expand(-1, count)
        self._order = torch.cat([self._order, order], 1)
        positions = self._last + 1 + depth[:, None]
        kwargs = dict(self._rest)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                last = kwargs[name][:, -1:] if name == "token_type_ids" else torch.zeros_like(kwargs[name][:, -1:])
                kwargs[name] = last.expand(-1, count)
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            next_sequence_length=count,
            past_key_values=self.cache,
            attention_mask=self._masks(seen, order),
            position_ids=positions.expand(*positions.shape[:-1], count),
            **kwargs,
        )
        self._fed = count
        logits: Tensor = self.model(**inputs, return_dict=True).logits
        return logits

    def keep(self, chosen: Tensor) -> Tensor:
        """Keeps some of the tokens fed last, indices [B, n] into Q, and drops the others: their slots [n]."""
        start, count = self.cache.get_seq_length() - self._fed, chosen.shape[1]
        self._order = torch.cat([self._order[:, :start], self._order[:, start:].gather(1, chosen)], 1)
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is None or not layer.keys.numel():
                continue
            for name in ("keys", "values"):
                held = getattr(layer, name)
                index = chosen[:, None, :, None].to(held.device).expand(-1, held.shape[1], -1, held.shape[3])
                held[:, :, start : start + count] = held[:, :, start:].gather(2, index)
                setattr(layer, name, held[:, :, : start + count])
        self._fed = count
        slots: Tensor = start + torch.arange(count, device=chosen.device)
        return slots

    def _masks(self, seen: Tensor, order: Tensor) -> Any:
        """Attention masks of the step, one for each kind of layer where there are several."""
        masks = {FULL: seen}
        if SLIDING in self.kinds and self.window:
            masks[SLIDING] = seen & (self._order[:, None] > order[..., None] - self.window)
        made = {kind: self._made(masks.get(kind, seen)) for kind in self.kinds}
        return made if len(made) > 1 else next(iter(made.values()))

    def _made(self, seen: Tensor) -> Tensor:
        mask = seen[:, None]
        if not self.eager:
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
