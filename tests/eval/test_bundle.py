import json
import zipfile

import pytest
from vlmfix.eval import bundle, collect, grid, pipeline, suite
from vlmfix.eval.baselines import GREEDY, Arm
from vlmfix.eval.benchmarks import load
from vlmfix.eval.scenes import build

from vlmfix.errors import UsageError

ARMS = [
    GREEDY,
    Arm("first", "baseline", derive=("words", 2)),
    Arm("fix", "method", "fix"),
    Arm("ask", "baseline", suffix=" Be brief."),
]


class Model:
    def __init__(self, arm):
        self.arm = arm

    def describe(self):
        return {"model": "m", "recipe": self.arm.recipe, "revision": "abc"}

    def answer(self, items, images, settings):
        text = "A dog and a fork near a person." if self.arm.recipe == "fix" else "A cup on a table, a bus and a dog."
        return [{"id": item.id, "text": text, "seconds": 0.1, "tokens": 9} for item in items]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("bundle")
    build(place / "scenes", n=12, split="test", seed=0)
    options = {"truth": str(place / "scenes")}
    plan = grid.parse({"benchmarks": ["chair"], "benchmark": {"chair": options}})
    benchmark = load("chair", **options)
    runs = suite.run(plan, benchmark, ARMS, Model, place / "out", pictures=str)
    foreign = {"other": [{"id": i.id, "text": "A dog.", "prompt": i.prompt} for i in benchmark.items()]}
    rows = collect.collect(plan, benchmark, ARMS, runs, foreign)
    path = bundle.write(place / "out.zip", "chair", options, rows, {"table.md": "| a |"})
    return path, [benchmark.score(row.answers[0]).figures() for row in rows]


def rewritten(path, to, change):
    """The bundle with one file changed, its hash in the manifest too."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    change(contents)
    with zipfile.ZipFile(to, "w") as new:
        for name, data in contents.items():
            new.writestr(name, data)
    return to


def test_a_bundle_scores_again_elsewhere(made, tmp_path, monkeypatch):
    path, figures = made
    monkeypatch.chdir(tmp_path)
    found = bundle.verify(path)
    assert found.ok, found.problems
    assert list(found.figures) == ["greedy", "first", "fix", "ask", "other"]
    for row, expected in zip(found.figures.values(), figures, strict=True):
        assert row[0] == pytest.approx(expected, nan_ok=True)
    assert found.checked["answers"] == 60
    assert found.checked["figures"] == 5 * len(figures[0])
    names = zipfile.ZipFile(path).namelist()
    assert "data/truth/instances.json" in names
    assert not any(name.endswith(".png") for name in names)
    assert "tables/table.md" in names


def test_the_manifest_names_versions_and_specs(made):
    manifest = json.loads(zipfile.ZipFile(made[0]).read("manifest.json"))
    assert {"python", "platform", "vlmfix", "torch", "transformers"} <= set(manifest["versions"])
    specs = [row["seeds"][0]["spec"] for row in manifest["rows"]]
    assert specs[0]["revision"] == "abc"
    assert specs[2]["recipe"] == "fix"
    assert specs[1] is specs[4] is None


def test_the_same_answers_make_the_same_bytes(made, tmp_path):
    path, _ = made
    again = rewritten(path, tmp_path / "same.zip", lambda contents: None)
    assert bundle.verify(again).ok


def change_answer(contents):
    contents["answers/00-0.jsonl"] = contents["answers/00-0.jsonl"].replace(b"a bus", b"a cat", 1)


def change_answer_and_hash(contents):
    import hashlib

    change_answer(contents)
    manifest = json.loads(contents["manifest.json"])
    manifest["files"]["answers/00-0.jsonl"] = hashlib.sha256(contents["answers/00-0.jsonl"]).hexdigest()
    contents["manifest.json"] = json.dumps(manifest).encode()


def change_figure(contents):
    manifest = json.loads(contents["manifest.json"])
    manifest["rows"][2]["seeds"][0]["figures"]["chair_i"] -= 1
    contents["manifest.json"] = json.dumps(manifest).encode()


def change_spec(contents):
    manifest = json.loads(contents["manifest.json"])
    manifest["rows"][0]["seeds"][0]["spec"]["recipe"] = "better"
    contents["manifest.json"] = json.dumps(manifest).encode()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (change_answer, "answers/00-0.jsonl was changed"),
        (change_answer_and_hash, "greedy: chair_"),
        (change_figure, "fix: chair_i is stated as"),
        (change_spec, "greedy: 12 answers were made by another run"),
        (lambda contents: contents.update({"extra.txt": b""}), "extra.txt is not in the manifest"),
    ],
)
def test_every_change_is_found(made, tmp_path, change, problem):
    found = bundle.verify(rewritten(made[0], tmp_path / "changed.zip", change))
    assert not found.ok
    assert any(problem in text for text in found.problems), found.problems


def test_other_files_are_no_bundles(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(UsageError, match="no bundle"):
        bundle.verify(tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        file.writestr("manifest.json", '{"format": 99}')
    with pytest.raises(UsageError, match="format 99"):
        bundle.verify(tmp_path / "b.zip")


def test_a_strength_is_swept_against_truncated_greedy(made, tmp_path):
    class Swept(Model):
        def answer(self, items, images, settings):
            strong = "alpha=2" in self.arm.recipe
            text = "A cup." if strong else "A cup on a table, a bus and a dog near a person, all of them small."
            return [{"id": item.id, "text": text} for item in items]

    options = {"truth": str(made[0].parent / "scenes")}
    plan = grid.parse({"benchmarks": ["chair"], "benchmark": {"chair": options}})
    found = pipeline.frontier(plan, "chair", "vcd", "vcd", "alpha", [1, 2], Swept, tmp_path, pictures=str)
    assert [label for _, _, label in found.curve] == ["alpha=1", "alpha=2"]
    assert [label for _, _, label in found.reference] == ["5 words", "10 words", "15 words", "uncut"]
    assert found.curve[0][:2] == found.reference[-1][:2]  # alpha 1 changes nothing
    assert found.matched["alpha=2"].limit == 2
    assert found.matched["alpha=2"].differences["chair_i"].difference == 0  # shorter, not better
    assert found.figure.read_text().startswith("<svg")
