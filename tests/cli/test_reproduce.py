"""`vlmfix reproduce` lists, runs and judges published tables."""

import json

from vlmfix.eval import scenes


def test_published_tables_are_listed(vlmfix_says):
    said = vlmfix_says("reproduce")
    assert said.exit_code == 0
    assert "chair-llava15-opera" in said.stdout
    assert json.loads(vlmfix_says("reproduce", "--json").stdout)["pope-llava15"]["items"] == 5127


def test_a_table_runs_in_the_real_format_and_part_of_it_is_not_judged(vlmfix_says, tmp_path):
    folder = scenes.build(tmp_path / "scenes", 2)
    ids = tmp_path / "ids.txt"
    ids.write_text("0\n1\n")
    said = vlmfix_says(
        "reproduce", "chair-llava15-opera", "--model", "pico", "--protocol", "hf", "--truth", folder,
        "--images", folder / "images", "-O", f"ids={ids}", "-O", "max_new_tokens=24",
        "-o", tmp_path / "out", "--limit", 1,
    )  # fmt: skip
    assert said.exit_code == 1, said.stderr
    assert "beam 5" in said.stdout
    assert "not comparable: 1 of 500 items" in said.stdout
    assert (tmp_path / "out" / "chair-llava15-opera" / "verdict.md").read_text() == said.stdout.removesuffix("\n")


def test_wrong_usage_is_named(vlmfix_says):
    for arguments, message in (
        (["chair-llava"], "did you mean chair-llava15-opera"),
        (["chair-llava15-opera"], "give --truth"),
        (["pope-llava15", "-O", "parser"], "write KEY=VALUE"),
    ):
        said = vlmfix_says("reproduce", *arguments)
        assert said.exit_code == 2
        assert message in said.stderr
