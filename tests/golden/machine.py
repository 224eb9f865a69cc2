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

from .cases import ATTENTION, MODEL, close, same

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

    def __init__(self, method: Any, name: str, also: str = "") -> None:
        self._method, self._name, self._also = method, name, also
        self.calls: list[tuple[tuple[Any, ...], Any]] = []
        self.others: list[tuple[tuple[Any, ...], Any]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._method, name)
        if name not in (self._name, self._also):
            return value

        def call(*args: Any) -> Any:
            result = value(*args)
            (self.calls if name == self._name else self.others).append((args, result))
            return result

        return call


@dataclass
class Run:
    """What a model did: prefill logits [B, K, V], logits of each generated step, tokens, calls of the method.

    `others` are the calls of another of its functions, where one was asked for.
    """

    prefill: Tensor
    steps: list[Tensor]
    tokens: Tensor
    calls: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)
    others: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)

    def row(self, index: int) -> Run:
        """One row of a batch; of a method's calls, the logits and branches of that row."""
        at = slice(index, index + 1)
        calls = [
            ((own[at], replace(step, branches=tuple(x[at] for x in step.branches))), result[at])
            for (own, step), result in self.calls
        ]
        return Run(self.prefill[at], [x[at] for x in self.steps], self.tokens[at], calls)


@torch.no_grad()
def generated(model: LlamaForCausalLM, method: Any, inputs: dict[str, Tensor], new: int, also: str = "") -> Run:
    """Generate under a decoding method, which makes its own branches from the prompt.

    Args:
        model: the model.
        method: a method or several.
        inputs: input_ids or inputs_embeds, attention_mask and visual_mask.
        new: tokens.
        also: another function of the method to listen to.
    """
    with installed(model, require_pictures=False) as parts:
        compiled, spy = _spied(compile_for(parts, Recipe.of(method)), parts, also)
        options = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        result, _ = run.generate(parts, compiled, model.generate, {**inputs, **options})
    assert spy is not None
    return Run(result.logits[0], list(result.logits), result.sequences[:, -new:], spy.calls, spy.others)


def embedded(embeds: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Inputs of `generated` for a prompt of embeddings [B, K, width]."""
    return {"inputs_embeds": embeds, "attention_mask": layout.valid.long(), "visual_mask": layout.visual}


def beside_another(embeds: Tensor, layout: Layout, extra: int = 3) -> dict[str, Tensor]:
    """A left-padded batch: another, longer prompt, and the prompt [1, K, width]."""
    pad = torch.nn.functional.pad
    other = torch.cat([embeds[:, :1].expand(-1, extra, -1), embeds.flip(1)], 1)
    return {
        "inputs_embeds": torch.cat([other, pad(embeds, (0, 0, extra, 0))]),
        "attention_mask": torch.cat([torch.ones(other.shape[:2]), pad(layout.valid, (extra, 0))]).long(),
        "visual_mask": torch.cat([pad(layout.visual.flip(1), (extra, 0)), pad(layout.visual, (extra, 0))]),
    }


def agree(result: Run, arrays: dict[str, Tensor], atol: float = ATTENTION, score_atol: float = MODEL) -> None:
    """Tokens, logits of the visible rows and of each branch, and scores equal the stored ones at every step."""
    steps = len(result.steps)
    same(result.tokens, arrays["tokens"].view(-1, steps), "tokens")
    names = ("logits_branch", "logits_branch2")
    assert len(result.calls) == steps
    for (own, step), _ in result.calls:
        stored = [arrays["logits"], *(arrays[name] for name in names if name in arrays)]
        for actual, expected in zip((own, *step.branches), stored, strict=True):
            close(actual, expected[step.number - 1].view_as(actual), atol, f"logits, step {step.number}", rtol=1e-5)
    scores = torch.stack(result.steps)
    close(scores, arrays["scores"].view_as(scores), score_atol, "scores", rtol=1e-5)


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


def _spied(compiled: Compiled, parts: Parts, also: str = "") -> tuple[Compiled, Spy | None]:
    """The compiled recipe with its one method under observation."""
    if compiled.decoding is not None:
        spy = Spy(compiled.decoding, "scores", also)
        return replace(compiled, decoding=spy), spy  # type: ignore[arg-type]
    if compiled.attention:
        spy = Spy(compiled.attention[0], "plan")
        return replace(compiled, attention=(spy,)), spy  # type: ignore[arg-type]
    return compiled, None
