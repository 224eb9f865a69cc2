"""Scores of the reference implementations, reproduced.

`VLMFIX_SCORES=DIR pytest tests/eval/test_golden_scores.py` runs every case found in DIR/{chair,pope,amber,text}.
Captions and answers that a case names are looked for in DIR, beside it in `data`, and among the test data, packed or
not, and checked by their sha256.
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from vlmfix.eval.benchmarks import pope, text
from vlmfix.eval.benchmarks.amber import Amber
from vlmfix.eval.benchmarks.chair import Chair
from vlmfix.eval.benchmarks.chair_words import lexicon
from vlmfix.eval.benchmarks.files import DATA, Problems
from vlmfix.eval.benchmarks.yesno import PARSERS
from vlmfix.eval.importers import read_answers

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("VLMFIX_SCORES", HERE / "golden"))
PLACES = (GOLDEN, GOLDEN / "data", GOLDEN.parent / "data", HERE / "data")

OPERA_BOUNDS = {"chair_s": 0.4, "chair_i": 0.15, "recall": 0.4, "precision": 0.4, "f1": 0.4, "tokens": 0.05}
"""How far the reading by table may be from OPERA's tagger, in percent and tokens."""

PARSER_NAMES = {"pope_official": "official", "vlmevalkit_exact": "vlmevalkit"}


def data_file(kind, name, sha256=None):
    for place in PLACES:
        for path in (place / kind / name, place / kind / f"{name}.gz"):
            if path.is_file():
                raw = path.read_bytes()
                raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
                if sha256 is None or hashlib.sha256(raw).hexdigest() == sha256:
                    return path
    pytest.fail(f"{kind}/{name} (sha256 {sha256}) is in none of {', '.join(map(str, PLACES))}")


def cases(kind, key, inner=None):
    """(file, content) of every golden file of a kind that has `key`, or is a list for None; by entry with `inner`."""
    found = []
    for path in sorted((GOLDEN / kind).glob("*.json")):
        data = json.loads(path.read_text())
        value = data if (key is None and isinstance(data, list)) else isinstance(data, dict) and data.get(key)
        if value and inner:
            found += [pytest.param(name, entry, id=f"{path.stem}-{name}") for name, entry in value.items()]
        elif value:
            found.append(pytest.param(path.stem, data, id=path.stem))
    return found


def test_there_are_cases():
    assert [path for kind in ("chair", "pope", "amber", "text") for path in (GOLDEN / kind).glob("*.json")], GOLDEN


# ---- CHAIR


@cache
def captions(name, sha256=None):
    return tuple(read_answers(data_file("chair", name, sha256), Problems()))


@cache
def chair(variant):
    scorer, truth = variant.split("_gt") if "_gt" in variant else (variant, "A")
    reading = {"standalone": "standalone", "opera": "opera-like", "pai": "opera-like"}[scorer]
    return Chair(data_file("chair", "coco_objects.json"), scorer=reading, variant=truth)


COUNTS = {
    "captions": "captions",
    "hallucinated_captions": "hallucinated_captions",
    "object_mentions": "mentions",
    "hallucinated_mentions": "hallucinated_mentions",
    "gt_objects": "truth",
    "covered_gt_objects": "covered",
    "distinct_generated": "named",
}
FIGURES = {"CHAIRs": "chair_s", "CHAIRi": "chair_i", "Recall": "recall", "Precision": "precision", "F1": "f1"}


@pytest.mark.parametrize(("name", "case"), cases("chair", "files", "each"))
def test_chair(name, case):
    if isinstance(case, dict) and "captions" in case:
        chair_scores(name, case)
    else:
        chair_sentences(name, case)


def chair_scores(name, case):
    records = captions(name, case["sha256"])
    variants = [key for key in case if "_gt" in key]
    assert variants
    for variant in variants:
        score = chair(variant).score(records)
        figures, expected = score.figures(), case[variant]
        sums = dict(zip(score.columns, score.values.sum(0), strict=True))
        assert figures["length"] == pytest.approx(case["len_words_split_on_single_space"], abs=1e-9)
        if variant.startswith("standalone"):
            assert {key: sums[column] for key, column in COUNTS.items()} == expected["counts"]
        for key, metric in FIGURES.items():
            if key in expected:
                bound = 1e-9 if variant.startswith("standalone") else OPERA_BOUNDS[metric]
                assert figures[metric] == pytest.approx(100 * expected[key], abs=bound), (variant, key)
        if "Len_tokens" in expected:
            assert figures["tokens"] == pytest.approx(expected["Len_tokens"], abs=OPERA_BOUNDS["tokens"])


def chair_sentences(name, case):
    texts = captions(name)
    for variant, rows in case.items():
        benchmark = chair(variant)
        truth, words = benchmark.ground_truth.objects, lexicon(benchmark.scorer)
        wrong = 0
        for record, (image, nodes, pairs) in zip(texts, rows, strict=False):
            assert record["image"] == str(image)
            found, _ = words.mentions(record["text"])
            hallucinated = [[m.word, m.object] for m in found if m.object not in truth[str(image)]]
            same = [m.object for m in found] == nodes and hallucinated == pairs
            assert same or variant != "standalone", (record["text"], found)
            wrong += not same
        assert wrong <= 0.1 * len(rows), f"{variant}: {wrong} of {len(rows)} captions are read otherwise"


@pytest.mark.parametrize(("name", "special"), cases("chair", None))
def test_chair_special_captions(name, special):
    other = 0
    for case in special:
        found, tokens = lexicon("standalone").mentions(case["caption"])
        expected = case["standalone"]
        assert [m.word for m in found] == expected["words"], case["caption"]
        assert [m.object for m in found] == expected["node_words"], case["caption"]
        assert tokens == len(expected["tokens"]), case["caption"]
        found, _ = lexicon("opera-like").mentions(case["caption"])
        other += [m.object for m in found] != case["opera_gtA"]["node_words"]
    assert other <= 0.25 * len(special), f"{other} of {len(special)} captions are read otherwise than OPERA does"


# ---- POPE


@pytest.mark.parametrize(("name", "case"), cases("pope", "cases"))
def test_pope_parsers(name, case):
    for row in case["cases"]:
        for column in case["columns"]:
            parser = PARSER_NAMES.get(column, column)
            verdict = PARSERS[parser](row["answer"])
            right = [pope._outcome(parser, verdict, label)["right"] for label in ("yes", "no")]
            expected = {
                "yes": [True, False],
                "no": [False, True],
                "right_for_both": [True, True],
                "wrong_for_both": [False, False],
            }[row[column]]
            assert right == expected, (parser, row["answer"])


@pytest.mark.parametrize(("name", "case"), cases("pope", "files"))
def test_pope_scores(name, case):
    for file, expected in case["files"].items():
        split = expected["questions"].removesuffix(".json").rsplit("_", 1)[-1]
        records = read_answers(data_file("pope", file, expected["sha256"]), Problems())
        shipped = expected["questions"] == f"coco_pope_{split}.json"
        questions = None if shipped else data_file("pope", expected["questions"])
        score = pope.Pope(splits=split, questions=questions).score(records)
        figures = score.figures()
        sums = dict(zip(score.columns, score.values.sum(0), strict=True))
        for column, values in expected["scores"].items():
            parser = PARSER_NAMES.get(column, column)
            for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
                if metric in values:
                    key = metric if parser == "official" else f"{metric}[{parser}]"
                    assert figures[key] == pytest.approx(100 * values[metric], abs=1e-7), (column, metric)
            tp, fp, fn, right = (sums[f"{split}/{parser}/{c}"] for c in ("tp", "fp", "fn", "right"))
            counts = {"TP": tp, "FP": fp, "FN": fn, "TN": right - tp}
            assert all(counts[key] == values[key] for key in counts if key in values), column
            if "unknown" in values:
                assert sums["unparsed"] == values["unknown"]


@pytest.mark.parametrize(("name", "case"), cases("pope", "question_files"))
def test_pope_question_files(name, case):
    for file, sha256 in case["question_files"].items():
        split = file.removesuffix(".json").rsplit("_", 1)[-1]
        lines = [
            json.dumps({"question_id": number, "image": image, "text": asked, "label": label})
            for number, (image, asked, label) in enumerate(pope.published(split), 1)
        ]
        files = ["".join(line + end for line in lines).encode() for end in ("\n", "\r\n")]
        assert sha256 in [hashlib.sha256(file).hexdigest() for file in files], file


@pytest.mark.parametrize(("name", "case"), cases("pope", "object_counts"))
def test_pope_builder(name, case):
    pictures = [(row["image"], row["objects"]) for row in case["images"]]
    objects = [names for _, names in pictures]
    assert list(pope.counts(objects).items()) == list(case["object_counts"].items())
    assert pope.neighbours(objects) == case["co_occurrence_order"]
    for split, rows in case["questions"].items():
        per_picture = len(rows) // len(pictures) // 2
        built = [list(row) for row in pope.build(pictures, split, per_picture, case["seed"])]
        assert built == [[image, asked.replace("imange", "image"), label] for image, asked, label in rows], split


# ---- AMBER

SECTIONS = {
    "Descriminative Task": "",
    "Exsitence": "existence/",
    "Attribute": "attribute/",
    "State": "state/",
    "Number": "number/",
    "Action": "action/",
    "Relation": "relation/",
}
GENERATIVE = {"CHAIR": "chair", "Cover": "cover", "Hal": "hal", "Cog": "cog"}
AS_PRINTED = 0.1 + 1e-6


@pytest.mark.parametrize(("name", "case"), cases("amber", "scores"))
def test_amber(name, case):
    records = [{"id": str(i), "text": said} for i, said in [*case["generative"], *case["discriminative"]]]
    benchmark = Amber()
    figures = benchmark.score(records).figures()
    for part in case["scores"].values():
        for section, values in part.items():
            for key, value in values.items():
                metric = GENERATIVE[key] if section == "Generative Task" else SECTIONS[section] + key.lower()
                assert figures[metric] == pytest.approx(value, abs=AS_PRINTED), (section, key)
    for record, expected in zip(case["generative"], case["first_25_single_response_scores"], strict=False):
        row = benchmark.score([{"id": str(record[0]), "text": record[1]}]).figures()
        assert {key: round(row[metric], 1) for key, metric in GENERATIVE.items()} == pytest.approx(expected, abs=1e-6)


# ---- text quality


@pytest.mark.parametrize(("name", "case"), cases("text", "derived_repetition", "each"))
def test_text_quality(name, case):
    figures = text.Text().score(captions(name)).figures()
    renamed = {"mean_tokens": "tokens", "repeated_sentence_share_macro": "repeated_sentences"}
    for key, value in case.items():
        metric = renamed.get(key) or key.removesuffix("_micro")
        metric = metric.removesuffix("_macro") if metric.startswith("rep_") else metric
        scale = 1 if key == "mean_tokens" else 100
        assert figures[metric] == pytest.approx(scale * value, abs=1e-4 if scale == 100 else 1e-6), key


@pytest.mark.parametrize(("name", "case"), cases("text", "bleu"))
def test_bleu(name, case):
    case = case["bleu"]
    candidates, *others = (
        {r["id"]: r["text"] for r in captions(f"opera_llava15_{file}.jsonl")} for file in ("greedy", "beam5", "ours")
    )
    rows = []
    for image in map(str, case["image_ids"]):
        rows.append(text.bleu_counts(candidates[image], [other[image] for other in others]))
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    assert [float(text.bleu(total, n)) for n in (1, 2, 3, 4)] == pytest.approx(case["corpus_bleu_1_to_4"], abs=1e-6)
    for row, expected in zip(rows, case["per_image_bleu_1_to_4_first5"], strict=False):
        assert [float(text.bleu(row, n)) for n in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-6)


def test_what_has_no_licence_stays_with_the_tests():
    shipped = {path.name for path in DATA.iterdir()} - {"README.md"}
    assert not shipped & {path.name for path in (HERE / "data").rglob("*")}


def test_the_page_of_published_rows_is_up_to_date():
    script = HERE.parents[1] / "scripts/published_rows.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
