import json
from pathlib import Path

import pytest
from PIL import Image
from vlmfix.eval import bundle, compare, pipeline, reproduce, table
from vlmfix.eval.answerer import Opener
from vlmfix.eval.baselines import GREEDY, Arm, methods_of
from vlmfix.eval.benchmarks import load
from vlmfix.eval.benchmarks.files import Problems
from vlmfix.eval.collect import Answered, row
from vlmfix.eval.importers import read_answers
from vlmfix.eval.scenes import build

from tests.families.checkpoints import make_checkpoint
from vlmfix import registry
from vlmfix.errors import UsageError

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", reproduce.RECIPES)
def test_every_recipe_is_runnable_as_declared(name):
    recipe = reproduce.find(name)
    given = dict.fromkeys(recipe.needs, "x")
    plan = reproduce.grid(recipe, images="pictures", **given)
    benchmark = load(recipe.benchmark, **plan.benchmarks[recipe.benchmark])
    if not recipe.needs:
        assert len(benchmark.items()) == recipe.items
    assert reproduce.arms(recipe)[0].kind == "reference"
    for entry in recipe.rows:
        for method in methods_of(entry.arm.recipe):
            assert method in registry.names()
        for expected in entry.expected:
            assert expected.low < expected.high
    with pytest.raises(UsageError, match="did you mean"):
        reproduce.find(name + "s")


def test_the_published_figures_lie_in_their_intervals_or_the_notes_say_why():
    outside = [
        (name, e.metric)
        for name, recipe in reproduce.RECIPES.items()
        for entry in recipe.rows
        for e in entry.expected
        if e.published is not None and not e.low <= e.published <= e.high
    ]
    assert outside == [("chair-llava15-opera", "chair_i")]
    assert "14.7" in reproduce.RECIPES["chair-llava15-opera"].notes[0]


def test_missing_annotations_are_asked_for():
    with pytest.raises(UsageError, match="give --truth, folder with COCO's instances"):
        reproduce.grid(reproduce.find("chair-llava15-opera"))


def logged(place, options):
    benchmark = load("chair", **options)
    answers = read_answers(DATA / f"chair/opera_llava15_{place}.jsonl.gz", Problems())
    return benchmark, Answered(place, "method", [list(answers)], [], benchmark.items())


def test_the_authors_own_answers_count_as_reproduced():
    recipe = reproduce.find("chair-llava15-opera")
    truth = str(DATA / "chair/coco_objects.json.gz")
    options = reproduce.grid(recipe, truth=truth).benchmarks["chair"]
    rows = []
    for place, entry in zip(("greedy", "beam5"), recipe.rows, strict=True):
        benchmark, answered = logged(place, options)
        made = row(benchmark, answered)
        rows.append(compare.Row(entry.arm.name, made.score, entry.arm.kind))
    comparison = compare.compare("chair", rows, draws=200)
    outcomes = reproduce.judge(recipe, comparison)
    assert [o.verdict for o in outcomes] == ["reproduced"] * 8
    assert {o.expected.metric: round(o.value, 1) for o in outcomes[:2]} == {"chair_s": 45.0, "chair_i": 12.8}
    text = reproduce.markdown(recipe, outcomes)
    assert "| greedy | chair_s | 45 | 40.8 to 49.4 | 45.0 | reproduced |" in text
    assert "arXiv 2311.17911" in text


def test_figures_outside_and_partial_runs_are_told_apart():
    recipe = reproduce.find("pope-llava15")
    line = compare.Line("greedy", "reference", "", {"f1": compare.Cell(80.0)})
    whole = compare.Comparison("pope", ["f1"], [], [line], 5127, 500, 0, 0.95)
    assert [o.verdict for o in reproduce.judge(recipe, whole)] == ["outside"]
    part = compare.Comparison("pope", ["f1"], [], [line], 12, 2, 0, 0.95)
    assert [o.verdict for o in reproduce.judge(recipe, part)] == ["not comparable: 12 of 5127 items"]
    empty = compare.Comparison("pope", ["f1"], [], [], 5127, 500, 0, 0.95)
    assert [o.verdict for o in reproduce.judge(recipe, empty)] == ["not comparable: missing"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("llava", tmp_path_factory.mktemp("hub") / "tiny-llava")


def test_pope_from_published_questions_with_a_tiny_checkpoint(checkpoint, tmp_path):
    recipe = reproduce.find("pope-llava15")
    plan = reproduce.grid(
        recipe, str(checkpoint), str(tmp_path / "val2014"), limit=4, protocol="hf", load={"device": "cpu"}
    )
    (tmp_path / "val2014").mkdir()
    for item in load("pope").items()[:4]:
        Image.new("RGB", (16, 12), (90, 20, 200)).save(tmp_path / "val2014" / item.image)
    open_ = Opener(plan.model, **plan.load)
    result = pipeline.table(plan, "pope", reproduce.arms(recipe), open_, tmp_path / "out", bundle_to=tmp_path / "b.zip")
    assert [o.verdict for o in reproduce.judge(recipe, result.comparison)] == ["not comparable: 4 of 5127 items"]
    assert "f1" in (tmp_path / "out/pope/table.md").read_text()
    assert bundle.verify(tmp_path / "b.zip").ok
    found = bundle.verify(tmp_path / "b.zip").figures["greedy"][0]
    assert found["accuracy"] == pytest.approx(result.comparison.lines[0].cells["accuracy"].value)


def test_chair_from_coco_annotations_with_a_tiny_checkpoint_and_foreign_answers(checkpoint, tmp_path):
    build(tmp_path / "coco", n=3, split="test", seed=0)
    ids = [image["id"] for image in json.loads((tmp_path / "coco/instances.json").read_text())["images"]]
    recipe = reproduce.find("chair-llava15-opera")
    plan = reproduce.grid(
        recipe, str(checkpoint), str(tmp_path / "coco"), truth=str(tmp_path / "coco"), ids=ids[:2], protocol="hf",
        load={"device": "cpu"},
    )  # fmt: skip
    plan = type(plan)(**{**vars(plan), "generation": {"max_new_tokens": 5}})
    arms = [GREEDY, Arm("vcd", "method", "vcd"), Arm("first", "baseline", derive=("words", 1))]
    log = tmp_path / "halc.jsonl"
    log.write_text("".join(json.dumps({"image_id": i, "caption": "A dog on a bench."}) + "\n" for i in ids[:2]))
    result = pipeline.table(plan, "chair", arms, Opener(plan.model, **plan.load), tmp_path / "out", add={"HALC": log})
    names = [line.name for line in result.comparison.lines]
    assert names == ["greedy", "vcd", "first", "HALC"]
    assert result.comparison.items == 2
    cells = {line.name: line.cells for line in result.comparison.lines}
    assert cells["vcd"]["extra_rows"].value == 1
    assert cells["HALC"]["length"].value == 5
    assert "vcd" in table.markdown(table.build(result.comparison))
