import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image
from vlmfix.eval import benchmarks, collect, compare, grid, protocol, suite
from vlmfix.eval.answerer import Opener, VlmAnswerer
from vlmfix.eval.base import Item, Score, ratio
from vlmfix.eval.baselines import GREEDY, Arm
from vlmfix.eval.benchmarks.answers import match, table
from vlmfix.eval.benchmarks.files import Problems

from tests.families.checkpoints import make_checkpoint
from vlmfix.errors import Refusal, UsageError


@dataclass(frozen=True)
class Captions:
    """A toy caption benchmark: `cat` is in every picture, `fork` in none."""

    suffix: str = ""
    label = "toy[plain]"
    max_new_tokens = 64

    def items(self):
        return [Item(f"{n}", f"{n}.png", "Describe it.") for n in range(12)]

    def replies(self, records, problems):
        return match(self.items(), records, problems)

    def score(self, records, problems=None):
        problems = problems or Problems()
        replies = self.replies(records, problems)
        rows = [
            {"n": 1.0, "bad": float("fork" in reply.text), "found": float("cat" in reply.text)} for reply in replies
        ]
        return table(replies, rows, {"chair_s": ratio("bad", "n"), "recall": ratio("found", "n")}, problems)


class Fake:
    """Says what its arm is; `greedy` hallucinates in every third picture."""

    def __init__(self, arm):
        self.arm = arm
        self.seen = []

    def describe(self):
        return {"model": "fake", "recipe": self.arm.recipe, "grade": "derived", "family": "llava", "processor": {}}

    def answer(self, items, images, settings):
        self.seen += [(item.prompt, image, dict(settings)) for item, image in zip(items, images, strict=True)]
        plain = self.arm.recipe == "greedy"
        extra = f" seed {settings['seed']}." if "seed" in settings else ""
        return [
            {
                "id": i.id,
                "text": "A cat sits there. It is big." + (" A fork." if plain and int(i.id) % 3 == 1 else "") + extra,
                "seconds": 0.5,
                "tokens": 10,
                "extra_rows": int(not plain),
            }
            for i in items
        ]


TOML = """
model = "pico"
benchmarks = ["pope", "text"]
methods = "greedy; vcd(alpha=1); var+m.py:A(x='a;b')"
seeds = 3
controls = ["placebo", "trivial"]
limit = 10
[benchmark.pope]
splits = "random"
[generation]
max_new_tokens = 8
"""


def test_a_grid_file_is_read(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(TOML)
    found = grid.read(path)
    assert found.methods == ["greedy", "vcd(alpha=1)", "var+m.py:A(x='a;b')"]
    assert found.benchmarks == {"pope": {"splits": "random"}, "text": {}}
    assert found.seeds == [0, 1, 2]
    assert benchmarks.load("pope", **found.benchmarks["pope"]).splits == ("random",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("methodes = 'a'", r"grid.toml: unknown key 'methodes'; did you mean methods"),
        ("limit = 'all'", "limit must be a number, is 'all'"),
        ("limit = true", "limit must be a number"),
        ("controls = ['placebos']", "unknown control 'placebos'; did you mean placebo"),
        ("protocol = 'papers'", "unknown picture protocol 'papers'; did you mean paper"),
        ("seeds = []", "at least one"),
        ("seeds = [1, 1]", "different"),
        ("[benchmark.chairs]\nn = 1", "the benchmark 'chairs', which is not in benchmarks"),
        ("model = ", "is not TOML"),
    ],
)
def test_wrong_grids_are_named(tmp_path, line, message):
    path = tmp_path / "grid.toml"
    path.write_text('benchmarks = ["chair"]\n' + line)
    with pytest.raises(UsageError, match=message):
        grid.read(path)


def test_no_benchmark_is_an_error():
    with pytest.raises(UsageError, match="at least one benchmark"):
        grid.parse({"methods": ["var"]})


def test_contrastive_rows_and_controls_appear_unasked():
    plan = grid.parse({"benchmarks": ["chair"], "methods": ["greedy", "var", "vcd"]})
    assert [(a.name, a.kind) for a in grid.arms(plan, True, {"vcd": "alpha"})] == [
        ("greedy", "reference"),
        ("sampling", "control"),
        ("sampling + mask: vcd(alpha=0)", "control"),
        ("var", "method"),
        ("vcd", "method"),
    ]
    plan = grid.parse({"benchmarks": ["chair"], "methods": ["var", "vcd"], "controls": ["placebo", "trivial"]})
    names = [arm.name for arm in grid.arms(plan, True, {"vcd": "alpha"})]
    assert "first 2 sentences" in names
    assert "var [placebo: heads]" in names
    assert "vcd [placebo: other-picture]" in names
    assert "vcd [placebo: heads]" not in names


def test_registered_contrastive_methods_have_a_strength():
    found = grid.contrastive()
    assert found["vcd"] == "alpha"
    assert found["m3id"] == "forget_rate"
    assert "var" not in found
    assert "greedy" not in found


ARMS = [
    GREEDY,
    Arm("sampling", "control", settings={"do_sample": True}),
    Arm("ask", "baseline", suffix=" Only what is clear."),
    Arm("first 2", "baseline", derive=("sentences", 2)),
    Arm("fix", "method", "fix"),
]


def test_a_suite_from_questions_to_files(tmp_path):
    plan = grid.parse({"benchmarks": ["text"], "seeds": [0, 1], "batch_size": 4})
    made = {}

    def open_(arm):
        return made.setdefault(arm.name, Fake(arm))

    runs = suite.run(plan, Captions(), ARMS, open_, tmp_path, pictures=str.upper)
    assert [(r.arm.name, r.seed, r.outcome.answered) for r in runs] == [
        ("greedy", None, 12), ("sampling", 0, 12), ("sampling", 1, 12), ("ask", None, 12), ("fix", None, 12),
    ]  # fmt: skip
    assert len({r.spec.answers_hash for r in runs}) == 5
    assert made["ask"].seen[0][0] == "Describe it. Only what is clear."
    assert made["greedy"].seen[0] == ("Describe it.", "0.PNG", {"max_new_tokens": 64})
    assert sorted({s["seed"] for _, _, s in made["sampling"].seen}) == [0, 1]
    again = suite.run(plan, Captions(), ARMS, open_, tmp_path, pictures=str.upper)
    assert all(r.outcome.answered == 0 and r.outcome.kept == 12 for r in again)

    foreign = {"HALC": [{"id": f"{n}", "text": "A cat", "prompt": "Describe it."} for n in range(12)]}
    rows = [collect.row(Captions(), each) for each in collect.collect(plan, Captions(), ARMS, runs, foreign)]
    assert [row.name for row in rows] == ["greedy", "sampling", "ask", "first 2", "fix", "HALC"]
    assert [row.grade for row in rows] == ["derived", "derived", "derived", "", "derived", ""]
    found = compare.compare("toy", rows, draws=200)
    cells = {line.name: {k: c.value for k, c in line.cells.items()} for line in found.lines}
    assert cells["greedy"]["chair_s"] == pytest.approx(100 / 3)
    assert cells["first 2"]["chair_s"] == cells["fix"]["chair_s"] == 0
    assert cells["greedy"]["ms_per_token"] == 50
    assert "ms_per_token" not in cells["first 2"]
    assert cells["fix"]["extra_rows"] == 1
    assert any("2 seeds" in note for note in found.lines[1].notes)
    paths = suite.write(found, tmp_path / "tables")
    assert [path.name for path in paths] == ["table.md", "table.tex", "table.json", "forest.svg"]
    assert json.loads(paths[2].read_text())["items"] == 12

    other = [{"id": "0", "text": "", "prompt": "What"}, *foreign["HALC"][1:]]
    with pytest.raises(UsageError, match="'0' was asked 'What'"):
        collect.collect(plan, Captions(), ARMS, runs, {"HALC": other})


def test_failed_items_are_told_in_the_notes(tmp_path):
    class Broken(Fake):
        def answer(self, items, images, settings):
            if any(item.id == "3" for item in items):
                raise ValueError("no")
            return super().answer(items, images, settings)

    plan = grid.parse({"benchmarks": ["text"]})
    runs = suite.run(plan, Captions(), [GREEDY], Broken, tmp_path)
    (each,) = collect.collect(plan, Captions(), [GREEDY], runs)
    row = collect.row(Captions(), each)
    assert row.notes[0] == "1 items failed and are not scored, first '3': ValueError: no"
    assert len(row.score.ids) == 11


def test_a_dry_run_only_estimates(tmp_path):
    plan = grid.parse({"benchmarks": ["text"], "limit": 6})
    runs = suite.run(plan, Captions(), [GREEDY], Fake, tmp_path, dry=True)
    assert runs[0].estimate.items == 6
    assert not list(tmp_path.iterdir())


def test_paper_protocol_pads_and_says_what_the_paper_said(tmp_path):
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "a.png")
    square = protocol.squared(tmp_path / "a.png", (122, 116, 104))
    assert square.size == (20, 20)
    pixels = np.asarray(square)
    assert (pixels[:5] == (122, 116, 104)).all()
    assert (pixels[5:15] == (255, 0, 0)).all()
    open_ = protocol.opener(protocol.PAPER["llava"], {"image_mean": [0.48, 0.45, 0.4]}, None)
    assert open_(tmp_path / "a.png").getpixel((0, 0)) == (122, 114, 102)
    assert protocol.opener(protocol.HF, {}, str.upper)("a") == "A"
    with pytest.raises(UsageError, match="no paper protocol is known for gemma3"):
        protocol.find("paper", "gemma3")
    with pytest.raises(UsageError, match="image_mean"):
        protocol.opener(protocol.PAPER["llava"], {}, None)


def test_pictures_of_a_folder_are_found_by_name(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    open_ = suite.folder(str(tmp_path), Captions().items())
    assert open_("0.png") == tmp_path / "0.png"
    with pytest.raises(UsageError, match=r"no picture 1\.png"):
        open_("1.png")
    with pytest.raises(UsageError, match=r"holds none of the 12 pictures"):
        suite.folder(str(tmp_path / "none"), Captions().items())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("llava", tmp_path_factory.mktemp("hub") / "tiny-llava")


def test_a_real_model_answers_and_describes_itself(checkpoint, tmp_path):
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "0.png")
    plan = grid.parse({"benchmarks": ["text"], "generation": {"max_new_tokens": 4}, "limit": 1})
    arms = [GREEDY, Arm("ends", "baseline", settings={"eos_bias": 100.0})]
    open_ = Opener(str(checkpoint), device="cpu")
    plain = open_(GREEDY).vlm
    with pytest.raises(Refusal, match="no end token"):
        VlmAnswerer(plain).answer([], [], {"eos_bias": 1.0})
    plain.model.generation_config.eos_token_id = plain.processor.tokenizer.eos_token_id
    runs = suite.run(plan, Captions(), arms, open_, tmp_path / "out", pictures=lambda name: tmp_path / name)
    assert [run.outcome.failed for run in runs] == [0, 0]
    spec = runs[0].spec
    assert spec.template.count("{prompt}") == 1
    assert spec.processor["image_processor"]["image_mean"]
    assert spec.weights["dtype"] == "float32"
    assert spec.recipe == "greedy"
    first, second = (run.store.records()[0] for run in runs)
    assert first["tokens"] == 4
    assert second["tokens"] == 1  # the biased end token comes at once
    with pytest.raises(Refusal, match="greedy: the placebo heads needs an attention method"):
        open_(Arm("p", "placebo", "greedy", settings={"placebo": "heads"}))


def test_score_type_is_what_the_suite_joins():
    assert isinstance(Captions().score([{"id": "0", "text": "cat"}]), Score)
