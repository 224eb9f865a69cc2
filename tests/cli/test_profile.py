"""`vlmfix profile`: one row per recipe, against the first."""

import json


def test_profile(vlmfix_says, fake_model):
    result = vlmfix_says(
        "profile", "--methods", "greedy; var", "--tokens", 4, "--repeats", 2, "--batch-size", 3, "--json"
    )
    assert result.exit_code == 0
    rows = json.loads(result.stdout)
    assert [row["recipe"] for row in rows] == ["greedy", "var"]
    assert rows[0]["decode_ratio"] == 1
    asked = [call for call in fake_model if "max" in call]
    assert [(call["max"], call["min_new_tokens"]) for call in asked] == [(1, 1), (4, 4)] * 6
    assert {len(call["images"]) for call in asked} == {3}


def test_table(vlmfix_says, fake_model, photos):
    result = vlmfix_says("profile", "--image", photos / "2.png", "--tokens", 2, "--repeats", 1)
    assert "further token ms" in result.stdout
    assert result.stdout.count("\n") == 5
