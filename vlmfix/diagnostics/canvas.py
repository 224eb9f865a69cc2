"""A small drawing that is written as SVG or as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmfix.errors import UsageError

Colour = tuple[int, int, int]
Point = tuple[float, float]
INK: Colour = (40, 40, 40)
SIZE = 12


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: Colour


@dataclass(frozen=True)
class Stroke:
    """A line through points."""

    points: tuple[Point, ...]
    colour: Colour
    width: float = 1.0


@dataclass(frozen=True)
class Label:
    """A line of text; `anchor` is "start", "middle" or "end", y its baseline."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    turned: bool = False


@dataclass(frozen=True)
class Photo:
    """A picture."""

    x: float
    y: float
    image: Image.Image


@dataclass
class Drawing:
    """Shapes in the order in which they are painted.

    Args:
        width: in pixels.
        height: in pixels.
    """

    width: int
    height: int
    shapes: list[Box | Stroke | Label | Photo] = field(default_factory=list)

    def add(self, *shapes: Box | Stroke | Label | Photo) -> None:
        """Paints shapes on top."""
        self.shapes += shapes

    def svg(self) -> str:
        """The drawing as SVG."""
        size = f'width="{self.width}" height="{self.height}"'
        parts = [_element(shape) for shape in self.shapes]
        style = f'font-family="sans-serif" font-size="{SIZE}"'
        page = f'<rect {size} fill="white"/>'
        return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', page, *parts, "</svg>", ""])

    def image(self) -> Image.Image:
        """The drawing as an RGB picture."""
        page = Image.new("RGB", (self.width, self.height), "white")
        for shape in self.shapes:
            _paint(page, shape)
        return page

    def save(self, path: str | Path) -> None:
        """Writes SVG or PNG, as the ending says.

        Raises:
            UsageError: another ending.
        """
        path = Path(path)
        if path.suffix.lower() == ".svg":
            path.write_text(self.svg(), encoding="utf-8")
        elif path.suffix.lower() == ".png":
            self.image().save(path)
        else:
            raise UsageError(f"{path}: drawings are written as .svg or .png")


def _element(shape: Box | Stroke | Label | Photo) -> str:
    if isinstance(shape, Box):
        where = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
        return f'<rect {where} fill="{_hex(shape.colour)}"/>'
    if isinstance(shape, Stroke):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in shape.points)
        return f'<polyline points="{points}" fill="none" stroke="{_hex(shape.colour)}" stroke-width="{shape.width:g}"/>'
    if isinstance(shape, Label):
        turn = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.turned else ""
        where = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}"'
        return f'<text {where} fill="{_hex(INK)}"{turn}>{escape(shape.text)}</text>'
    stream = io.BytesIO()
    shape.image.save(stream, "PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    size = f'width="{shape.image.width}" height="{shape.image.height}"'
    return f'<image x="{shape.x:.1f}" y="{shape.y:.1f}" {size} href="data:image/png;base64,{data}"/>'


def _paint(page: Image.Image, shape: Box | Stroke | Label | Photo) -> None:
    pen = ImageDraw.Draw(page)
    if isinstance(shape, Box):
        corner = (shape.x + max(shape.width - 1, 0), shape.y + max(shape.height - 1, 0))
        pen.rectangle(((shape.x, shape.y), corner), fill=shape.colour)
    elif isinstance(shape, Stroke):
        pen.line([(x, y) for x, y in shape.points], fill=shape.colour, width=max(round(shape.width), 1))
    elif isinstance(shape, Photo):
        page.paste(shape.image.convert("RGB"), (round(shape.x), round(shape.y)))
    elif shape.turned:
        _turned(page, shape)
    else:
        pen.text(
            (shape.x, shape.y), shape.text, INK, _font(), anchor={"start": "ls", "middle": "ms"}.get(shape.anchor, "rs")
        )


def _turned(page: Image.Image, label: Label) -> None:
    width = round(_font().getlength(label.text)) + 2
    slip = Image.new("RGB", (width, SIZE + 4), "white")
    ImageDraw.Draw(slip).text((0, SIZE), label.text, INK, _font(), anchor="ls")
    turned = slip.rotate(90, expand=True)
    up = {"start": width, "middle": width / 2, "end": 0}[label.anchor]
    page.paste(turned, (round(label.x - SIZE), round(label.y - up)))


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(SIZE)


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)


def blend(anchors: Sequence[Colour], share: float) -> Colour:
    """A colour on a scale of colours, `share` from 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(anchors) - 1)
    low = min(int(place), len(anchors) - 2)
    pairs = zip(anchors[low], anchors[low + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - low)) for a, b in pairs)
    return red, green, blue
