"""A tiny Llama of a case through the project's own machinery: installation, requests, generate, branches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vlmfix.api import compile_for
from vlmfix.attention import run
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.request import Request
from vlmfix.hf.branching import Joint
from vlmfix.hf.hooks import installed, serving
from vlmfix.hf.parts import Parts
from vlmfix.layout import Layout
from vlmfix.method import Method
from vlmfix.recipe import Recipe

SHAPE = ("architecture", "dtype", "attn_implementation")


def llama(config: dict[str, Any], weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """A float32 model from a case's configuration and weights by their Hugging Face names."""
    settings = {name: value for name, value in config.items() if name not in SHAPE}
    settings.setdefault("tie_word_embeddings", "lm_head.weight" not in weights)
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    model.load_state_dict(weights, strict=not settings["tie_word_embeddings"])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def shared_model(folder: Path, name: str) -> LlamaForCausalLM:
    """The model several cases of a folder share."""
    config = json.loads((folder / "model_config.json").read_text(encoding="utf-8"))
    return llama(config, load_file(folder / name))


def spans(info: dict[str, Any], rows: int, length: int) -> Layout:
    """The layout that a case describes: one picture per row, perhaps after left padding."""
    items = info.get("items") or [info] * rows
    visual = torch.zeros(rows, length, dtype=torch.bool)
    valid = torch.ones_like(visual)
    for row, item in enumerate(items):
        start, end = item["image_span"]
        visual[row, start:end] = True
        valid[row, : item.get("left_pad", 0)] = False
    return Layout.of(visual, valid)


class Spy:
    """A method that notes what goes in and out of one of its functions."""

    def __init__(self, method: Any, name: str) -> None:
        self._method, self._name = method, name
        self.calls: list[tuple[tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._method, name)
        if name != self._name:
            return value

        def call(*args: Any) -> Any:
            result = value(*args)
            self.calls.append((args, result))
            return result

        return call


@dataclass
class Run:
    """What a model did: prefill logits [B, K, V], logits of each generated step, tokens, calls of the method."""

    prefill: Tensor
    steps: list[Tensor]
    tokens: Tensor
    calls: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)


@torch.no_grad()
def with_attention_method(model: LlamaForCausalLM, method: Method, embeds: Tensor, layout: Layout, new: int) -> Run:
    """Prefill and `new` decode steps, once through generate and once by hand; both must agree."""
    inputs = {"inputs_embeds": embeds, "attention_mask": layout.valid.long(), "visual_mask": layout.visual}
    with installed(model, require_pictures=False) as parts:
        compiled, spy = _spied(compile_for(parts, Recipe.of(method)), parts)
        request, _ = run.open_request(parts, compiled, inputs)
        with serving(request):
            out = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=True)
            prefill, steps = out.logits, [out.logits[:, -1]]
            tokens: list[Tensor] = []
            mask = inputs["attention_mask"]
            for _ in range(new):
                tokens.append(steps[-1].argmax(-1))
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                out = model(tokens[-1][:, None], attention_mask=mask, past_key_values=out.past_key_values)
                steps.append(out.logits[:, -1])
        options = {"max_new_tokens": new + 1, "do_sample": False, "output_logits": True}
        options["return_dict_in_generate"] = True
        result, _ = run.generate(parts, compiled, model.generate, {**inputs, **options})
    assert torch.equal(result.sequences[:, :new], torch.stack(tokens, 1))
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(steps), atol=1e-6, rtol=0)
    return Run(prefill, steps, torch.stack(tokens, 1), spy.calls if spy else [])


@torch.no_grad()
def with_branches(
    model: LlamaForCausalLM, method: Method, embeds: Tensor, layout: Layout, branches: Sequence[Tensor], new: int
) -> Run:
    """Generate over visible rows [B, K, width] and branch rows of any length, `new` tokens."""
    with installed(model, require_pictures=False) as parts:
        compiled, spy = _spied(compile_for(parts, Recipe.of(method)), parts)
        joint = _joint(embeds, layout, branches)
        request = Request(parts, compiled, layout, joint)
        with serving(request):
            result = model.generate(
                inputs_embeds=embeds,
                attention_mask=layout.valid.long(),
                past_key_values=request.cache(),
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    return Run(embeds, list(result.logits), result.sequences, spy.calls if spy else [])


def _joint(embeds: Tensor, layout: Layout, branches: Sequence[Tensor]) -> Joint:
    """Visible rows and branch rows, left-padded to one length."""
    blocks = [embeds, *branches]
    length = max(block.shape[1] for block in blocks)
    pad = torch.nn.functional.pad
    joint = torch.cat([pad(block, (0, 0, length - block.shape[1], 0)) for block in blocks])
    masks = [layout.valid.long(), *(torch.ones(block.shape[:2], dtype=torch.long) for block in branches)]
    mask = torch.cat([pad(block, (length - block.shape[1], 0)) for block in masks])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    visual = pad(layout.visual, (length - layout.length, 0)).repeat(len(blocks), 1)
    inputs = {"inputs_embeds": joint, "attention_mask": mask, "position_ids": positions}
    whole = Layout.of(visual & mask.bool(), mask)
    return Joint(inputs, mask, positions, whole, layout.rows, len(blocks))


def _spied(compiled: Compiled, parts: Parts) -> tuple[Compiled, Spy | None]:
    """The compiled recipe with its one method under observation."""
    if compiled.decoding is not None:
        spy = Spy(compiled.decoding, "scores")
        return replace(compiled, decoding=spy), spy  # type: ignore[arg-type]
    if compiled.attention:
        spy = Spy(compiled.attention[0], "plan")
        return replace(compiled, attention=(spy,)), spy  # type: ignore[arg-type]
    return compiled, None
