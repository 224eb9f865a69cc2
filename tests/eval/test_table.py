import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from rich.console import Console
from vlmfix.eval import compare, figures, foreign, guards, judge, table
from vlmfix.eval.base import Item, Score, ratio
from vlmfix.eval.benchmarks.answers import match

from vlmfix.errors import UsageError

ITEMS = [Item(f"q{n}", f"p{n // 2}.jpg", "Describe the image.") for n in range(80)]
WORDS = [
    "a",
    "dog",
    "and",
    "the",
    "red",
    "cat",
    "sit",
    "on",
    "one",
    "green",
    "chair",
    "beside",
    "two",
    "old",
    "blue",
    "bikes",
    "near",
    "some",
    "tall",
    "trees",
]


def records(cut=20, loop=0, seconds=1.0, only=None):
    """Answers of `cut` words, followed by the same four words `loop` times."""
    made = {}
    for n, item in enumerate(ITEMS):
        words = [WORDS[(n + k) % len(WORDS)] for k in range(cut)] + ["in", "the", "old", "park"] * loop
        made[item.id] = {
            "id": item.id,
            "text": " ".join(words),
            "tokens": len(words),
            "seconds": seconds,
            "peak_bytes": 2**21,
        }
    return {key: made[key] for key in (only or made)}


def chair(bad, found, ids=None):
    """A caption score: share of captions with a hallucination, and recall."""
    rng = np.random.default_rng(int(bad * 100))
    values = np.stack([rng.random(80) < bad, rng.random(80) < found, np.ones(80)], 1).astype(float)
    metrics = {"chair_s": ratio("bad", "all"), "recall": ratio("found", "all")}
    score = Score([i.id for i in ITEMS], [i.image for i in ITEMS], ("bad", "found", "all"), values, metrics)
    return guards.restrict(score, ids) if ids else score


def make(name, bad, found, kind="method", grade="ref-run", **how):
    return compare.row(name, ITEMS, [records(**how)], [chair(bad, found)], kind, grade)


@pytest.fixture(scope="module")
def comparison():
    rows = [
        make("greedy", 0.6, 0.9, "reference", ""),
        make("good", 0.1, 0.9),
        make("short", 0.05, 0.3, cut=8),
        make("loops", 0.15, 0.89, loop=10),
        make("same", 0.6, 0.9, "foreign", ""),
    ]
    return compare.compare("chair[standalone]", rows, draws=1000)


def test_text_guards_against_a_count_by_hand():
    items = [Item("1", "a", ""), Item("2", "b", ""), Item("3", "c", "")]
    texts = {"1": "One two three four. One two, three four!", "2": "It's new", "3": " \n"}
    score = guards.text_score(items, {key: {"text": text} for key, text in texts.items()})
    figures = score.figures()
    assert figures["length"] == pytest.approx((8 + 2 + 0) / 3)
    assert figures["rep_4"] == pytest.approx(100 * (1 / 5) / 3)  # five 4-grams, one of them twice
    assert figures["distinct_4"] == pytest.approx(80)
    assert figures["empty"] == pytest.approx(100 / 3)


def test_costs_are_blank_unless_every_record_has_them():
    items = ITEMS[:2]
    both = {
        "q0": {"seconds": 1.0, "tokens": 10, "extra_rows": 1},
        "q1": {"seconds": 3.0, "tokens": 30, "prefill_seconds": 0.1},
    }
    assert guards.cost_score(items, both).figures() == pytest.approx(
        {"ms_per_token": 100.0, "prefill_ms": float("nan"), "extra_rows": float("nan")}, nan_ok=True
    )
    one = {"q1": {"seconds": 3.0, "tokens": 30, "prefill_seconds": 0.1, "extra_rows": 2}}
    assert guards.cost_score(items, one).figures() == {"ms_per_token": 100.0, "prefill_ms": 100.0, "extra_rows": 2.0}
    assert guards.peak_mib(both) is None


def test_joined_scores_keep_both_meanings_of_a_column():
    first = Score(["1"], ["a"], ("n",), np.array([[2.0]]), {"x": ratio("n", "n", percent=False)})
    second = Score(
        ["1"], ["a"], ("n", "m"), np.array([[3.0, 6.0]]), {"y": ratio("n", "m", percent=False), "x": ratio("m", "m")}
    )
    assert guards.join(first, second).figures() == {"x": 1.0, "y": 0.5}
    with pytest.raises(UsageError, match="different items"):
        guards.join(first, Score(["2"], ["a"], ("n",), np.array([[2.0]]), {}))


def test_verdicts_need_holm_and_the_detectable_difference(comparison):
    cells = {line.name: line.cells for line in comparison.lines}
    assert cells["greedy"]["chair_s"].difference is None
    assert cells["good"]["chair_s"].verdict == "better"
    assert cells["short"]["recall"].verdict == "worse"
    assert cells["same"]["chair_s"].difference.difference == 0
    assert cells["same"]["chair_s"].verdict == ""
    assert cells["good"]["length"].verdict == ""  # no direction, no verdict
    assert comparison.tests == 8
    raw = sorted(c[m].difference.p for n, c in cells.items() if n != "greedy" for m in ("chair_s", "recall"))
    assert cells["good"]["chair_s"].p == pytest.approx(8 * raw[0])


def test_significant_but_below_the_detectable_difference_is_not_bold():
    gap = compare.stats.Difference(50, 45, -5.0, -9.0, -1.0, 0.01, 6.0, 80)
    assert compare._verdict("chair_s", gap, 0.02, 0.05) == ""
    assert compare._verdict("chair_s", gap, 0.06, 0.05) == ""
    large = compare.stats.Difference(50, 43, -7.0, -9.0, -1.0, 0.01, 6.0, 80)
    assert compare._verdict("chair_s", large, 0.02, 0.05) == "better"
    assert compare._verdict("chair_s", large, 0.06, 0.05) == ""


def test_a_gain_with_degenerate_text_warns(comparison):
    warnings = {line.name: " ".join(line.warnings) for line in comparison.lines}
    assert warnings["greedy"] == warnings["good"] == warnings["same"] == ""
    assert "gain (chair_s" in warnings["short"]
    assert "recall -" in warnings["short"]
    assert "length -60 %" in warnings["short"]
    assert "rep_4 +" in warnings["loops"]
    assert "distinct_4 -" in warnings["loops"]
    assert "answers loop" in warnings["loops"]


def test_yes_bias_warns():
    def pope(right, yes):
        values = np.array([[right(n), yes(n), 1.0] for n in range(80)], dtype=float)
        metrics = {"accuracy": ratio("right", "all"), "yes_ratio": ratio("yes", "all")}
        return Score([i.id for i in ITEMS], [i.image for i in ITEMS], ("right", "yes", "all"), values, metrics)

    rows = [
        compare.row("greedy", ITEMS, [records()], [pope(lambda n: n % 2, lambda n: n % 2)], "reference"),
        compare.row("yes", ITEMS, [records()], [pope(lambda n: n % 4, lambda n: n % 4 > 0)]),
    ]
    result = compare.compare("pope", rows, draws=500)
    assert "yes_ratio +25.0 (bound ±5)" in result.lines[1].warnings[0]
    assert list(result.metrics) == ["accuracy"]


@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("accuracy", 1),
        ("random accuracy", 1),
        ("chair_i", -1),
        ("CHAIRs", -1),
        ("yes_ratio", 0),
        ("recall", 1),
        ("color/acc+", 1),
        ("f1[strict]", 0),
    ],
)
def test_directions(name, sign):
    assert judge.direction(name) == sign


def test_rows_are_cut_to_common_items_and_the_rest_is_named():
    ids = [item.id for item in ITEMS][:60]
    part = compare.row("part", ITEMS, [records(only=ids)], [chair(0.1, 0.9)])
    result = compare.compare("t", [make("greedy", 0.6, 0.9), part], draws=200)
    assert result.items == 60
    assert result.notes == [
        "20 items without an answer in some row are left out of every row: q60, q61, q62, q63, q64, ..."
    ]
    with pytest.raises(UsageError, match="two rows are called 'greedy'"):
        compare.compare("t", [make("greedy", 0.6, 0.9)] * 2)


def test_several_seeds_are_pooled_and_their_spread_is_told():
    runs = [chair(0.3 + 0.01 * seed, 0.9) for seed in range(3)]
    row = compare.row("sampling", ITEMS, [records()] * 3, runs)
    result = compare.compare("t", [make("greedy", 0.6, 0.9), row], draws=200)
    assert result.lines[1].cells["chair_s"].value == pytest.approx(np.mean([r.figures()["chair_s"] for r in runs]))
    assert result.lines[1].notes[0].startswith("3 seeds: chair_s sd over seeds")


def test_every_format_shows_the_same_figures(comparison):
    built = table.build(comparison)
    text = table.markdown(built)
    value = f"{comparison.lines[1].cells['chair_s'].value:.1f}"
    assert f"**{value}** (-" in text
    assert "smallest detectable difference (80 % power): chair_s" in text
    assert "Warning: short: gain" in text
    assert all(len(line.split(" | ")) == len(built.heads) for line in text.splitlines() if line.startswith("| "))
    assert set(table.ALWAYS) <= {head.split(" ")[0] for head in built.heads}
    tex = table.latex(built)
    assert f"\\textbf{{{value}}}" in tex
    assert "chair\\_s $\\downarrow$" in tex
    loaded = json.loads(table.as_json(comparison))
    assert loaded["lines"][1]["cells"]["chair_s"]["value"] == comparison.lines[1].cells["chair_s"].value
    console = Console(width=400, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table.rich_table(built))
    assert value in console.export_text()


def test_guard_columns_are_blank_where_unknown(comparison):
    built = table.build(comparison, ["chair_s"])
    row = dict(zip(built.heads, built.rows[1], strict=True))
    assert row["f1"].text == row["unparsed"].text == ""
    assert row["peak_mib"].text == "2.0"
    assert row["recall"].text != ""
    with pytest.raises(UsageError, match="did you mean chair_s"):
        table.build(comparison, ["chairs"])


def test_names_are_escaped():
    rows = [make("a|b_c%<d>", 0.5, 0.9)]
    built = table.build(compare.compare("t", rows, draws=100))
    assert "a\\|b_c%<d>" in table.markdown(built)
    assert "a|b\\_c\\%<d>" in table.latex(built)


def test_figures_are_valid_svg(comparison):
    drawn = figures.forest(comparison)
    root = ET.fromstring(drawn)
    assert len(root.findall("{*}circle")) == 4
    curve = {"vcd <1>": [(80.0, 12.0, "alpha=.5"), (78.0, 10.0, "alpha=1"), (float("nan"), 3.0, "alpha=9")]}
    root = ET.fromstring(figures.frontier(curve, [(82.0, 14.0, "all"), (60.0, 9.0, "3 sentences")]))
    assert len(root.findall("{*}polyline")) == 2
    assert len(root.findall("{*}circle")) == 4
    with pytest.raises(UsageError, match="nothing to draw"):
        figures.frontier({})
    with pytest.raises(UsageError, match="no row has a difference"):
        figures.forest(comparison, "speed")


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (-3.2, 7.9), (1e-6, 2e-6), (-100.0, -99.9), (45.0, 45.0)])
def test_ticks_enclose(low, high):
    ticks = figures._ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8


class Plain:
    """A benchmark that finds items by id."""

    label, max_new_tokens = "plain", 512

    def items(self):
        return ITEMS

    def replies(self, records, problems):
        return match(ITEMS, records, problems)


def test_foreign_answers_must_answer_the_same_questions(tmp_path):
    good = [{"id": item.id, "text": "a dog", "prompt": "<image>\n" + item.prompt} for item in ITEMS]
    found, notes = foreign.checked("HALC", good, Plain(), ITEMS)
    assert [record["id"] for record in found] == [item.id for item in ITEMS]
    assert notes == []
    bare = [{"id": item.id, "text": ""} for item in reversed(ITEMS)]
    found, notes = foreign.checked("HALC", bare, Plain(), ITEMS[:5])
    assert [record["id"] for record in found] == ["q0", "q1", "q2", "q3", "q4"]
    assert "5 answers are not recorded" in notes[0]
    for records, message in [
        (good[1:], "HALC cannot be compared: 1 of 80 items are not answered: q0"),
        ([*good, good[0]], "1 repeated answers: q0"),
        ([*good, {"id": "x", "text": ""}], "1 answers whose id is not in the benchmark: x"),
        ([{**good[0], "prompt": "What is it?"}, *good[1:]], "'q0' was asked 'What is it"),
        ([{"id": "q0"}, *good[1:]], "1 records without text: q0"),
        ([{"id": "q0", "error": "e"}, *good[1:]], "1 errors"),
    ]:
        with pytest.raises(UsageError, match=message):
            foreign.checked("HALC", records, Plain(), ITEMS)
    (tmp_path / "halc.jsonl").write_text("")
    assert foreign.parse_add(f"HALC={tmp_path}/halc.jsonl") == ("HALC", tmp_path / "halc.jsonl")
    with pytest.raises(UsageError, match="not NAME=FILE"):
        foreign.parse_add("halc.jsonl")
    with pytest.raises(UsageError, match="does not exist"):
        foreign.parse_add("HALC=nowhere.jsonl")
