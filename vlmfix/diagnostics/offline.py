"""Measures that need the finished sequence read once more: rollout, relevance, the exact head divergence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vlmfix.errors import Refusal
from vlmfix.hf.attend import Look, Tail
from vlmfix.hf.branching import join
from vlmfix.hf.hooks import installed, serving, warn_once
from vlmfix.hf.inputs import TOKEN_KEYS, Prompt, read
from vlmfix.hf.parts import Parts
from vlmfix.layout import NEVER
from vlmfix.plan import Plan
from vlmfix.views.text import WithoutPictures

CHUNK = 64
LONG = 4096


@torch.no_grad()
def rollout(model: Any, inputs: Mapping[str, Any], tokens: Tensor, step: int = -1, start: int = 0) -> Tensor:
    """What one generated token is made of, by attention rollout.

    Attention is the plain model's, mean over heads; layers without attention are passed over (see `flow.rollout`).

    Args:
        model: a model of AutoModelForImageTextToText.
        inputs: what the processor returned.
        tokens: [B, S] the tokens that were generated.
        step: which of them.
        start: first layer.

    Returns:
        [B, K] relevance of each prompt token, float32; take the columns of pictures for a heat map.
    """
    with installed(model) as parts:
        prompt = _whole(parts, inputs, tokens)
        looks = _read(parts, _keywords(prompt)).looks
    row = prompt.layout.length - tokens.shape[1] - 1 + step % tokens.shape[1]
    flow = _unit_row(prompt, row)
    for layer in sorted((layer for layer in looks if layer >= start), reverse=True):
        mixed = torch.zeros_like(flow)
        for part, rows in _rows(looks[layer]):
            weights = rows.mean(1)
            share = flow[:, part] / (1 + weights.sum(-1))
            mixed += torch.einsum("bq,bqk->bk", share, weights)
            mixed[:, part] += share
        flow = mixed
    return flow[:, : prompt.layout.length - tokens.shape[1]]


def relevance(model: Any, inputs: Mapping[str, Any], tokens: Tensor, step: int = -1) -> Tensor:
    """What the prediction of one token relies on, by gradient-weighted attention (see `flow.relevance`).

    Args:
        model: a model of AutoModelForImageTextToText; its attention must have a backward.
        inputs: what the processor returned.
        tokens: [B, S] the tokens that were generated.
        step: which of them.

    Returns:
        [B, K] relevance of each prompt token, float32.
    """
    with installed(model) as parts, torch.enable_grad():
        prompt = _whole(parts, inputs, tokens)
        reading = _read(parts, _keywords(prompt))
        length = prompt.layout.length - tokens.shape[1]
        row = length - 1 + step % tokens.shape[1]
        chosen = reading.logits[:, row].gather(1, tokens[:, step % tokens.shape[1], None])
        layers = sorted(reading.looks)
        slopes = torch.autograd.grad(chosen.sum(), [reading.outs[layer] for layer in layers])
    flow = _unit_row(prompt, row)
    with torch.no_grad():
        for layer, slope in sorted(zip(layers, slopes, strict=True), reverse=True, key=lambda pair: pair[0]):
            flow = flow + _relied(reading.looks[layer], slope, flow)
    return flow[:, :length]


@torch.no_grad()
def vision_divergence(model: Any, inputs: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Vision-aware head divergence of every generated token, exactly: with and without the pictures in the prompt.

    "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv 2412.13949, eq. 4, both
    prompts followed by the same tokens; `measures.t_vhd` sums it up by token.

    Args:
        model: a model of AutoModelForImageTextToText.
        inputs: what the processor returned.
        tokens: [B, S] the tokens that were generated.

    Returns:
        [S, B, L, H] float32, over the layers that have attention; nan in rows without pictures.

    Raises:
        Refusal: layers have different numbers of heads, or the family cannot run a prompt without its pictures.
    """
    with installed(model) as parts:
        if len(set(parts.heads.values())) > 1:
            raise Refusal(f"{parts.family}: its layers have different numbers of heads, so they do not stack")
        prompt = _whole(parts, inputs, tokens)
        outs = _read(parts, join(parts, prompt, [WithoutPictures()]).inputs).outs
    steps, rows = tokens.shape[1], len(tokens)
    ends = [outs[layer][:, -steps - 1 : -1].float() for layer in sorted(outs)]
    gaps = torch.stack([(end[:rows] - end[rows:]).norm(dim=-1).transpose(0, 1) for end in ends], 2)
    return gaps.masked_fill((prompt.layout.n_visual == 0)[None, :, None, None], float("nan"))


@dataclass(eq=False)
class _Reading:
    """Stands in for a request during one forward and keeps every layer's attention."""

    parts: Parts
    looks: dict[int, Look] = field(default_factory=dict)
    outs: dict[int, Tensor] = field(default_factory=dict)
    q_pos: Tensor = field(default_factory=lambda: torch.empty(0))
    past: int = 0
    tail: Tail | None = None
    frame: None = None
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def watches(self, layer: int) -> bool:
        return False

    def before(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def after(self, output: Any) -> Any:
        self.logits = output.logits
        return output

    def step(self, rows: int, queries: int, past: Any, device: Any) -> None:
        self.q_pos = torch.arange(queries, device=device)

    def entering(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def observe(self, layer: int, hidden: Tensor) -> Tensor:
        starts = torch.is_grad_enabled() and layer == min(self.parts.blocks)
        return hidden.detach().requires_grad_() if starts else hidden

    def see(self, layer: int, attention: nn.Module, hidden: Tensor) -> None:
        return None

    def visit(self, layer: int, look: Look) -> tuple[tuple[Plan, ...], int]:
        self.looks[layer] = look
        return (), NEVER

    def finish(self, layer: int, out: Tensor) -> Tensor:
        self.outs[layer] = out
        return out


def _whole(parts: Parts, inputs: Mapping[str, Any], tokens: Tensor) -> Prompt:
    """The prompt followed by its answer."""
    if parts.embeds:
        raise Refusal(
            f"{parts.family}: its generate hands embeddings on, so the finished sequence cannot be read again"
        )
    given: dict[str, Any] = {k: v for k, v in inputs.items() if k != "position_ids"}
    count = tokens.shape[1]
    if given.get("inputs_embeds") is not None:
        answer = parts.model.get_input_embeddings()(tokens)
        given["inputs_embeds"] = torch.cat([given["inputs_embeds"], answer], 1)
        given["visual_mask"] = pad(given["visual_mask"], (0, count))
    else:
        given["input_ids"] = torch.cat([given["input_ids"], tokens], 1)
    for key in TOKEN_KEYS:
        if isinstance(given.get(key), Tensor):
            given[key] = pad(given[key], (0, count), value=int(key == "attention_mask"))
    prompt = read(parts, given, given.get("visual_mask"))
    if prompt.layout.length > LONG:
        warn_once(f"reading {prompt.layout.length} tokens again keeps every layer's keys and queries in memory")
    return prompt


def _keywords(prompt: Prompt) -> dict[str, Any]:
    entry = {"input_ids": prompt.ids} if prompt.embeds is None else {"inputs_embeds": prompt.embeds}
    return {**entry, **prompt.tokens, **prompt.pictures}


def _read(parts: Parts, keywords: Mapping[str, Any]) -> _Reading:
    reading = _Reading(parts)
    with serving(reading):
        parts.top(**keywords, use_cache=False)
    return reading


def _unit_row(prompt: Prompt, row: int) -> Tensor:
    flow = torch.zeros(prompt.layout.kinds.shape, device=prompt.layout.kinds.device)
    flow[:, row] = 1
    return flow


def _rows(look: Look) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a layer's attention [B, H, n, K]."""
    queries = look.query.shape[2]
    for start in range(0, queries, CHUNK):
        part = slice(start, min(start + CHUNK, queries))
        yield part, look.rows(torch.arange(part.start, part.stop, device=look.query.device))


def _relied(look: Look, slope: Tensor, flow: Tensor) -> Tensor:
    """[B, K] flow times the layer's (dy/dA * A)+, mean over heads."""
    total = torch.zeros_like(flow)
    value = look.value.float()
    for part, weights in _rows(look):
        out = slope[:, part].float().unflatten(2, (value.shape[1], -1))  # [B, n, Hkv, H / Hkv, D]
        gradient = torch.einsum("bqgrd,bgkd->bgrqk", out, value).flatten(1, 2)
        total += torch.einsum("bq,bqk->bk", flow[:, part], (gradient * weights).clamp(min=0).mean(1))
    return total
