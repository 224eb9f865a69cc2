import itertools
import json

import numpy as np
import pytest
from vlmfix.eval import candidates, grid, measure, tune
from vlmfix.eval.base import Item, Score, ratio
from vlmfix.eval.questions import Questions, too_few
from vlmfix.eval.scenes import build
from vlmfix.eval.tune import Trial

from vlmfix.errors import UsageError, VlmfixError

ITEMS = [Item(f"q{n}", f"p{n // 2}.png", "Is it?") for n in range(400)]


class World:
    """Hallucination falls with alpha, recall falls too beyond 1; vcd costs twice as much."""

    def __init__(self):
        self.calls = []

    def __call__(self, recipe, items):
        self.calls.append((recipe, len(items)))
        alpha = float(recipe.split("alpha=")[1].rstrip(")").split(",")[0]) if "alpha" in recipe else 0.0
        rng = np.random.default_rng(0)
        noise = {item.id: rng.random(2) for item in ITEMS}
        bad = 0.5 - 0.15 * alpha
        good = 0.9 - 0.3 * max(0.0, alpha - 1)
        values = np.array([[noise[i.id][0] < bad, noise[i.id][1] < good, 1] for i in items], dtype=float)
        metrics = {"chair_s": ratio("bad", "n"), "recall": ratio("good", "n"), "length": ratio("n", "n")}
        score = Score([i.id for i in items], [i.image for i in items], ("bad", "good", "n"), values, metrics)
        return score, 10.0 if recipe.startswith("vcd") else 5.0


def test_every_method_gets_the_same_number_of_candidates():
    grids = {"vcd": {"alpha": [0.5, 1, 2], "beta": [0.1, 0.2]}, "fastv+var(tau=3)": {"var.move": [1, 2, 3, 4]}}
    found = candidates.candidates(grids)
    assert [len(texts) for texts in found.values()] == [4, 4]
    assert found["fastv+var(tau=3)"][0] == "fastv+var(tau=3, move=1)"
    assert len(set(found["vcd"])) == 4
    assert candidates.candidates(grids) == found
    with pytest.raises(UsageError, match=r"has 4 candidates, 6 are asked for"):
        candidates.candidates(grids, 6)
    with pytest.raises(UsageError, match=r"write METHOD\.NAME"):
        candidates.candidates({"fastv+var": {"move": [1]}})
    with pytest.raises(UsageError, match="nothing to tune"):
        candidates.candidates({})


def test_halving_finds_the_best_setting_that_keeps_recall():
    world = World()
    recipes = candidates.candidates({"vcd": {"alpha": [0.1, 0.5, 1, 2]}, "m3id": {"alpha": [0.1, 0.2, 0.3, 0.4]}})
    found = tune.search(ITEMS, recipes, world, hallucination="chair_s", draws=500)
    assert found.chosen["vcd"].recipe == "vcd(alpha=1)"
    assert found.chosen["m3id"].recipe == "m3id(alpha=0.4)"
    assert found.n_candidates == 4
    gap = found.gains["vcd"]
    assert gap.difference == pytest.approx(-15, abs=4)
    assert gap.high < 0
    sizes = [count for recipe, count in world.calls if recipe.startswith("vcd")]
    assert sizes == [100] * 4 + [200] * 2 + [400]
    assert [count for recipe, count in world.calls if recipe == "greedy"] == [100, 200, 400]
    assert found.notes == []


def test_rounds_are_on_nested_pictures_whole():
    parts = [tune._share(ITEMS, share, 3) for share in (0.25, 0.5, 1.0)]
    for small, large in itertools.pairwise(parts):
        assert {i.id for i in small} < {i.id for i in large}
    assert len({i.image for i in parts[0]}) * 2 == len(parts[0])
    assert parts[2] == ITEMS


def test_too_few_items_are_said():
    recipes = candidates.candidates({"m3id": {"alpha": [0.1, 0.2]}})
    found = tune.search(ITEMS[:20], recipes, World(), hallucination="chair_s", rounds=1, draws=500)
    assert "below the smallest detectable difference" in found.notes[0]
    assert "20 items on 10 pictures: too few to tell" in found.notes[0]
    lossy = tune.search(ITEMS, {"vcd": ["vcd(alpha=3)"]}, World(), hallucination="chair_s", rounds=1, draws=200)
    assert lossy.chosen == {}
    assert "no candidate keeps recall" in lossy.notes[0]


def test_wrong_searches_are_refused():
    with pytest.raises(UsageError, match="equal numbers"):
        tune.search(ITEMS, {"a": ["a"], "b": ["b", "b(x=1)"]}, World(), hallucination="chair_s")
    with pytest.raises(UsageError, match="cannot tune for 'chair'; did you mean chair_s"):
        tune.search(ITEMS, {"a": ["a"]}, World(), hallucination="chair", rounds=1)
    with pytest.raises(UsageError, match="cannot tune for 'length'"):
        tune.search(ITEMS, {"a": ["a"]}, World(), hallucination="length", rounds=1)


def test_pareto_front():
    def trial(name, loss, recall, cost):
        return Trial("m", name, None, loss, recall, cost)

    every = [
        trial("a", 10, 80, 5),
        trial("b", 12, 80, 5),
        trial("c", 8, 70, 5),
        trial("d", 10, 80, 5.1),
        trial("e", 11, 79, 2),
    ]
    assert [t.recipe for t in tune.front(every)] == ["a", "c", "d", "e"]
    assert [t.recipe for t in tune.ranked(every)] == ["c", "a", "d", "e", "b"]


def test_the_test_split_is_refused(tmp_path):
    tune.check_split("tuning", ITEMS)
    for name, message in [("test", "of the split 'test' cannot be tuned on"), (None, "split is unknown")]:
        with pytest.raises(UsageError, match=message):
            tune.check_split(name, ITEMS)
    with pytest.raises(UsageError, match=r"1 pictures are in the test split too: p3\.png"):
        tune.check_split("own", ITEMS, {"p3.png", "x.png"})
    build(tmp_path / "scenes", n=1, split="tuning", seed=0)
    assert tune.split_of(tmp_path / "scenes") == "tuning"
    (tmp_path / "instances.json").write_text('{"info": {"description": "COCO 2014"}}')
    assert tune.split_of(tmp_path) is None
    assert tune.split_of(tmp_path / "nothing.json") is None


def test_a_preset_says_where_it_comes_from():
    recipes = candidates.candidates({"var+vcd(beta=0.1)": {"vcd.alpha": [0.5, 1]}})
    world = World()
    found = tune.search(
        ITEMS, recipes, lambda r, i: world(r.replace("beta=0.1, ", ""), i), hallucination="chair_s", draws=100
    )
    on = {"benchmark": "chair", "split": "tuning", "items": 400}
    entry = tune.preset(found, "var+vcd(beta=0.1)", "llava-hf/llava-1.5-7b-hf", on, "made by hand")
    assert entry["checkpoints"] == ["llava-1.5-7b-hf"]
    assert entry["methods"] == {"var": {}, "vcd": {"beta": 0.1, "alpha": 1}}
    assert entry["tuned_on"] == on
    assert entry["n_candidates"] == 2
    assert json.loads(json.dumps(entry)) == entry
    with pytest.raises(UsageError, match="nothing was chosen for 'var'"):
        tune.preset(found, "var", "m", on, "")


def test_grids_are_read(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text('[vcd]\nalpha = [0.5, 1]\n["fastv+var"]\n"var.move" = [0.5]\n')
    assert candidates.read_grids(path) == {"vcd": {"alpha": [0.5, 1]}, "fastv+var": {"var.move": [0.5]}}
    path.write_text("[vcd]\nalpha = 1\n")
    with pytest.raises(UsageError, match=r'\["vcd"\] must hold lists'):
        candidates.read_grids(path)


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.csv"
    rows = "".join(f"{n}.png,Is there a cat?,{'yes' if n % 2 else 'No'}\n" for n in range(20))
    path.write_text("image,question,answer\n" + rows)
    return path


def test_own_questions_are_a_benchmark(mine):
    questions = Questions(mine, suffix=" Yes or no?")
    items = questions.items()
    assert items[1] == Item("3", "1.png", "Is there a cat? Yes or no?", {"label": "yes", "question": "Is there a cat?"})
    said = ["Yes.", "no", "maybe", "yes, there is"]
    score = questions.score([{"id": item.id, "text": said[n % 4]} for n, item in enumerate(items)])
    figures = score.figures()
    # labels: no, yes, no, yes; said: yes, no, unparsed, yes
    assert figures["accuracy"] == 25
    assert figures["hallucination"] == 50
    assert figures["recall"] == 50
    assert figures["f1"] == pytest.approx(50)
    assert figures["unparsed"] == 25
    told = too_few(score)
    assert told.startswith("20 items on 20 pictures are too few")
    assert too_few(score, wanted=100) == ""


def test_wrong_questions_are_named_by_line(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("image,question,answer\na.png,Is it?,maybe\n,Is it?,yes\nb.png,Is it?,yes\n")
    with pytest.raises(UsageError, match=r"mine\.csv: line 2: needs image, question and an answer yes or no; line 3"):
        Questions(path).items()
    path.write_text("image,question,answer\n")
    with pytest.raises(UsageError, match="holds no question"):
        Questions(path).items()


class Model:
    """Answers yes where alpha is too small; counts what it is asked."""

    asked = 0

    def __init__(self, arm):
        self.arm = arm

    def describe(self):
        return {"model": "m", "recipe": self.arm.recipe}

    def answer(self, items, images, settings):
        Model.asked += len(items)
        if self.arm.recipe == "dead" and items[0].id == "2":
            raise ValueError("no")
        right = "alpha=2" in self.arm.recipe
        return [
            {"id": i.id, "text": "yes" if not right or int(i.id) % 2 else "no", "seconds": 1.0, "tokens": 1}
            for i in items
        ]


def test_tuning_on_own_questions_end_to_end(mine, tmp_path):
    questions = Questions(mine)
    run = measure.measurer(grid.parse({"benchmarks": ["text"]}), questions, Model, tmp_path / "out")
    Model.asked = 0
    recipes = {"vcd": ["vcd(alpha=1)", "vcd(alpha=2)"]}
    found = tune.search(questions.items(), recipes, run, hallucination="hallucination", draws=200, rounds=2)
    assert found.chosen["vcd"].recipe == "vcd(alpha=2)"
    assert found.chosen["vcd"].cost == 1000
    assert found.gains["vcd"].difference == -100
    assert Model.asked == 10 + 20 + 20  # one candidate half, the other and greedy whole, nothing twice
    with pytest.raises(VlmfixError, match="dead: 1 tuning items failed, first '2': ValueError: no"):
        run("dead", questions.items())
