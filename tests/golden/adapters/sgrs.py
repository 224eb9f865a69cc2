"""SGRS's vectors: saliency rows and scores of candidates, and the decisions made from given saliencies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmfix.api import compile_for
from vlmfix.attention import run, saliency
from vlmfix.decoders import sgrs
from vlmfix.decoders.sgrs import SGRS
from vlmfix.hf.hooks import installed, serving
from vlmfix.recipe import Recipe

from ..cases import close, same
from ..machine import llama

RELATIVE = 1e-5
MUTANTS = {
    "gradient of another candidate": lambda patch: _shifted(patch, saliency, "direction"),
    "query's own key left out": lambda patch: _fewer(patch),
    "threshold doubled": lambda patch: _doubled(patch),
    "first draw always taken": lambda patch: patch.setattr(sgrs, "threshold", lambda h, a, w: h.new_zeros(len(h))),
}


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    if "trace" in case:
        _decisions(case, arrays)
    else:
        _metric(case, arrays)


def _metric(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """The answer is fed token by token after the prompt, as in decoding; its last step is scored."""
    weights = {name.removeprefix("w."): value for name, value in arrays.items() if name.startswith("w.")}
    model = llama(case["model"], weights)
    embeds, mask = arrays["inputs_embeds"], arrays.get("attention_mask")
    mask = torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask.long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    starts = {start for start, _ in case["spans"]["J"]}
    assert len(starts) == 1
    method, traced = SGRS(layers=tuple(case["hyper"]["target_layers"])), _Traced(arrays["candidates"])
    (start,) = starts
    with installed(model, require_pictures=False) as parts:
        compiled = compile_for(parts, Recipe.of(method))
        object.__setattr__(compiled, "decoding", traced.method(compiled.decoding))
        prompt = {
            "inputs_embeds": embeds[:, :start],
            "attention_mask": mask[:, :start],
            "visual_mask": torch.zeros_like(mask[:, :start], dtype=torch.bool),
        }
        request, _ = run.open_request(parts, compiled, prompt)
        cache = request.cache()
        with serving(request), torch.no_grad():
            for a, b in [(0, start), *((i, i + 1) for i in range(start, embeds.shape[1]))]:
                model(
                    inputs_embeds=embeds[:, a:b],
                    attention_mask=mask[:, :b],
                    position_ids=positions[:, a:b],
                    past_key_values=cache,
                    use_cache=True,
                )
    expected = arrays["saliency_norm"][:, :, case["hyper"]["target_layers"]]
    rows = torch.cat([row / row.norm(dim=-1, keepdim=True) for row, _ in traced.rows]).movedim(0, 2)
    close(rows, expected, RELATIVE * float(expected.abs().max()), "normalised saliency rows")
    close(traced.scores, arrays["score"], RELATIVE * float(arrays["score"].abs().max()), "scores")


class _Traced:
    """Asks for the saliency of given candidates at every step and keeps the last answer."""

    def __init__(self, candidates: Tensor) -> None:
        self.candidates = candidates
        self.scores = torch.empty(0)
        self.rows: list[tuple[Tensor, Tensor]] = []

    def method(self, method: Any) -> Any:
        outer = self

        class Asking(SGRS):
            def scores(self, logits: Tensor, step: Any) -> Tensor:
                if step.saliency is not None:
                    original = saliency.Tracer.saliency
                    try:
                        saliency.Tracer.saliency = lambda *args: outer.kept(original(*args))  # type: ignore[method-assign]
                        outer.scores = step.saliency(outer.candidates)
                    finally:
                        saliency.Tracer.saliency = original  # type: ignore[method-assign]
                return logits

        return Asking(**method.settings())

    def kept(self, rows: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        self.rows = rows
        return rows


def _decisions(case: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    hyper, history, chosen = case["hyper"], torch.zeros(1, 0), []
    for t, logits in enumerate(arrays["logits"]):
        probs, tokens = logits[None].softmax(-1).topk(hyper["top_k"])
        entry = case["trace"][t]
        uniforms = entry["uniforms"] + [0.5] * (hyper["max_resample"] - len(entry["uniforms"]))
        tokens = tokens.gather(1, sgrs.drawn(probs, torch.tensor([uniforms])))
        table = arrays["saliency_table"][t][tokens]
        tau = sgrs.threshold(history, hyper["alpha"], hyper["history_window"])
        close(tau, torch.tensor([entry["tau"]]), 1e-6, f"tau of step {t}")
        choice = sgrs.choose(table, tau, hyper["max_resample"])
        history = torch.cat([history, table.gather(1, choice[:, None])], 1)
        chosen.append(int(tokens[0, choice[0]]))
    same(torch.tensor(chosen), arrays["chosen"].view(-1).long(), "committed tokens")


def _shifted(patch: Any, module: Any, name: str) -> None:
    original = getattr(module, name)
    patch.setattr(module, name, lambda logits, candidates: original(logits, candidates.roll(1, 1)))


def _fewer(patch: Any) -> None:
    def without_own(rows: Tensor, counted: Tensor) -> Tensor:
        counted = counted.clone()
        counted[..., -1] = False
        return saliency.score(rows, counted)

    from vlmfix.attention import request

    patch.setattr(request, "score", without_own)


def _doubled(patch: Any) -> None:
    original = sgrs.threshold
    patch.setattr(sgrs, "threshold", lambda h, a, w: 2 * original(h, a, w))
