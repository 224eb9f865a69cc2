"""lmms-eval's requests in our words, without importing lmms-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError

DEFAULT_TOKENS = 1024
"""Token limit of requests that set none, as in lmms-eval's own chat models."""

BLANK_LINE = "\n\n"
"""Stop that lmms-eval puts into every task that sets none; it would cut captions, so it is not obeyed unless asked."""

_PASSED = ("top_p", "top_k", "repetition_penalty")
_HARMLESS = ("image_aspect_ratio",)
_KNOWN = ("max_new_tokens", "max_gen_toks", "temperature", "do_sample", "num_beams", "until", *_PASSED, *_HARMLESS)


@dataclass(frozen=True)
class Asked:
    """One request.

    Args:
        id: task, split, document and repetition; names the draws of sampling.
        images: pictures, in order.
        prompt: the user's text.
        system: system prompt, None if there is none.
    """

    id: str
    images: Sequence[Any]
    prompt: str
    system: str | None = None


def generation(kwargs: Mapping[str, Any], blank_line_stops: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Settings of `vlm.answer` and stop strings from a task's generation kwargs.

    Raises:
        UsageError: for a key that lmms-eval's response cache does not see (a method's hyper-parameter, say): cached
            answers of other settings would be taken for these.
    """
    for key in kwargs:
        if key not in _KNOWN:
            raise UsageError(
                f"gen_kwargs {key!r} is refused: lmms-eval's response cache does not tell its values apart; give "
                'methods and their settings in model_args, as in method="vcd(alpha=1,beta=0.1)"'
            )
    temperature = kwargs.get("temperature")
    sample = bool(kwargs.get("do_sample", bool(temperature))) and temperature != 0
    limit = kwargs.get("max_new_tokens", kwargs.get("max_gen_toks", DEFAULT_TOKENS))
    settings: dict[str, Any] = {"max_new_tokens": int(limit), "do_sample": sample}
    if kwargs.get("num_beams", 1) not in (None, 1):
        settings["num_beams"] = int(kwargs["num_beams"])
    if sample and temperature is not None:
        settings["temperature"] = float(temperature)
    for key in _PASSED:
        if kwargs.get(key) is not None and (sample or key == "repetition_penalty"):
            settings[key] = kwargs[key]
    stops = kwargs.get("until") or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    return settings, [stop for stop in stops if stop and (blank_line_stops or stop != BLANK_LINE)]


def cut(text: str, stops: Sequence[str]) -> str:
    """Text before the first stop string."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def asked(name: str, messages: Sequence[Mapping[str, Any]]) -> Asked:
    """Pictures and texts of chat messages: an optional system turn, then one user turn, pictures before the text.

    Args:
        name: becomes the id, and is named in errors.
        messages: role and content, as a task's doc_to_messages returns them.

    Raises:
        UsageError: for other turns, media that are no pictures, or pictures after text, whose place would be lost.
    """
    turns = [dict(turn) for turn in messages]
    system = _text(turns.pop(0)["content"]) if turns and turns[0]["role"] == "system" else None
    if [turn["role"] for turn in turns] != ["user"]:
        raise UsageError(f"{name}: {len(turns)} turns; vlmfix answers single questions, not conversations")
    content = turns[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    images: list[Any] = []
    texts: list[str] = []
    for part in parts:
        if part["type"] == "text":
            texts.append(part["text"])
        elif part["type"] != "image":
            raise UsageError(f"{name} holds {part['type']}; vlmfix answers questions about pictures")
        elif any(text.strip() for text in texts):
            raise UsageError(f"{name} has pictures between texts, whose places vlmfix cannot keep; leave this task out")
        else:
            images.append(part.get("url", part.get("image")))
    return Asked(name, images, "".join(texts).strip(), system or None)


def recipe_text(method: Any) -> str:
    """The recipe in `method=...`, quotes stripped.

    Raises:
        UsageError: if lmms-eval has cut it at a comma.
    """
    text = str(method).strip().strip("\"'")
    if text.count("(") != text.count(")"):
        raise UsageError(
            f"method {text!r} was cut at a comma; put it in quotes: "
            "--model_args 'model=...,method=\"vcd(alpha=1,beta=0.1)\"'"
        )
    return text


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")
