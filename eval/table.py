"""A comparison as a table: for the terminal, Markdown, LaTeX and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, nearest
from .compare import Cell, Comparison
from .judge import direction

if TYPE_CHECKING:
    from rich.table import Table as RichTable

ALWAYS = (
    "recall", "f1", "length", "rep_4", "distinct_4", "unparsed", "empty", "yes_ratio",
    "ms_per_token", "prefill_ms", "peak_mib", "extra_rows",
)  # fmt: skip
"""Guard columns of every table, blank where a benchmark lacks them."""
_GUARDS = frozenset((*ALWAYS, "distinct_1", "rep_1"))
_UNDEFINED = "undefined"
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}


@dataclass(frozen=True)
class Entry:
    """One printed cell.

    Args:
        text: the figure, a name, or nothing.
        change: difference and interval; empty in the reference row.
        verdict: `better`, `worse` or empty.
    """

    text: str
    change: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Table:
    """What every output format prints: a title, headings, rows of entries, notes and warnings."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Entry]]
    notes: Sequence[str]
    warnings: Sequence[str]


def build(comparison: Comparison, metrics: Sequence[str] | None = None) -> Table:
    """Lays a comparison out.

    Args:
        comparison: what `compare` returned.
        metrics: the benchmark's columns to print; all but variants in brackets by default. The guard columns follow.

    Raises:
        UsageError: for a metric that the comparison does not have.
    """
    chosen = [name for name in comparison.metrics if "[" not in name] if metrics is None else list(metrics)
    for name in chosen:
        if name not in comparison.metrics:
            raise UsageError(f"no metric {name!r} in this table{nearest(name, comparison.metrics)}")
    guards = [name for name in ALWAYS if name not in chosen]
    guards += [name for name in comparison.guards if name not in (*chosen, *guards)]
    rows = [
        [
            Entry(line.name),
            Entry(line.kind),
            Entry(line.grade),
            *(_entry(line.cells.get(name)) for name in chosen),
            *(Entry(_entry(line.cells.get(name)).text.replace(_UNDEFINED, "")) for name in guards),
        ]
        for line in comparison.lines
    ]
    heads = ["method", "kind", "evidence", *(_arrow(name) for name in chosen), *guards]
    warnings = [f"{line.name}: {text}" for line in comparison.lines for text in line.warnings]
    return Table(comparison.title, heads, rows, _notes(comparison, chosen), warnings)


def markdown(table: Table) -> str:
    """Markdown: better in bold, worse marked with †."""

    def cell(entry: Entry) -> str:
        text = " ".join(filter(None, [_marked(entry, "**", "**"), entry.change]))
        return text.replace("|", "\\|")

    lines = [f"**{table.title}**", "", "| " + " | ".join(table.heads) + " |"]
    lines.append("|" + "|".join(["---"] * 3 + ["---:"] * (len(table.heads) - 3)) + "|")
    lines += ["| " + " | ".join(cell(entry) for entry in row) + " |" for row in table.rows]
    lines += ["", *(f"- {note}" for note in table.notes), *(f"- Warning: {text}" for text in table.warnings)]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """A LaTeX `tabular` (package booktabs); notes and warnings as comments."""

    def cell(entry: Entry) -> str:
        text = _escape(entry.text)
        text = f"\\textbf{{{text}}}" if entry.verdict == "better" else text + ("$^\\dagger$" if entry.verdict else "")
        return text + (f" {{\\scriptsize {_escape(entry.change)}}}" if entry.change else "")

    heads = " & ".join(_escape(head).replace("↑", "$\\uparrow$").replace("↓", "$\\downarrow$") for head in table.heads)
    lines = [
        f"% {table.title}",
        "\\begin{tabular}{lll" + "r" * (len(table.heads) - 3) + "}",
        "\\toprule",
        heads + r" \\",
        "\\midrule",
    ]
    lines += [" & ".join(cell(entry) for entry in row) + r" \\" for row in table.rows]
    lines += ["\\bottomrule", "\\end{tabular}", *(f"% {note}" for note in (*table.notes, *table.warnings))]
    return "\n".join(lines) + "\n"


def rich_table(table: Table) -> RichTable:
    """A table for the terminal; better in bold green, worse in red with †."""
    from rich.table import Table as RichTable
    from rich.text import Text

    result = RichTable(title=table.title, caption="\n".join([*table.notes, *(f"⚠ {w}" for w in table.warnings)]))
    result.caption_justify = "left"
    for place, head in enumerate(table.heads):
        words = head in ("method", "kind", "evidence")
        result.add_column(head, justify="left" if words else "right", overflow="fold", no_wrap=place > 0)
    for row in table.rows:
        cells = []
        for entry in row:
            text = Text(_marked(entry, "", ""), style={"better": "bold green", "worse": "red"}.get(entry.verdict, ""))
            change = entry.change.strip("()").replace(" [", "\n[").replace(", ", " ")
            cells.append(text + Text(f"\n{change}", style="dim") if change else text)
        result.add_row(*cells)
    return result


def halves(table: Table) -> tuple[Table, Table]:
    """A table in two that fit on a terminal: the benchmark's metrics, then the guard columns with the notes."""
    guards = [place for place, head in enumerate(table.heads) if head in _GUARDS and place > 2]
    front = [place for place in range(len(table.heads)) if place not in guards]
    first, second = (
        Table(
            table.title,
            [table.heads[place] for place in kept],
            [[row[place] for place in kept] for row in table.rows],
            (),
            (),
        )
        for kept in (front, [0, *guards])
    )
    return first, replace(second, title="guards and cost", notes=table.notes, warnings=table.warnings)


def as_json(comparison: Comparison) -> str:
    """Every figure, difference, interval, p value and detectable difference; undefined numbers are null."""
    return json.dumps(_plain(asdict(comparison)), indent=1, ensure_ascii=False) + "\n"


def _entry(cell: Cell | None) -> Entry:
    if cell is None or not isfinite(cell.value):
        return Entry("" if cell is None else _UNDEFINED)
    gap, change = cell.difference, ""
    if gap is not None and isfinite(gap.difference):
        ends = f" [{gap.low:+.1f}, {gap.high:+.1f}]" if isfinite(gap.low) else ""
        change = f"({gap.difference:+.1f}{ends})"
    return Entry(f"{cell.value:.1f}", change, cell.verdict)


def _marked(entry: Entry, before: str, after: str) -> str:
    return f"{before}{entry.text}{after}" if entry.verdict == "better" else entry.text + ("†" if entry.verdict else "")


def _arrow(metric: str) -> str:
    return metric + {1: " ↑", -1: " ↓", 0: ""}[direction(metric)]


def _notes(comparison: Comparison, metrics: Sequence[str]) -> list[str]:
    first = comparison.lines[0].name
    size = f"{comparison.items} items on {comparison.pictures} pictures"
    notes = [
        f"{size}; in brackets the paired difference to {first} "
        f"with its {comparison.level:.0%} bootstrap interval over pictures"
    ]
    if comparison.tests:
        notes.append(
            f"bold: better, †: worse than {first}, by sign-flip tests over pictures after Holm's correction of "
            f"{comparison.tests} tests, and not below the smallest detectable difference"
        )
    found = {
        name: max(gaps)
        for name in metrics
        if (gaps := [c.difference.detectable for line in comparison.lines
                     if (c := line.cells.get(name)) and c.difference and isfinite(c.difference.detectable)])
    }  # fmt: skip
    if found:
        notes.append(
            "smallest detectable difference (80 % power): " + ", ".join(f"{k} {v:.1f}" for k, v in found.items())
        )
    notes += [f"{line.name}: {note}" for line in comparison.lines for note in line.notes]
    return [*notes, *comparison.notes]


def _escape(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
