"""Whether the engines and batch sizes give the same answers: tokens in float32, captions in bfloat16.

    python -m benchmarks.agreement --scenes 128 --out agreement.json     # on a GPU
    python -m benchmarks.agreement --only tokens --families llava --methods greedy var --out agreement.json

`tokens`: tiny random models of the families that the captured engine must serve, float32, left-padded batches of three
rows, every method, two different batches one after the other, the second with the captured step of the first; equal
tokens are required, but for ties. A row says which engine ran; `margin` is by how much the best logit leads in engine
hf at the first token that differs, and a row is `tied` where that is below `TIE`.

`rounding`: the same models in bfloat16 against their float32 selves, whose tokens they are made to repeat: the largest
error of a logit in each engine, as a share of the largest logit, over all steps behind the prompt's own logits, which
are the same; `times` is the captured engine's over the loop's.
Kernels that serve half precision alone take part in this comparison.

`captions`: scenes answered by pico in bfloat16 in pairs of engines and batch sizes; `share` of the captions that
differ, which rounding makes greater than zero. Exit code 1 if tokens differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

import vlmfix
from benchmarks.engine_cases import KINDS
from benchmarks.timing import about
from tests.duties.table import TABLE
from tests.families import build
from vlmfix import registry

FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl", "idefics3")
TIE = 1e-4
"""Logits that are closer than this may change places by rounding."""
RECIPES = ("greedy", "var", "vcd")
ROUNDED = ("greedy", "var", "vcd", "vhr_local")
"""Methods compared in bfloat16."""
NEW = 12
"""Tokens of the tiny models' answers."""
CHUNK = 7
"""Methods that a process takes at once."""
PAIRS = ((("hf", 64), ("graph", 64)), (("hf", 64), ("hf", 1)), (("graph", 64), ("graph", 1)), (("hf", 1), ("graph", 1)))
"""What is compared: (engine, batch size) with another."""


def tokens_of(family: str, methods: list[str], device: str) -> list[dict[str, Any]]:
    """Compares both engines on one family: a row per method."""
    torch.set_num_threads(1)
    tiny = build(family, fresh=True)
    model = tiny.model.to(device)
    batches = [{key: x.to(device) for key, x in tiny.inputs(tiny.rows, seed).items()} for seed in (0, 1)]
    return [{"family": family, "method": name, **_compare(model, TABLE[name].full, batches)} for name in methods]


def _compare(model: Any, recipe: str, batches: list[dict[str, Any]]) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    try:
        with vlmfix.wrap(model, None, recipe, engine="hf") as vlm:
            own = [vlm.generate(**batch, **options) for batch in batches]
        with vlmfix.wrap(model, None, recipe, engine="graph") as vlm:
            other = [vlm.generate(**batch, max_new_tokens=NEW) for batch in batches]
            used = vlm.report.get("engine", {})
    except vlmfix.Refusal as refusal:
        return {"refused": str(refusal)}
    except Exception as error:  # a broken method must not hide the others
        return {"equal": False, "error": f"{type(error).__name__}: {error}"[:600]}
    apart = [_apart(one, tokens) for one, tokens in zip(own, other, strict=True)]
    tied = all(each is None or each["margin"] < TIE for each in apart)
    return {"equal": apart == [None, None], "tied": tied, "first": apart[0], "second": apart[1], **used}


def _apart(own: Any, other: torch.Tensor) -> dict[str, Any] | None:
    """Where answers part, and by how much the best logit led there; None if they do not."""
    start = own.sequences.shape[1] - len(own.logits)
    places = (own.sequences != other)[:, start:].T.nonzero().tolist()
    if not places:
        return None
    step, row = places[0]
    best = own.logits[step][row].float().topk(2).values
    return {"step": step, "row": row, "margin": float(best[0] - best[1])}


def rounding_of(family: str, methods: list[str], device: str) -> list[dict[str, Any]]:
    """Compares both engines in bfloat16 with float32 on one family: a row per method."""
    torch.set_num_threads(1)
    tiny = build(family, fresh=True)
    model = tiny.model.to(device)
    batch = {key: x.to(device) for key, x in tiny.inputs(tiny.rows, 0).items()}
    exact = {name: _logits(model, name, "hf", batch)[0] for name in methods}
    model = model.to(torch.bfloat16)
    batch = {key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in batch.items()}
    rows = []
    for name in methods:
        row: dict[str, Any] = {"family": family, "method": name}
        used: dict[str, Any] = {}
        for engine in ("hf", "graph"):
            found, used = _logits(model, name, engine, batch, exact[name].sequences)
            row[engine] = _error(found, exact[name])
        rows.append(
            row | {"times": row["graph"] / row["hf"], "captured": used.get("captured"), "form": used.get("form")}
        )
    return rows


@dataclass(frozen=True)
class Repeat(LogitsProcessor):
    """Leaves no choice but the next token of known texts.

    Args:
        texts: [B, K] ids, prompts included.
    """

    texts: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] scores with one finite entry each."""
        token = self.texts[:, input_ids.shape[1], None]
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def _logits(
    model: Any, name: str, engine: str, batch: dict[str, Any], texts: torch.Tensor | None = None
) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True}
    if texts is not None:
        options["logits_processor"] = LogitsProcessorList([Repeat(texts)])
    with vlmfix.wrap(model, None, TABLE[name].full, engine=engine) as vlm:
        return vlm.generate(**batch, **options), vlm.report.get("engine", {})


def _error(found: Any, exact: Any) -> float:
    """The largest error of a logit by the largest logit, the first step apart: it comes from reading the prompt."""
    a, b = (torch.stack(x.logits[1:]).double() for x in (found, exact))
    seen = b.isfinite()
    return float((a - b).abs()[seen].max() / b.abs()[seen].max())


def together(
    call: Callable[..., list[dict[str, Any]]], families: list[str], methods: list[str], device: str, processes: int
) -> list[dict[str, Any]]:
    """All families, several at once."""
    jobs = [(family, methods[i : i + CHUNK], device) for family in families for i in range(0, len(methods), CHUNK)]
    if processes == 1:
        return [row for job in jobs for row in call(*job)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [row for each in [pool.submit(call, *job) for job in jobs] for row in each.result()]


def captions(count: int, recipe: str, device: str, dtype: str, new: int) -> list[dict[str, Any]]:
    """Answers scenes every way that `PAIRS` names and compares: a row per pair."""
    from PIL import Image

    if importlib.util.find_spec("vlmfix.eval") is None:  # a bare checkout; installed, eval/ is vlmfix.eval
        vlmfix.__path__.append(str(Path(__file__).resolve().parents[1]))
    from vlmfix.eval import scenes

    with tempfile.TemporaryDirectory() as folder:
        scenes.build(folder, count, "test", 0)
        pictures = [Image.open(path).convert("RGB") for path in sorted(Path(folder).rglob("*.png"))]
    rows: list[dict[str, Any]] = []
    answers: dict[tuple[str, int], list[str]] = {}
    seconds: dict[tuple[str, int], float] = {}
    for way in sorted({way for pair in PAIRS for way in pair}):
        engine, batch = way
        with vlmfix.load("pico", recipe, device=device, dtype=dtype, engine=engine) as vlm:
            begun, answers[way] = time.perf_counter(), []
            for i in range(0, len(pictures), batch):
                answers[way] += vlm.answer(pictures[i : i + batch], "Describe the image.", max_new_tokens=new)
            seconds[way] = time.perf_counter() - begun
            ran = vlm.report.get("engine", {})
        if engine == "graph" and not ran.get("captured"):
            note = f"ran in engine {ran.get('name')}, not captured: {ran.get('reason', device)}"
            rows.append({"recipe": recipe, "one": f"{engine}, batch {batch}", "note": note})
    for one, other in PAIRS:
        differ = sum(a != b for a, b in zip(answers[one], answers[other], strict=True))
        row: dict[str, Any] = {"recipe": recipe, "one": "{}, batch {}".format(*one)}
        row |= {"other": "{}, batch {}".format(*other), "captions": len(pictures), "differ": differ}
        row |= {"share": differ / len(pictures), "seconds_one": seconds[one], "seconds_other": seconds[other]}
        rows.append(row)
    return rows


def main(given: list[str] | None = None) -> int:
    """Compares and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [row.name for row in registry.ROWS if row.kind in ("plain", *KINDS)]
    parser.add_argument("--only", choices=["tokens", "captions"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=known, default=known, help="of the tiny models")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="of pico")
    parser.add_argument("--dtype", default="bfloat16", help="of pico")
    parser.add_argument("--new", type=int, default=64, help="tokens of a caption")
    parser.add_argument("--seconds", type=float, default=1e9, help="answer no further recipe's scenes after this time")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {**about(device), "dtype": options.dtype, "rows": [], "tokens": [], "rounding": []}

    def write() -> None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    begun = time.perf_counter()
    if options.only != "captions":
        report["tokens"] = together(tokens_of, options.families, options.methods, device, options.processes)
        half = [name for name in ROUNDED if name in options.methods]
        report["rounding"] = together(rounding_of, options.families, half, device, options.processes)
        report["tokens_seconds"] = time.perf_counter() - begun
        write()
    if options.only != "tokens":
        for recipe in options.recipes:
            if time.perf_counter() - begun < options.seconds:
                report["rows"] += captions(options.scenes, recipe, device, options.dtype, options.new)
            else:
                report["rows"].append({"recipe": recipe, "note": "not answered: out of time"})
            write()
    wrong = [row for row in report["tokens"] if row.get("equal") is False and not row.get("tied")]
    for row in wrong:
        sys.stderr.write(f"{row}\n")
    graph = [row for row in report["tokens"] if row.get("name") == "graph"]
    captured = sum(bool(row["captured"]) for row in graph)
    ties = sum(row.get("equal") is False and row.get("tied", False) for row in report["tokens"])
    found = (
        f"{len(report['tokens'])} pairs, {len(graph)} in engine graph, {captured} of them captured, {ties} at a tie, "
    )
    sys.stderr.write(f"{found}{len(wrong)} differ or failed\n")
    for row in (*report["rounding"], *report["rows"]):
        sys.stderr.write(f"{row}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
