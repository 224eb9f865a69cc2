"""One call of transformers' generate under a compiled recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmfix.attention.compiled import Compiled
from vlmfix.attention.counterfactual import PackedText, TextRows
from vlmfix.attention.late import LatePrompt
from vlmfix.attention.request import Request, rewritten
from vlmfix.errors import Refusal
from vlmfix.hf import settings
from vlmfix.hf.branching import Joint, join, rope_kept
from vlmfix.hf.hooks import serving
from vlmfix.hf.inputs import TOKEN_KEYS, Prompt, edit, read
from vlmfix.hf.parts import Parts
from vlmfix.hf.reader import Reader
from vlmfix.kernels.dispatch import on_device
from vlmfix.view import View


def open_request(
    parts: Parts, compiled: Compiled, inputs: dict[str, Any], global_tile: int | None = None
) -> tuple[Request, Prompt]:
    """Reads the inputs of a generation and makes its state."""
    prompt = read(parts, inputs, inputs.get("visual_mask"), global_tile)
    mask = inputs.get("attention_mask")
    if (compiled.late or compiled.views) and mask is not None and mask.dim() != 2:
        raise Refusal("branch rows need masks of their own, which a 4D attention_mask does not tell; give the 2D mask")
    joint, late = None, None
    if rewritten(compiled, prompt.layout):
        late = LatePrompt.of(parts, compiled, prompt) if compiled.late else None
        joint = join(parts, prompt, compiled.views) if compiled.views else None
    view, counterfactual = compiled.without_pictures, None
    if view is not None and bool(prompt.layout.visual.any()):
        counterfactual, joint = _without_pictures(parts, compiled, prompt, view, joint, late)
    request = Request(parts, compiled, prompt.layout, joint, late, counterfactual)
    if joint is None and late is None:
        request.inputs, request.layers.ids = prompt.pictures, prompt.ids
    if compiled.reads is not None and request.rows_rewritten:
        if prompt.ids is None:
            raise Refusal("inputs_embeds hide the text that a language model of its own would read; pass input_ids")
        model, view = compiled.reads
        request.reader = Reader(model, edit(parts, prompt, view).ids, prompt.ids.device)
    return request, prompt


def _without_pictures(
    parts: Parts, compiled: Compiled, prompt: Prompt, view: View, joint: Joint | None, late: LatePrompt | None
) -> tuple[PackedText | TextRows, Joint | None]:
    """How the prefill also runs the prompt without pictures, and the joint prompt that then holds its rows."""
    if compiled.packed:
        return PackedText(parts, prompt, view), joint
    if late is not None:
        raise Refusal(
            f"{parts.family}: both methods of this recipe run rows of their own beside the prompt; choose one of them"
        )
    views = compiled.views if joint is not None else ()
    joint = join(parts, prompt, [*views, view])
    return TextRows(prompt.layout.rows, joint.layout.rows), joint


def generate(
    parts: Parts, compiled: Compiled, call: Callable[..., Any], kwargs: dict[str, Any], global_tile: int | None = None
) -> tuple[Any, Request]:
    """Runs generate so that the caller sees only visible rows and transformers' own result.

    Args:
        parts: the model, installed.
        compiled: a recipe that is not plain.
        call: the model's generate.
        kwargs: its keywords; `visual_mask` [B, K] tells where pictures stand when inputs_embeds are given.
        global_tile: see `hf.inputs.read`.

    Returns:
        generate's result and the request, for the run report.
    """
    kwargs, config = settings.spelled_out(kwargs), parts.model.generation_config
    more_rows = compiled.without_pictures is not None and not compiled.packed
    branches = compiled.late or bool(compiled.views) or more_rows or compiled.reads is not None
    settings.refuse(kwargs, branches, config, compiled.late, bool(compiled.saliency_layers))
    beams = settings.effective("num_beams", kwargs, config) or 1
    if compiled.decoding is not None and not compiled.decoding.beams and beams > 1:
        raise Refusal("this method decides token by token and does not go with num_beams > 1; leave num_beams out")
    request, prompt = open_request(parts, compiled, kwargs, global_tile)
    kwargs = {k: v for k, v in kwargs.items() if k != "visual_mask"}
    room = request.extra_length and settings.effective("cache_implementation", kwargs, config) == "static"
    if request.copies > 1 and not request.parts.embeds:
        kwargs = _without_pictures_of(prompt, kwargs)
    follows = any(method.follows_rows for method in compiled.attention)
    if follows and beams > 1 and kwargs.get("past_key_values") is not None:
        raise Refusal(
            "what is noted of generated tokens moves with beams in a cache of ours; do not pass past_key_values"
        )
    own = request.copies > 1 or request.reader is not None or bool(room) or (follows and beams > 1)
    if own and (parts.embeds or settings.effective("use_cache", kwargs, config) is not False):  # embeddings need it
        kwargs = _own_cache(request, prompt, kwargs, config)
    with serving(request), rope_kept(parts.model), on_device(parts.device):
        return call(**kwargs), request


def _without_pictures_of(prompt: Prompt, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keeps pictures away from generate, which would encode and repeat them: the joint prefill brings them itself."""
    dropped = {*prompt.pictures, *TOKEN_KEYS} - {"attention_mask"}
    return {k: v for k, v in kwargs.items() if k not in dropped}


def _own_cache(request: Request, prompt: Prompt, kwargs: dict[str, Any], config: Any) -> dict[str, Any]:
    """A cache for all rows of the request, with room for what it adds to the prompt."""
    static = settings.effective("cache_implementation", kwargs, config) == "static"
    new = settings.effective("max_new_tokens", kwargs, config) or 20
    total = settings.effective("max_length", kwargs, config) or 0
    length = max(total, prompt.layout.length + new) + request.extra_length if static else None
    return {**kwargs, "cache_implementation": None, "past_key_values": request.cache(length)}
