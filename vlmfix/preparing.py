"""What every way in needs first: the bare model, the compiled recipe, the report."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmfix import registry
from vlmfix.attention.compiled import Compiled
from vlmfix.attention.request import NO_PICTURE, OWN, Request
from vlmfix.engine import search
from vlmfix.errors import Refusal
from vlmfix.hf.batches import Batcher
from vlmfix.hf.cache import only_full_attention
from vlmfix.hf.families import CROSSING, FAMILIES, UNBRANCHED
from vlmfix.hf.inputs import mask_kind
from vlmfix.hf.parts import Parts
from vlmfix.hf.sinks import sink_dims
from vlmfix.layout import MaskKind
from vlmfix.method import ModelFacts
from vlmfix.presets import preset
from vlmfix.recipe import Recipe


def compile_for(parts: Parts, recipe: Recipe, processor: Any = None) -> Compiled:
    """Compiles a recipe for an installed model, with the presets of its checkpoint."""
    config = parts.text_config
    tokenizer = getattr(processor, "tokenizer", None)
    facts = ModelFacts(
        family=parts.family,
        depth=parts.depth,
        heads=parts.heads,
        hidden_size=parts.hidden_size,
        softcap=getattr(config, "attn_logit_softcapping", None) is not None,
        prefix=mask_kind(parts.family) == MaskKind.PREFIX,
        crossing=parts.family in CROSSING,
        class_attention=bool(parts.tower),
        packable=mask_kind(parts.family) == MaskKind.CAUSAL and only_full_attention(config),
        unbranched=FAMILIES[parts.family].branches if parts.family in UNBRANCHED else "",
        sink_dims=lambda: sink_dims(parts, tokenizer),
        tokenize=None
        if tokenizer is None
        else lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
        rendering=None if processor is None else Batcher(parts, processor),
    )
    return recipe.compile(facts, preset(getattr(parts.model.config, "_name_or_path", "") or ""))


def bare(model: nn.Module) -> nn.Module:
    """The model under wrappers that only forward to it.

    Raises:
        Refusal: a compiled model, whose graph would not contain the recipe.
    """
    if hasattr(model, "_orig_mod"):
        raise Refusal("the model was compiled with torch.compile; give the model itself, before compilation")
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def refuse_tensors(compiled: Compiled) -> None:
    """Refuses recipes that need pictures and whole answers where there are only tensors."""
    for method in compiled.pictures:
        raise Refusal(
            f"{registry.name_of(method)} redraws the picture itself and cannot act on a processor's tensors "
            f"({compiled.facts.family}); call answer(images, prompts)"
        )
    if compiled.answer is not None:
        raise Refusal(
            f"{registry.name_of(compiled.answer)} cuts the picture and settles whole answers, and cannot act on a "
            f"processor's tensors ({compiled.facts.family}); call answer(images, prompts)"
        )


def report_of(
    recipe: Recipe, parts: Parts, compiled: Compiled, request: Request | None, overridden: dict[str, Any]
) -> dict[str, Any]:
    """What acted where in one run, in plain values."""
    report: dict[str, Any] = {
        "recipe": str(recipe),
        "recipe_hash": recipe.hash,
        "evidence": recipe.evidence,
        "family": parts.family,
        "neutral": list(compiled.dropped),
        "overridden_generation_config": overridden,
    }
    if request is None:
        return report
    report["visual_tokens"] = request.visual_tokens
    report["pictures"] = request.pictures
    report["branches"] = request.copies - 1
    report["methods"] = {
        registry.name_of(method): {
            "layers": sorted(request.layers.layers_touched[i]),
            "heads": sorted({parts.heads[x] for x in request.layers.layers_touched[i]}),
            "rows": request.layers.rows_affected[i],
            **({} if request.layers.layers_touched[i] else {"inactive": request.why_inactive(i)}),
        }
        for i, method in enumerate(compiled.attention)
        if i not in compiled.own
    }
    if compiled.decoding is not None:
        rows = request.rows_rewritten
        touched = set().union(*(request.layers.layers_touched[i] for i in compiled.own))
        returns = request.layers.notes.get(OWN, {}).get(search.RETURNS)
        report["methods"][registry.name_of(compiled.decoding)] = {
            "rows": rows,
            "steps": request.steps,
            **({"layers": sorted(touched)} if touched else {}),
            **({} if returns is None else {search.RETURNS: returns.tolist()}),
            **({} if rows else {"inactive": NO_PICTURE}),
        }
    return report
