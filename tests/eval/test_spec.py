import json
import subprocess
import sys

import pytest
from vlmfix.eval.base import Item
from vlmfix.eval.spec import Spec, canonical, digest, hash_files, hash_questions, hash_truth

from vlmfix.errors import UsageError

BASE = {"model": "m", "recipe": "vcd(alpha=1)", "benchmark": "pope", "questions": "abc"}


def test_canonical_json_is_one_text():
    assert canonical({"b": 1.0, "a": [True, None, (0.1, "é")]}) == '{"a":[true,null,[0.1,"é"]],"b":1}'
    assert digest({"x": 1, "y": 2}) == digest({"y": 2.0, "x": 1})
    assert digest({"x": 0.1}) != digest({"x": 0.1 + 1e-16 * 2})
    assert digest({"x": "1"}) != digest({"x": 1})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": float("nan")}}, r"spec\.a\.b is nan"),
        ({"a": [0, {1}]}, r"spec\.a\[1\] is a set"),
        ({3: 1}, "key 3"),
    ],
)
def test_values_without_canonical_form_are_named(value, message):
    with pytest.raises(UsageError, match=message):
        canonical(value)


def test_hash_is_the_same_in_another_process():
    code = f"from vlmfix.eval.spec import Spec; print(Spec(**{BASE!r}).hash)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == Spec(**BASE).hash


def test_every_field_changes_the_hash_and_only_judging_leaves_the_answers():
    spec = Spec(**BASE)
    changes = {
        "model": "n", "recipe": "greedy", "benchmark": "chair", "questions": "x", "truth": "t", "scorer": "official",
        "revision": "r1", "recipe_json": {"alpha": 1}, "protocol": "paper", "processor": {"size": 336},
        "template": "USER: {}", "generation": {"max_new_tokens": 8}, "weights": {"dtype": "bfloat16"}, "seed": 1,
    }  # fmt: skip
    assert set(changes) == set(spec.to_json())
    for key, value in changes.items():
        other = Spec(**{**BASE, key: value})
        assert other.hash != spec.hash, key
        assert (other.answers_hash == spec.answers_hash) == (key in ("truth", "scorer")), key


def test_round_trip_through_a_file(tmp_path):
    spec = Spec(**BASE, generation={"max_new_tokens": 8}, seed=3)
    path = spec.write(tmp_path / "new")
    assert Spec.from_json(json.loads(path.read_text())) == spec
    assert spec.hash[:16] in path.name


def test_wrong_keys_are_named():
    with pytest.raises(UsageError, match="'protcol' in a spec; did you mean protocol"):
        Spec.from_json({**BASE, "protcol": "hf"})
    with pytest.raises(UsageError, match="benchmark"):
        Spec.from_json({"model": "m", "recipe": "r", "questions": "q"})


def test_data_hashes(tmp_path):
    items = [Item("1", "a.jpg", "Is there a dog?", {"label": "yes"})]
    other = [Item("1", "a.jpg", "Is there a dog?", {"label": "no"})]
    assert hash_questions(items) == hash_questions(other)
    assert hash_truth(items) != hash_truth(other)
    (tmp_path / "x").write_bytes(b"1")
    before = hash_files([tmp_path / "x"])
    (tmp_path / "x").write_bytes(b"2")
    assert hash_files([tmp_path / "x"]) != before
