import itertools
from math import comb

import numpy as np
import pytest
from vlmfix.eval import resample, stats
from vlmfix.eval.base import Score, ratio

from vlmfix.errors import UsageError


def score(values, clusters=None, columns=("bad", "all"), ids=None):
    values = np.asarray(values, dtype=np.float64)
    ids = ids or [f"i{n}" for n in range(len(values))]
    return Score(ids, clusters or ids, columns, values, {"rate": ratio("bad", "all")})


def random_pair(rng, clusters, questions, effect=0.0):
    """Binary answers with a picture effect shared by questions and runs."""
    base = rng.normal(0, 1, (clusters, 1))
    draw = lambda shift: (rng.normal(0, 1, (clusters, questions)) + base > 0.5 - shift).astype(float)  # noqa: E731
    names = [f"p{c}" for c in range(clusters) for _ in range(questions)]
    make = lambda x: score(np.stack([x.ravel(), np.ones(x.size)], 1), names)  # noqa: E731
    return make(draw(0.0)), make(draw(effect))


def test_bootstrap_equals_a_loop_over_the_same_weights():
    rng = np.random.default_rng(3)
    a, b = random_pair(rng, 7, 4)
    result = stats.paired(a, b, draws=200, seed=5)["rate"]
    rates = []
    for weight in np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=200):
        top = {"a": 0.0, "b": 0.0}
        total = 0.0
        for cluster in range(7):
            rows = slice(4 * cluster, 4 * cluster + 4)
            top["a"] += weight[cluster] * a.values[rows, 0].sum()
            top["b"] += weight[cluster] * b.values[rows, 0].sum()
            total += weight[cluster] * 4
        rates.append(100 * (top["b"] - top["a"]) / total)
    assert [result.low, result.high] == pytest.approx(list(np.quantile(rates, [0.025, 0.975])))
    assert result.difference == pytest.approx(b.figures()["rate"] - a.figures()["rate"])
    assert result.detectable == pytest.approx(2.801585 * np.std(rates, ddof=1), rel=1e-5)


def test_sign_flip_enumerates_every_swap_of_pictures():
    rng = np.random.default_rng(0)
    a, b = random_pair(rng, 6, 3, 1.0)
    observed = abs(b.figures()["rate"] - a.figures()["rate"])
    hits = 0
    for flips in itertools.product([False, True], repeat=6):
        mask = np.repeat(flips, 3)[:, None]
        x, y = np.where(mask, b.values, a.values).sum(0), np.where(mask, a.values, b.values).sum(0)
        hits += abs(100 * y[0] / y[1] - 100 * x[0] / x[1]) >= observed - 1e-9
    assert stats.paired(a, b, draws=50)["rate"].p == hits / 64


def test_random_sign_flips_approach_the_exact_test(monkeypatch):
    a, b = random_pair(np.random.default_rng(4), 12, 3, 0.6)
    exact = stats.paired(a, b, draws=50)["rate"].p
    monkeypatch.setattr(resample, "EXACT_CLUSTERS", 0)
    assert stats.paired(a, b, draws=20_000)["rate"].p == pytest.approx(exact, abs=0.02)


def test_intervals_cover_and_the_test_holds_its_size():
    rng = np.random.default_rng(1)
    covered, rejected, naive = 0, 0, 0
    for _ in range(300):
        a, b = random_pair(rng, 60, 6)
        found = stats.paired(a, b, draws=400)["rate"]
        covered += found.low <= 0 <= found.high
        rejected += found.p < 0.05
        one = stats.interval(a, draws=400)["rate"]
        naive += one.low <= 100 * 0.36184 <= one.high  # P(N(0, 2) > .5)
    assert 0.91 <= covered / 300 <= 0.985
    assert 0.02 <= rejected / 300 <= 0.085
    assert 0.90 <= naive / 300 <= 0.985


def test_detectable_difference_is_found_with_the_promised_power():
    rng = np.random.default_rng(2)
    shift = 0.4
    pairs = [random_pair(rng, 60, 4, shift) for _ in range(200)]
    results = [stats.paired(a, b, draws=400)["rate"] for a, b in pairs]
    true = np.mean([r.difference for r in results])
    promised = np.mean([r.detectable for r in results])
    power = np.mean([r.p < 0.05 for r in results])
    assert abs(true - promised) < 1.5  # the effect was chosen near the detectable one
    assert 0.65 < power < 0.92


def test_ignoring_the_clusters_would_be_wrong():
    a, _ = random_pair(np.random.default_rng(7), 40, 6)
    alone = score(a.values)
    assert stats.interval(a)["rate"].sd > 1.3 * stats.interval(alone)["rate"].sd


def test_mcnemar_is_the_binomial_test_and_refuses_dependent_answers():
    a = score([[1, 1]] * 10 + [[0, 1]] * 12)
    b = score([[0, 1]] * 8 + [[1, 1]] * 4 + [[0, 1]] * 10)
    found = stats.mcnemar(a, b, "bad")
    assert (found.gained, found.lost) == (2, 8)
    assert found.p == pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10)
    assert stats.mcnemar(a, a, "bad").p == 1.0
    dependent = score(a.values, ["p"] * 22)
    with pytest.raises(UsageError, match="one answer per picture"):
        stats.mcnemar(dependent, dependent, "bad")
    with pytest.raises(UsageError, match="0/1"):
        stats.mcnemar(score([[2, 1]]), score([[1, 1]]), "bad")


def test_mcnemar_with_thousands_of_discordant_pairs():
    a, b = score([[1, 1]] * 2100 + [[0, 1]] * 2000), score([[0, 1]] * 2100 + [[1, 1]] * 2000)
    assert stats.mcnemar(a, b, "bad").p == pytest.approx(0.1222, abs=2e-3)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    mixed = stats.holm([0.02, float("nan"), 0.01])
    assert mixed[0] == pytest.approx(0.02)
    assert np.isnan(mixed[1])
    assert mixed[2] == pytest.approx(0.02)


def test_seed_and_item_variance_are_told_apart():
    rng = np.random.default_rng(8)
    chance = rng.beta(1, 1, 400)
    runs = [score(np.stack([rng.random(400) < chance, np.ones(400)], 1)) for _ in range(6)]
    found = stats.spread(runs)["rate"]
    assert found.seed_sd == pytest.approx(100 * np.sqrt((chance * (1 - chance)).mean() / 400), rel=0.6)
    assert found.item_sd == pytest.approx(100 * chance.std() / 20, rel=0.25)
    assert found.low < found.mean < found.high
    assert found.seeds == 6
    with pytest.raises(UsageError, match="two seeds"):
        stats.spread(runs[:1])


def test_rows_are_paired_by_id_and_strangers_are_named():
    a = score([[1, 1], [0, 1], [0, 1]], ids=["x", "y", "z"])
    b = score([[0, 1], [0, 1], [1, 1]], ids=["z", "y", "x"])
    assert stats.paired(a, b)["rate"].difference == 0
    with pytest.raises(UsageError, match=r"only in the reference \(z\).*only in the other run \(w\)"):
        stats.paired(a, score([[1, 1], [0, 1], [0, 1]], ids=["x", "y", "w"]))
    with pytest.raises(UsageError, match="twice: x"):
        stats.paired(a, score([[1, 1], [0, 1], [0, 1]], ids=["x", "x", "z"]))
    with pytest.raises(UsageError, match="another picture"):
        stats.paired(a, score([[1, 1], [0, 1], [0, 1]], ["x", "q", "z"], ids=["x", "y", "z"]))
    with pytest.raises(UsageError, match="columns differ"):
        stats.paired(a, score([[1, 1]] * 3, columns=("good", "all"), ids=["x", "y", "z"]))
    with pytest.raises(UsageError, match="'speed'"):
        stats.paired(a, b, metrics=["speed"])


def test_one_picture_and_empty_denominators_give_nan_not_certainty():
    one = stats.paired(score([[1, 1]]), score([[0, 1]]))["rate"]
    assert np.isnan(one.low)
    assert np.isnan(one.detectable)
    assert one.p == 1.0
    empty = stats.paired(score([[0, 0]] * 20), score([[0, 0]] * 20))["rate"]
    assert np.isnan(empty.difference)
    assert np.isnan(empty.p)
    with pytest.raises(UsageError, match="no item"):
        stats.interval(Score([], [], ("bad", "all"), np.zeros((0, 2)), {"rate": ratio("bad", "all")}))
