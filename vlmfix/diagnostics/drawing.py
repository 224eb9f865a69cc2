"""Pictures of diagnostics: heat map over the picture, layer by head matrix, curve over tokens."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from vlmfix.diagnostics.canvas import INK, Box, Drawing, Label, Photo, Stroke, blend
from vlmfix.errors import UsageError

SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From small to large; readable in grey and for most colour-blind eyes."""

HUES = ((11, 98, 168), (194, 87, 12), (107, 63, 160), (26, 127, 55), (168, 50, 107), (122, 106, 0))
SHADE = (253, 226, 226)
BARE = (225, 225, 225)
LEGEND = 160


def heat_map(
    picture: Image.Image,
    values: Tensor,
    low: float | None = None,
    high: float | None = None,
    opacity: float = 0.55,
    title: str = "",
) -> Drawing:
    """Values of visual tokens laid over the picture, with the range of the colours beneath.

    Give pictures that are to be compared the same range; colours of different ranges mean different things.

    Args:
        picture: the picture, as it was given to the model.
        values: [rows, columns] on the grid of visual tokens.
        low: value of the darkest colour; the smallest by default.
        high: value of the brightest colour; the largest by default.
        opacity: of the colours, 0 to 1.
        title: a line above.

    Raises:
        UsageError: values that are no grid, or not numbers.
    """
    if values.dim() != 2 or not bool(values.isfinite().all()):
        raise UsageError(
            f"heat_map needs a grid of finite values, not {tuple(values.shape)}; reshape a row's visual columns"
        )
    low, high = _range(values, low, high)
    size = (picture.height, picture.width)
    smooth = torch.nn.functional.interpolate(values[None, None].float(), size, mode="bilinear", antialias=True)[0, 0]
    shares = ((smooth - low) / (high - low)).clamp(0, 1)
    table = torch.tensor([blend(SCALE, i / 255) for i in range(256)], dtype=torch.uint8)
    colours = Image.fromarray(table[(shares * 255).round().long()].numpy())
    over = Image.blend(picture.convert("RGB"), colours, opacity)
    drawing = Drawing(max(picture.width + 20, _width(title)), picture.height + 60)
    drawing.add(Label(10, 18, title), Photo(10, 26, over))
    _legend(drawing, 10, picture.height + 34, min(picture.width, LEGEND), low, high)
    return drawing


def head_matrix(
    values: Tensor,
    layers: Sequence[int] | None = None,
    chosen: Collection[tuple[int, int]] = (),
    group: int = 0,
    low: float | None = None,
    high: float | None = None,
    title: str = "",
) -> Drawing:
    """One number per layer and head: layers downwards, heads across.

    Args:
        values: [L, H]; nan is left grey.
        layers: names of the L layers; 0, 1, ... by default.
        chosen: (row, head) pairs that get a frame.
        group: heads that share a key, set apart; none by default.
        low: value of the darkest colour; the smallest by default.
        high: value of the brightest colour; the largest by default.
        title: a line above.
    """
    rows, heads = values.shape
    names = range(rows) if layers is None else layers
    low, high = _range(values, low, high)
    side, gap = 14, 4 if group else 0
    left, top = 46, 44
    width = left + max(heads * side + (heads - 1) // max(group, 1) * gap, LEGEND + 10) + 20
    drawing = Drawing(max(width, _width(title)), top + rows * side + 56)
    drawing.add(
        Label(10, 18, title), Label(left, top - 6, "head"), Label(14, top + rows * side / 2, "layer", "middle", True)
    )
    for row, name in enumerate(names):
        drawing.add(Label(left - 6, top + row * side + 11, str(name), "end"))
        for head in range(heads):
            x, y = left + head * side + (head // group * gap if group else 0), top + row * side
            value = float(values[row, head])
            colour = BARE if math.isnan(value) else blend(SCALE, (value - low) / (high - low))
            drawing.add(Box(x, y, side - 1, side - 1, colour))
            if (row, head) in chosen:
                end = side - 1
                drawing.add(Stroke(((x, y), (x + end, y), (x + end, y + end), (x, y + end), (x, y)), (200, 0, 0), 2))
    _legend(drawing, left, top + rows * side + 12, LEGEND, low, high)
    return drawing


def curve(
    tokens: Sequence[str],
    series: Mapping[str, Sequence[float]],
    shaded: Collection[int] = (),
    title: str = "",
    mark: float | None = None,
) -> Drawing:
    """Measures over generated tokens, one line each.

    Args:
        tokens: text of each token.
        series: name -> a value per token; nan breaks the line.
        shaded: tokens to shade, hallucinated ones for instance.
        title: a line above.
        mark: a value at which a level line is drawn.

    Raises:
        UsageError: a series of another length.
    """
    for name, values in series.items():
        if len(values) != len(tokens):
            raise UsageError(f"curve: {name!r} has {len(values)} values for {len(tokens)} tokens")
    flat = torch.tensor([list(values) for values in series.values()] or [[0.0]])
    ends = torch.cat([flat.flatten(), torch.tensor([] if mark is None else [mark])])
    low, high = _range(ends, None, None)
    step, left, top, height = 26, 60, 40, 180
    width = max(step * max(len(tokens) - 1, 1), 120)
    drawing = Drawing(max(left + width + 40, _width(title)), top + height + 110 + 16 * len(series))

    def place(i: int, value: float) -> tuple[float, float]:
        return left + step * i, top + height * (1 - (value - low) / (high - low))

    drawing.add(Label(10, 18, title))
    drawing.add(*(Box(left + step * i - step / 2, top, step, height, SHADE) for i in shaded))
    for value in (low, (low + high) / 2, high):
        y = place(0, value)[1]
        drawing.add(Stroke(((left - 4, y), (left + width, y)), BARE), Label(left - 8, y + 4, f"{value:.3g}", "end"))
    if mark is not None:
        drawing.add(Stroke((place(0, mark), (left + width, place(0, mark)[1])), INK))
    for i, token in enumerate(tokens):
        drawing.add(Label(left + step * i + 4, top + height + 10, token.strip() or "␣", "end", True))
    for number, (name, values) in enumerate(series.items()):
        colour = HUES[number % len(HUES)]
        for i in range(len(values) - 1):
            if math.isfinite(values[i]) and math.isfinite(values[i + 1]):
                drawing.add(Stroke((place(i, values[i]), place(i + 1, values[i + 1])), colour, 2))
        y = top + height + 96 + 16 * number
        drawing.add(Stroke(((left, y), (left + 20, y)), colour, 2), Label(left + 26, y + 4, name))
    return drawing


def _range(values: Tensor, low: float | None, high: float | None) -> tuple[float, float]:
    finite = values[values.isfinite()]
    low = (float(finite.min()) if len(finite) else 0.0) if low is None else low
    high = (float(finite.max()) if len(finite) else 1.0) if high is None else high
    return low, high if high > low else low + 1.0


def _width(title: str) -> int:
    """Room that a title needs, roughly."""
    return 20 + 7 * len(title)


def _legend(drawing: Drawing, x: float, y: float, width: float, low: float, high: float) -> None:
    steps = 32
    boxes = (Box(x + width * i / steps, y, width / steps + 1, 10, blend(SCALE, i / (steps - 1))) for i in range(steps))
    drawing.add(*boxes, Label(x, y + 23, f"{low:.3g}"), Label(x + width, y + 23, f"{high:.3g}", "end"))
