"""Whether the engines and batch sizes give the same answers: tokens in float32, captions in bfloat16.

    python -m benchmarks.agreement --scenes 128 --out agreement.json     # on a GPU
    python -m benchmarks.agreement --only tokens --families llava --methods greedy var --out agreement.json

`tokens`: tiny random models of the families that the captured engine must serve, float32, left-padded batches of three
rows, every method, two different batches one after the other, the second with the captured step of the first; equal
tokens are required, but for ties. A row says which engine ran; `margin` is by how much the best logit leads in engine
hf at the first token that differs, and a row is `tied` where that is below `TIE`.

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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

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
NEW = 12
"""Tokens of the tiny models' answers."""
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


def tokens(families: list[str], methods: list[str], device: str, processes: int) -> list[dict[str, Any]]:
    """All families, several at once."""
    if processes == 1:
        return [row for family in families for row in tokens_of(family, methods, device)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = [pool.submit(tokens_of, family, methods, device) for family in families]
        return [row for each in found for row in each.result()]


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
    report: dict[str, Any] = {**about(device), "dtype": options.dtype, "rows": [], "tokens": []}

    def write() -> None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    begun = time.perf_counter()
    if options.only != "captions":
        report["tokens"] = tokens(options.families, options.methods, device, options.processes)
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
    for row in report["rows"]:
        sys.stderr.write(f"{row}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
