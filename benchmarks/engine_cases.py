"""Rows of the engines' benchmark: what is measured, in which order, against which bounds, and what follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from benchmarks.shapes import Shape
from vlmfix import registry
from vlmfix.method import DecodingMethod
from vlmfix.recipe import Recipe

SDPA, EAGER = "transformers sdpa", "transformers eager"
WEIGHTS, STATIC = "transformers eager, attention weights", "transformers static cache, compiled"
BEAMS, TWO = "transformers 5 beams", "two sequential forwards"
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    SDPA: ("sdpa", {}),
    EAGER: ("eager", {}),
    WEIGHTS: ("eager", {"output_attentions": True, "return_dict_in_generate": True}),
    STATIC: ("sdpa", {"cache_implementation": "static"}),
    BEAMS: ("sdpa", {"num_beams": 5}),
}
"""Row -> attention function and keywords of transformers' own generate."""

AGAIN = ", again"
"""Behind the name of a plain row that is measured once more, with a number from the second time on."""

EVERY = 6
"""Rows of an engine between two measurements of its plain one."""

GOING_BACK = "opera, going back"
SETTINGS = {
    "var": "var(sink_dims=[7,9],tau=1.0)",
    "locore": "locore(window=8)",
    "icd": "icd(disturbance_ids=[5,6,7])",
    "iava": "iava(instruction_ids=[5,6,7])",
    "agla": "agla(colours=((0.5,0.5,0.5),(0.5,0.5,0.5)))",
    "opera": "opera(threshold=None)",
    GOING_BACK: "opera",
}
"""What random weights need said: there is no tokenizer, and no sink dimension stands out."""

KINDS = ("attention", "decoding")
"""Methods that act while a model decodes."""

FIRST = ("var", "vcd", "pai", "gift")
LAST = ("sgrs", "opera")
LONG = ("greedy", "var", "vcd")
"""Methods whose rows come first, last, and at long prompts."""

COLUMNS = (
    *("row", "run", "prompt", "batch", "ms_per_token", "prefill_ms", "peak_gib", "of_plain", "of_sdpa", "of_static"),
    *("of_floor", "of_bytes", "memory_of_sdpa", "capture_seconds", "targets"),
)


@dataclass(frozen=True)
class Case:
    """One row.

    Args:
        prompt: tokens.
        batch: size.
        name: method, or one of `BASELINES` and `TWO`.
        engine: transformers, hf, graph, or graph+compile.
        again: how often a plain row was measured before.
    """

    prompt: int
    batch: int
    name: str
    engine: str = "transformers"
    again: int = 0

    @property
    def row(self) -> str:
        """Its name in results."""
        own = self.name if self.engine == "transformers" else f"{self.engine} {self.name}"
        return own + AGAIN * bool(self.again) + f" {self.again}" * (self.again > 1)

    @property
    def recipe(self) -> str:
        """The method with its settings."""
        return SETTINGS.get(self.name, self.name)

    @property
    def plain(self) -> bool:
        """Whether others are compared with it."""
        return self.name in (SDPA, "greedy") and self.engine != "graph+compile"


def left_out() -> list[dict[str, str]]:
    """Methods without a row, and why."""
    why = "works on pictures or on whole answers; its decoding is the plain one"
    return [{"row": row.name, "why": why} for row in registry.ROWS if row.kind not in ("plain", *KINDS)]


def order(shape: Shape, engines: Sequence[str], gpu: bool) -> list[Case]:
    """All rows, what matters most first: a run that the clock stops is still a result.

    Args:
        shape: the model.
        engines: hf, graph.
        gpu: whether transformers compiles and steps can be compiled before they are captured.
    """
    usual, *longer = shape.prompts
    one, *larger = shape.batches
    rest = [row.name for kind in KINDS for row in registry.ROWS if row.kind == kind]
    rest = [name for name in rest if name not in (*FIRST, *LAST)]

    def ours(names: Iterable[str], prompt: int = usual, batch: int = one, only: str = "") -> list[Case]:
        chosen = [engine for engine in engines if only in ("", engine)]
        return [Case(prompt, batch, name, engine) for name in names for engine in chosen]

    def others(*names: str, prompt: int = usual, batch: int = one) -> list[Case]:
        return [Case(prompt, batch, name) for name in names if gpu or name != STATIC]

    def compiled(names: Iterable[str]) -> list[Case]:
        return [Case(usual, one, name, "graph+compile") for name in names if gpu and "graph" in engines]

    def main(prompt: int, batch: int) -> list[Case]:
        start, end = (others(name, prompt=prompt, batch=batch) for name in (SDPA, TWO))
        return [*start, *ours(LONG, prompt, batch), *end]

    def last(batch: int) -> list[Case]:
        searching = [Case(usual, batch, name, "hf") for name in ("opera", GOING_BACK)]
        return [*ours(["sgrs"], batch=batch), *others(BEAMS, batch=batch), *searching]

    out = [*others(SDPA), *ours(["greedy"]), *others(STATIC), *ours(FIRST), *others(TWO), *compiled(LONG)]
    out += [*others(EAGER, WEIGHTS), *ours(rest, only="graph"), *last(one)]
    for batch in larger:
        out += main(usual, batch)
    for prompt in longer:
        out += main(prompt, one)
    out += ours(rest, only="hf")
    for batch in larger:
        out += [*ours(FIRST[2:], batch=batch), *others(STATIC, EAGER, WEIGHTS, batch=batch)]
        out += [*ours(rest, batch=batch, only="graph"), *last(batch), *ours(rest, batch=batch, only="hf")]
    for prompt in longer:
        out += [case for batch in larger for case in main(prompt, batch)]
    return [*out, *compiled((*FIRST[2:], *rest))]


def interleaved(cases: Sequence[Case], usual: int) -> list[Case]:
    """The rows, and between them plain ones again: after every `EVERY` rows of an engine in a cell and after its last.

    Args:
        cases: rows in their order.
        usual: prompt length whose cells get them; the few rows of longer prompts follow the plain ones closely.
    """
    out: list[Case] = []
    plain: dict[tuple[int, int, str], Case] = {}
    left = Counter((case.prompt, case.batch, case.engine) for case in cases if not case.plain)
    since: Counter[tuple[int, int, str]] = Counter()
    for case in cases:
        key = case.prompt, case.batch, case.engine
        out.append(case)
        if case.plain:
            plain[key] = case
            continue
        left[key] -= 1
        since[key] += 1
        if key in plain and case.prompt == usual and (since[key] == EVERY or not left[key]):
            plain[key] = replace(plain[key], again=plain[key].again + 1)
            since[key] = 0
            out.append(plain[key])
    return out


def prompts_of(case: Case, visual: int) -> list[int]:
    """Lengths of the prompts whose keys a step reads for each sample: the visible row's, then the branches'.

    Beams of transformers keep the prompt once each, a search with a shared prefix once in all.
    """
    if case.name in BASELINES or case.name == TWO:
        return [case.prompt] * {TWO: 2, BEAMS: 5}.get(case.name, 1)
    lengths = [case.prompt]
    for method in Recipe.parse(case.recipe).methods:
        if isinstance(method, DecodingMethod):
            lengths += [case.prompt - visual * (not view.keeps_pictures()) for view in method.branches()]
            lengths += [case.prompt] * method.late()
    return lengths


def derive(report: dict[str, Any]) -> None:
    """Fills in every ratio and bound; a row compares with the mean of what `_compared` finds.

    Args:
        report: `runs` with copy bandwidths and weight bytes, `rows` with measurements; `of_*` are multiples.
    """
    rows = report["rows"]
    for row in rows:
        if "ms_per_token" not in row:
            continue
        run = report["runs"][row["run"]]
        rate, weights = run["copy_bytes_per_second"], run["weight_bytes"]
        floor, step = weights / rate, (weights + row["key_bytes"]) / rate
        row["byte_model_ms"] = 1e3 * step
        row["of_floor"] = row["ms_per_token"] / (1e3 * floor)
        row["of_bytes"] = row["ms_per_token"] / (1e3 * step)
        names = {"of_sdpa": SDPA, "of_plain": _plain_of(row), "of_static": STATIC, "of_two_forwards": TWO}
        found = {name: _compared(rows, row, other) for name, other in names.items()}
        known = {name: others for name, others in found.items() if others}
        row["of_other_runs"] = [name for name, others in known.items() if others[0]["run"] != row["run"]]
        row |= {name: _ratio(row, others, "ms_per_token") for name, others in known.items()}
        if plain := found["of_plain"]:
            grows = (weights + row["key_bytes"]) / (weights + plain[0]["key_bytes"])
            row["of_plain_and_bytes"] = row["of_plain"] / grows
            row["prefill_of_plain"] = _ratio(row, plain, "prefill_ms")
        if found["of_sdpa"] and "peak_gib" in row:
            row["memory_of_sdpa"] = _ratio(row, found["of_sdpa"], "peak_gib")
        row["targets"] = bounds(row, report["runs"][0]["usual_prompt"])


def _plain_of(row: dict[str, Any]) -> str:
    if row["method"] in ("opera", GOING_BACK):
        return BEAMS
    return SDPA if row["engine"] == "transformers" else f"{row['engine']} greedy"


def _compared(rows: Sequence[dict[str, Any]], row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Measurements of `name` that a row of the same cell and device compares with.

    In its run the nearest before it and the nearest after it; the row itself if its run has no other; where the run
    has none, all of the latest run that has.
    """
    cell = (row["prompt"], row["batch"], row["device"])
    found = [r for r in rows if r["row"].partition(AGAIN)[0] == name and "ms_per_token" in r]
    found = [r for r in found if (r["prompt"], r["batch"], r["device"]) == cell]
    place = {id(r): number for number, r in enumerate(rows)}  # rows stand in the order they were measured in
    own = [r for r in found if r["run"] == row["run"]]
    before = [r for r in own if place[id(r)] < place[id(row)]]
    after = [r for r in own if place[id(r)] > place[id(row)]]
    latest = max((r["run"] for r in found), default=None)
    return [*before[-1:], *after[:1]] or own or [r for r in found if r["run"] == latest]


def _ratio(row: dict[str, Any], others: Sequence[dict[str, Any]], figure: str) -> float:
    return float(row[figure] / fmean(other[figure] for other in others))


def bounds(row: dict[str, Any], usual: int) -> dict[str, str]:
    """The targets of a row, by the figure that they bound."""
    kind = next((r.kind for r in registry.ROWS if r.name == row["method"]), "")
    engine, single = row["engine"], row["batch"] == 1
    out: dict[str, str] = {}
    if kind == "attention":
        out["memory_of_sdpa"] = "<= 1.03"
        if single and engine.startswith("graph"):
            compiled = engine == "graph+compile"
            out |= {
                "of_plain": "<= 1.08" if row["method"] == "gift" else "<= 1.05",
                "of_floor": "<= 1.65" if compiled else "<= 2.2",
                "of_static": "<= 0.78" if compiled else "<= 1.0",
                "of_sdpa": "<= 0.333",
            }
    if kind == "decoding" and row["branches"] == 1:
        out |= {"of_bytes": "<= 1.10", "of_plain_and_bytes": "<= 1.10"}
        if single and engine == "hf":
            out["of_plain"] = "<= 1.15"
        if single and engine.startswith("graph") and row["prompt"] == usual:
            out["of_two_forwards"] = "<= 0.167"
    if row["method"] == "sgrs":
        out["of_plain"] = "<= 2.2"
    if row["method"] == "opera":
        out["of_plain"] = "<= 1.3"
    return {name: bound for name, bound in out.items() if name in row}
