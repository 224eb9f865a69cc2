"""Picture protocols: the processor as shipped (`hf`), or what the model's paper did around it (`paper`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError

NAMES = ("hf", "paper")


@dataclass(frozen=True)
class Protocol:
    """What stands around picture and question.

    Args:
        pad: whether pictures are padded to squares, with the mean colour of the processor.
        system: system prompt; None for the template's own.
        short: appended to questions that want a word or two, unless the benchmark appends something itself.
        source: where this is from.
    """

    pad: bool = False
    system: str | None = None
    short: str = ""
    source: str = ""


HF = Protocol(source="the checkpoint's processor and chat template as shipped")
PAPER: Mapping[str, Protocol] = {
    "llava": Protocol(
        pad=True,
        system=(
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions."
        ),
        short="\nAnswer the question using a single word or phrase.",
        source="LLaVA-1.5, arXiv 2310.03744: conversation vicuna_v1, image_aspect_ratio pad, its short-answer prompt",
    ),
    "instructblip": Protocol(source="InstructBLIP, arXiv 2305.06500: the question alone, pictures resized to squares"),
    "qwen": Protocol(short=" Answer:", source="Qwen-VL, arXiv 2308.12966: its evaluation's prompt for short answers"),
}
"""transformers model type -> protocol."""


def find(name: str, family: str) -> Protocol:
    """The protocol of a name for a family of models.

    Raises:
        UsageError: for `paper` where no preset is known.
    """
    if name == "hf":
        return HF
    if family not in PAPER:
        raise UsageError(f"no paper protocol is known for {family}; known: {', '.join(PAPER)}; use the protocol hf")
    return PAPER[family]


def opener(protocol: Protocol, processor: Mapping[str, Any], pictures: Callable[[str], Any] | None) -> Any:
    """How pictures are opened under a protocol.

    Args:
        protocol: the protocol.
        processor: the processor's resolved configuration.
        pictures: picture name -> file or picture; names are files if None.

    Raises:
        UsageError: if the processor does not tell the mean colour that padding needs.
    """
    if not protocol.pad:
        return pictures
    mean = processor.get("image_processor", processor).get("image_mean")
    if mean is None:
        raise UsageError("padding to squares needs image_mean in the processor's configuration; use the protocol hf")
    colour = tuple(int(255 * x) for x in mean)
    return lambda name: squared(pictures(name) if pictures else name, colour)


def squared(picture: Any, colour: tuple[int, ...]) -> Any:
    """A picture (or picture file) centred on a square of one colour, its longer side unchanged."""
    from PIL import Image

    from ..pictures import load

    image = picture if isinstance(picture, Image.Image) else load(picture)
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
