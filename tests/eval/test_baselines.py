import numpy as np
import pytest
from vlmfix.eval import baselines, frontier
from vlmfix.eval.base import Item, Score, ratio
from vlmfix.eval.baselines import Arm

from vlmfix.errors import UsageError

ITEMS = [Item(f"{n}", f"{n}.jpg", "Describe the image.") for n in range(30)]
OBJECTS = ("cat", "dog", "fork", "bus")
"""cat and dog are in every picture, fork and bus in none; later words hallucinate more."""


def caption(n):
    words = ["a", "cat", "and", "a", "dog", "stand", "here.", "There", "is", "a", "fork", "and", "a", "bus", "too."]
    return " ".join(words[: 7 + n % 9])


RECORDS = [{"id": i.id, "text": caption(n), "seconds": 1.0, "margin": n - 10.5} for n, i in enumerate(ITEMS)]


def score(records):
    text = {r["id"]: r["text"] for r in records}
    kept = [i for i in ITEMS if i.id in text]
    rows = [[sum(o in text[i.id] for o in OBJECTS[k : k + 2]) for k in (0, 2)] + [2] for i in kept]
    values = np.array(rows, dtype=float)
    values = np.concatenate([values, values[:, :1] + values[:, 1:2]], 1)
    metrics = {"chair_i": ratio("bad", "said"), "recall": ratio("good", "there")}
    return Score([i.id for i in kept], [i.image for i in kept], ("good", "bad", "there", "said"), values, metrics)


def test_first_sentences_and_words():
    text = "A cat sits. It is 3.5 years old!  Does it?\nYes"
    assert baselines.first_sentences(text, 2) == "A cat sits. It is 3.5 years old!"
    assert baselines.first_sentences(text, 9) == "A cat sits. It is 3.5 years old! Does it? Yes"
    assert baselines.first_words(" A  cat\nsits here", 3) == " A  cat\nsits"
    assert baselines.first_words("A", 0) == baselines.first_words("", 5) == ""


def test_trivial_arms():
    names = [arm.name for arm in baselines.trivial(captions=True)]
    assert names == ["ask for what is clear", "first 2 sentences", "first 4 sentences", "end bias 1"]
    yes_no = baselines.trivial(captions=False, offset=-0.5)
    assert yes_no[-1].derive == ("offset", -0.5)
    assert len(baselines.trivial(captions=False)) == 1
    assert all(arm.kind == "baseline" for arm in yes_no)


def test_derived_records_carry_no_cost():
    arm = Arm("first", "baseline", derive=("sentences", 1))
    made = baselines.derived(arm, [*RECORDS, {"id": "x", "error": "no picture"}])
    assert len(made) == 30
    assert made[8]["text"] == "a cat and a dog stand here."
    assert all("seconds" not in record for record in made)


def test_offset_moves_the_threshold_and_needs_margins():
    made = baselines.derived(Arm("o", derive=("offset", 5.0)), RECORDS)
    assert [r["text"] for r in made].count("Yes") == sum(r["margin"] > 5 for r in RECORDS) == 14
    with pytest.raises(UsageError, match="'7' has no yes-no margin"):
        baselines.derived(Arm("o", derive=("offset", 0)), [{"id": "7", "text": "Yes"}])
    with pytest.raises(UsageError, match="did you mean offset"):
        Arm("o", derive=("ofset", 0))
    with pytest.raises(UsageError, match="not derived"):
        baselines.derived(baselines.GREEDY, RECORDS)


def test_the_offset_is_the_best_threshold_of_the_tuning_items():
    items = [Item(f"{n}", f"{n}.jpg", "", {"label": "yes" if n > 17 else "no"}) for n in range(30)]
    offset = baselines.offset_of(items, RECORDS)
    made = baselines.derived(Arm("o", derive=("offset", offset)), RECORDS)
    assert [r["text"] for r in made] == ["No"] * 18 + ["Yes"] * 12
    with pytest.raises(UsageError, match="'3' has no yes-no margin"):
        baselines.offset_of(items, [*RECORDS[:3], {"id": "3", "text": "Yes"}])
    with pytest.raises(UsageError, match="no tuning item"):
        baselines.offset_of(items, [])


@pytest.mark.parametrize(
    ("recipe", "changed"),
    [
        ("vcd", "vcd(alpha=0)"),
        ("vcd(alpha=1)", "vcd(alpha=0)"),
        ("fastv(keep=.33) + vcd(alpha=1, beta=.1)", "fastv(keep=.33)+vcd(beta=.1, alpha=0)"),
        ("m.py:A(f=g(1, alpha=2))+vcd(layers=[1, 2])", "m.py:A(f=g(1, alpha=2))+vcd(layers=[1, 2], alpha=0)"),
    ],
)
def test_recipe_texts_are_edited_in_place(recipe, changed):
    assert baselines.with_value(recipe, "vcd", "alpha", 0) == changed


def test_recipes_without_the_method_are_refused():
    with pytest.raises(UsageError, match="has no method 'vcd'; it has var"):
        baselines.with_value("var", "vcd", "alpha", 0)
    with pytest.raises(UsageError, match="not METHOD"):
        baselines.methods_of("var+")


def test_contrastive_rows_bring_their_controls():
    arms = baselines.controls(["greedy", "var", "vcd(alpha=1)", "vcd(alpha=2)"], {"vcd": "alpha", "icd": "alpha"})
    assert [arm.name for arm in arms] == ["sampling", "sampling + mask: vcd(alpha=0)"]
    assert all(arm.settings["do_sample"] for arm in arms)
    assert baselines.controls(["greedy", "var"], {"vcd": "alpha"}) == []


def test_placebos_keep_the_strength():
    arms = baselines.placebos("var(move=.6)", ["text-keys", "heads"], seed=3)
    assert [arm.settings for arm in arms] == [
        {"placebo": "text-keys", "placebo_seed": 3},
        {"placebo": "heads", "placebo_seed": 3},
    ]
    assert {arm.recipe for arm in arms} == {"var(move=.6)"}
    with pytest.raises(UsageError, match="did you mean heads"):
        baselines.placebos("var", ["head"])


def test_other_pictures_are_a_permutation_without_fixed_point():
    items = [Item(f"{n}", f"{n // 3}.jpg", "") for n in range(30)]
    swapped = baselines.other_pictures(items, seed=1)
    assert set(swapped) == set(swapped.values()) == {item.image for item in items}
    assert all(a != b for a, b in swapped.items())
    assert baselines.other_pictures(items, seed=1) == swapped
    with pytest.raises(UsageError, match="two pictures"):
        baselines.other_pictures(items[:3])


def test_sweep_names_each_strength():
    arms = frontier.sweep("var+vcd(alpha=1)", "vcd", "alpha", [0.5, 2])
    assert [(a.name, a.recipe) for a in arms] == [
        ("alpha=0.5", "var+vcd(alpha=0.5)"),
        ("alpha=2", "var+vcd(alpha=2)"),
    ]


def test_reference_curve_ends_with_the_uncut_answers():
    curve = frontier.reference_curve(RECORDS, score, limits=(2, 7, 99))
    assert [label for _, _, label in curve] == ["2 words", "7 words", "uncut"]
    assert curve[0][:2] == (50.0, 0.0)  # a cat
    assert curve[1][:2] == (100.0, 0.0)  # a cat and a dog stand here.
    assert curve[2][1] > 20
    with pytest.raises(UsageError, match="'speed'"):
        frontier.point(score(RECORDS), "", x="speed")


def test_a_method_that_only_shortens_gains_nothing_at_matched_length():
    shorter = [{**r, "text": baselines.first_words(r["text"], 9)} for r in RECORDS]
    found = frontier.matched(ITEMS, RECORDS, shorter, score, draws=200)
    assert found.limit == 9
    assert found.length == found.cut_length
    assert found.differences["chair_i"].difference == 0
    honest = [{**r, "text": r["text"].replace("fork", "cat").replace("bus", "dog")} for r in RECORDS]
    found = frontier.matched(ITEMS, RECORDS, honest, score, draws=200)
    assert found.differences["chair_i"].high < 0
    longer = [{**r, "text": r["text"] + " so so so"} for r in RECORDS]
    assert frontier.matched(ITEMS, RECORDS, longer, score, draws=50).cut_length == pytest.approx(
        np.mean([len(r["text"].split()) for r in RECORDS])
    )
