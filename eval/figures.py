"""Figures as small hand-written SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import floor, isfinite, log10

from ..errors import UsageError
from .compare import Comparison
from .judge import direction

_STYLE = "font-family='sans-serif' font-size='12'"
_INK = {"better": "#1a7f37", "worse": "#b42318", "": "#444"}
_HUES = ("#0b62a8", "#c2570c", "#6b3fa0", "#1a7f37", "#a8326b", "#7a6a00", "#3b7d8c", "#8a4b2d")

Point = tuple[float, float, str]
"""x, y and label."""


def forest(comparison: Comparison, metric: str | None = None) -> str:
    """Forest plot: each row's paired difference to the reference with its interval.

    Args:
        comparison: what `compare` returned.
        metric: the headline by default.

    Raises:
        UsageError: for an unknown metric, or if no row has a difference.
    """
    name = metric or comparison.metrics[0]
    shown = [
        (line.name, line.cells[name], gap)
        for line in comparison.lines
        if name in line.cells and (gap := line.cells[name].difference) and isfinite(gap.difference)
    ]
    if not shown:
        raise UsageError(f"no row has a difference in {name!r}; known: {', '.join(comparison.metrics)}")
    ends = [x for _, _, gap in shown for x in (gap.low, gap.high, gap.difference, 0.0) if isfinite(x)]
    ticks = _ticks(min(ends), max(ends))
    left, width, step = 220, 420, 26
    height = 60 + step * len(shown)

    def x(value: float) -> float:
        return left + width * (value - ticks[0]) / (ticks[-1] - ticks[0])

    good = {1: "better: right", -1: "better: left", 0: ""}[direction(name)]
    parts = [
        _text(left, 16, f"{name}: difference to {comparison.lines[0].name}, {comparison.level:.0%} interval; {good}")
    ]
    for tick in ticks:
        parts.append(_line(x(tick), 26, x(tick), height - 24, "#ddd"))
        parts.append(_text(x(tick), height - 8, f"{tick:g}", "middle"))
    parts.append(_line(x(0), 26, x(0), height - 24, "#888"))
    for place, (label, cell, gap) in enumerate(shown):
        y, ink = 42 + step * place, _INK[cell.verdict]
        parts.append(_text(left - 10, y + 4, label, "end"))
        if isfinite(gap.low):
            parts.append(_line(x(gap.low), y, x(gap.high), y, ink, 2))
        parts.append(f"<circle cx='{x(gap.difference):.1f}' cy='{y}' r='4' fill='{ink}'/>")
        parts.append(_text(left + width + 10, y + 4, f"{gap.difference:+.1f}"))
    return _svg(left + width + 70, height, parts)


def frontier(
    curves: Mapping[str, Sequence[Point]],
    reference: Sequence[Point] = (),
    x_label: str = "recall",
    y_label: str = "chair_i",
) -> str:
    """Frontier curves: hallucination against recall while a strength is swept.

    Args:
        curves: method -> points (recall, hallucination, strength) in order of the strength.
        reference: points of truncated greedy answers, drawn dashed.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.

    Raises:
        UsageError: without any finite point.
    """
    named = {"greedy, truncated": list(reference), **{k: list(v) for k, v in curves.items()}}
    named = {k: [p for p in v if isfinite(p[0]) and isfinite(p[1])] for k, v in named.items()}
    points = [p for v in named.values() for p in v]
    if not points:
        raise UsageError("nothing to draw: no curve has a defined point")
    across, up = _ticks(*_ends(p[0] for p in points)), _ticks(*_ends(p[1] for p in points))
    left, top, width, height = 60, 30, 440, 320

    def at(p: Point) -> tuple[float, float]:
        x = left + width * (p[0] - across[0]) / (across[-1] - across[0])
        return x, top + height * (up[-1] - p[1]) / (up[-1] - up[0])

    parts = [_text(left + width / 2, top + height + 40, x_label, "middle"), _text(8, 16, y_label)]
    for tick in across:
        x, _ = at((tick, up[0], ""))
        parts += [_line(x, top, x, top + height, "#eee"), _text(x, top + height + 18, f"{tick:g}", "middle")]
    for tick in up:
        _, y = at((across[0], tick, ""))
        parts += [_line(left, y, left + width, y, "#eee"), _text(left - 8, y + 4, f"{tick:g}", "end")]
    for place, (label, curve) in enumerate((k, v) for k, v in named.items() if v):
        dashed = label == "greedy, truncated"
        ink = "#888" if dashed else _HUES[place % len(_HUES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, curve))
        dash = " stroke-dasharray='5 4'" if dashed else ""
        parts.append(f"<polyline points='{path}' fill='none' stroke='{ink}' stroke-width='1.5'{dash}/>")
        for point in curve:
            x, y = at(point)
            parts.append(
                f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{ink}'><title>{escape(point[2])}</title></circle>"
            )
        parts.append(_text(left + width + 12, top + 14 + 18 * place, label, "start", ink))
    return _svg(left + width + 200, top + height + 50, parts)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that enclose the range."""
    span = (high - low) or abs(high) or 1.0
    raw = span / 4
    step = 10 ** floor(log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw)
    start = floor(low / step)
    ticks = [start * step]
    while ticks[-1] < high or len(ticks) < 2:
        start += 1
        ticks.append(start * step)
    return [round(tick, 10) for tick in ticks]


def _line(x1: float, y1: float, x2: float, y2: float, ink: str, width: float = 1) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{ink}' stroke-width='{width}'/>"


def _text(x: float, y: float, text: str, anchor: str = "start", ink: str = "#222") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{ink}'>{escape(text)}</text>"


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f"width='{width:g}' height='{height:g}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' {size} {_STYLE}>"
    return "\n".join([head, f"<rect {size} fill='white'/>", *parts, "</svg>"]) + "\n"
