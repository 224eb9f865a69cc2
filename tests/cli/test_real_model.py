"""The commands on a real, tiny checkpoint: what they say is what the model did."""

import json
import shutil

import pytest
from PIL import Image

import vlmfix

from ..families.checkpoints import make_checkpoint

pytestmark = pytest.mark.xdist_group("checkpoint")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture
def noisy(tmp_path):
    """A folder of four different pictures."""
    folder = tmp_path / "noisy"
    folder.mkdir()
    for number in range(4):
        Image.effect_noise((16, 12 + number), 80).convert("RGB").save(folder / f"{number}.png")
    return folder


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_run(vlmfix_says, checkpoint, noisy, tmp_path):
    out = tmp_path / "answers.jsonl"
    result = vlmfix_says(
        "run", noisy, "-p", "Describe the image.", "--model", checkpoint, "--method", "greedy; vcd", "--batch-size", 3,
        "--max-new-tokens", 6, "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = lines(out.read_text())
    assert len(found) == 8
    vlm = vlmfix.load(checkpoint, "vcd", device="cpu")
    for record in found:
        assert record["tokens"] <= 6
        assert record["seconds"] > 0
    by_hand = [vlm.answer(noisy / f"{n}.png", "Describe the image.", max_new_tokens=6) for n in range(4)]
    assert [record["text"] for record in found if record["recipe"] == "vcd"] == by_hand
    report = found[-1]["report"]
    assert report["recipe"] == "vcd"
    assert report["branches"] == 1
    assert (report["visual_tokens"], report["pictures"]) == (9, 1)
    assert "visual tokens an item: 9" in result.stderr


def test_a_method_that_did_nothing_is_named(vlmfix_says, checkpoint, noisy):
    rows = [{"image": "0.png", "prompt": "a"}, {"image": None, "prompt": "b"}]
    (noisy / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", checkpoint, "--device", "cpu", "--max-new-tokens", 2, "--method", "vcd")
    assert "vcd did nothing for 1 of 2 answers: no row has a picture" in vlmfix_says("run", noisy, *common).stderr


def test_sampled_answers_do_not_depend_on_the_batch(vlmfix_says, checkpoint, noisy):
    def sampled(batch, seed):
        arguments = ("--temperature", 1, "--seed", seed, "--batch-size", batch, "--max-new-tokens", 6, "--json")
        result = vlmfix_says("run", noisy, "-p", "What?", "--model", checkpoint, "--device", "cpu", *arguments)
        return [record["text"] for record in lines(result.stdout)]

    assert sampled(1, 5) == sampled(4, 5)
    assert sampled(4, 5) != sampled(4, 6)


def test_each_picture_is_encoded_once(vlmfix_says, checkpoint, noisy, monkeypatch):
    """Twelve prompts about four pictures: the vision tower sees four pictures."""
    import vlmfix.api

    seen = []
    load = vlmfix.api.load

    def watched(*arguments, **options):
        vlm = load(*arguments, **options)
        tower = next(module for name, module in vlm.model.named_modules() if name.endswith("vision_tower"))
        tower.register_forward_pre_hook(
            lambda module, inputs, options: seen.append(len(next(iter([*inputs, *options.values()])))), with_kwargs=True
        )
        return vlm

    monkeypatch.setattr(vlmfix.api, "load", watched)
    rows = [{"image": f"{n}.png", "prompt": f"Is there {what}?"} for n in range(4) for what in ("a cat", "salt", "x")]
    (noisy / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--model", checkpoint, "--device", "cpu", "--max-new-tokens", 3, "--json", "--batch-size", 2)
    result = vlmfix_says("run", noisy, *common)
    assert len(lines(result.stdout)) == 12
    assert sum(seen) == 4


def test_compare(vlmfix_says, checkpoint, noisy):
    result = vlmfix_says(
        "compare", noisy / "0.png", "What is it?", "--model", checkpoint, "--methods", "greedy; vcd(alpha=3); m3id",
        "--max-new-tokens", 8, "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    texts = [record["text"] for record in json.loads(result.stdout)]
    assert len(set(texts)) > 1


def test_profile(vlmfix_says, checkpoint):
    result = vlmfix_says(
        "profile", "--model", checkpoint, "--methods", "greedy; vcd", "--tokens", 4, "--repeats", 1, "--json",
        "--device", "cpu",
    )  # fmt: skip
    rows = json.loads(result.stdout)
    assert all(row["decode_ms"] > 0 and row["first_token_ms"] > row["decode_ms"] for row in rows)


def broken(checkpoint, folder, *without, **config):
    shutil.copytree(checkpoint, folder)
    for name in without:
        (folder / name).unlink()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda c, f: f / "nothing-here", "no such folder"),
        (lambda c, f: broken(c, f / "m", "config.json"), "no config.json"),
        (lambda c, f: broken(c, f / "m", "preprocessor_config.json", "processor_config.json"), "processor"),
        (lambda c, f: broken(c, f / "m", model_type="llama"), "not a vision-language model"),
        (lambda c, f: broken(c, f / "m", "model.safetensors"), "safetensors"),
    ],
    ids=["missing", "no config", "no processor", "text only", "no weights"],
)
def test_model_folders_that_cannot_work(vlmfix_says, checkpoint, noisy, tmp_path, make, words):
    result = vlmfix_says("run", noisy, "-p", "?", "--model", make(checkpoint, tmp_path), "--device", "cpu")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dtype", "bfloat61"], "did you mean bfloat16"),
        (["--device", "cdua"], "device 'cdua' is not known"),
        (["--quantize", "3bit"], "4bit or 8bit"),
        (["--device", "cpu", "--device-map", "auto"], "exclude each other"),
        (["--method", "vcd(alpha=high)"], "alpha"),
        (["--method", "vcd(beta=7)"], "vcd(beta=7)"),
    ],
)
def test_wrong_values(vlmfix_says, checkpoint, noisy, arguments, words):
    result = vlmfix_says("run", noisy, "-p", "?", "--model", checkpoint, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
