"""The public way in: load, wrap, answer, generate, and what they say when something is wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlmfix
from vlmfix.errors import PictureError, UsageError

from .duties.table import TABLE
from .families import build
from .families.checkpoints import make_checkpoint

ASK = "What is on the table?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def vlm(folder):
    return vlmfix.load(folder, "vcd(alpha=0.5,beta=0)", device="cpu")


def picture(seed, width=30, height=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_public_names():
    for name in ("load", "wrap", "applied", "FixedVLM", "Answer", "Recipe", "Refusal", "VlmfixError", "VAR", "VCD"):
        assert name in dir(vlmfix)
        assert getattr(vlmfix, name) is not None
    assert issubclass(vlmfix.Refusal, vlmfix.VlmfixError)
    with pytest.raises(AttributeError, match="no attribute 'VRA'"):
        vlmfix.VRA  # noqa: B018


def test_one_in_one_out_lists_in_lists_out(vlm):
    pictures = [picture(i) for i in range(3)]
    one = vlm.answer(pictures[0], ASK, max_new_tokens=5)
    assert isinstance(one, str)
    many = vlm.answer(pictures, ASK, max_new_tokens=5)
    assert many == [vlm.answer(p, ASK, max_new_tokens=5) for p in pictures]
    assert vlm.answer([pictures[0]], ASK, max_new_tokens=5) == [one]
    two = vlm.answer(pictures[0], [ASK, "How many?"], max_new_tokens=5)
    assert two == [one, vlm.answer(pictures[0], "How many?", max_new_tokens=5)]
    assert vlm.answer([], []) == []


def test_rows_with_other_numbers_of_pictures_keep_their_places(vlm):
    a, b = picture(1), picture(2)
    images = [None, a, [a, b], b, None]
    prompts = [f"{ASK} {i}" for i in range(5)]
    together = vlm.answer(images, prompts, max_new_tokens=5, details=True)
    assert [x.evidence["visual_tokens"] for x in together] == [0, 9, 18, 9, 0]
    for image, prompt, answer in zip(images, prompts, together, strict=True):
        assert vlm.answer([image], [prompt], max_new_tokens=5) == [answer.text]


def test_details(vlm, tmp_path):
    picture(1).save(tmp_path / "one.png")
    answer = vlm.answer(tmp_path / "one.png", ASK, max_new_tokens=5, details=True)
    assert answer.text == vlm.answer(str(tmp_path / "one.png"), ASK, max_new_tokens=5)
    assert answer.tokens == 5
    assert answer.seconds > 0
    assert answer.report["methods"]["vcd"] == {"rows": 1, "steps": 5}
    assert answer.report["branches"] == 1
    json.dumps(answer.report)


def test_answers_sampled_with_a_seed_do_not_depend_on_the_batch(vlm):
    pictures, ids = [picture(i) for i in range(3)], ["a", "b", "c"]
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 1}
    together = vlm.answer(pictures, ASK, ids=ids, **options)
    alone = [vlm.answer([p], [ASK], ids=[name], **options)[0] for p, name in zip(pictures, ids, strict=True)]
    assert together == alone
    assert together != vlm.answer(pictures, ASK, ids=ids, **{**options, "seed": 2})


@pytest.mark.parametrize(
    ("images", "prompts", "options", "message"),
    [
        ([None] * 2, [ASK] * 3, {}, "2 pictures and 3 prompts: give equal numbers"),
        ([None] * 2, [ASK] * 2, {"ids": ["a"]}, "ids= names 1 items, 2 were given"),
        (None, ASK, {"num_return_sequences": 2, "num_beams": 2}, "one answer for each question"),
        (None, "<image> here", {}, "stands for a picture"),
    ],
)
def test_wrong_questions_are_answered_with_the_remedy(vlm, images, prompts, options, message):
    with pytest.raises(UsageError, match=message):
        vlm.answer(images, prompts, max_new_tokens=2, **options)


def test_a_picture_that_cannot_be_read_is_named(vlm, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"bad\.png"):
        vlm.answer(tmp_path / "bad.png", ASK)


def test_answer_needs_a_processor():
    with (
        vlmfix.wrap(build("llava", fresh=True).model, None, "vcd") as vlm,
        pytest.raises(UsageError, match="processor"),
    ):
        vlm.answer(None, ASK)


@pytest.mark.parametrize("recipe", ["greedy", "vcd", "locore", "carve"])
@pytest.mark.parametrize("engine", ["hf", "graph"])
def test_a_closed_model_refuses(folder, recipe, engine):
    with vlmfix.load(folder, recipe, device="cpu", engine=engine) as vlm:
        pass
    for call in (lambda: vlm.answer(picture(1), ASK), lambda: vlm.generate(torch.ones(1, 2, dtype=torch.long))):
        with pytest.raises(UsageError, match=f"{recipe}.*was closed"):
            call()
    vlm.close()
    assert vlm.model.config._attn_implementation == "sdpa"


def test_a_picture_asked_about_twice_is_encoded_once(vlm, monkeypatch):
    """Also beneath branches, which encode their pictures along with the caller's; and beams leave the memory whole."""
    seen, tower = [], vlm.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda module, args, kwargs: seen.append(1), with_kwargs=True)
    try:
        one, other = picture(10), picture(11)
        first = vlm.answer(one, ASK, max_new_tokens=3)
        assert len(seen) == 1
        vlm.answer(one, "Another question?", max_new_tokens=3)
        assert vlm.answer(one, ASK, max_new_tokens=3, num_beams=2) is not None
        assert vlm.answer(one, ASK, max_new_tokens=3) == first
        assert len(seen) == 1
        vlm.answer(other, ASK, max_new_tokens=3)
        assert len(seen) == 2
        vlm.answer(one, ASK, max_new_tokens=3)
        assert len(seen) == 3
    finally:
        hook.remove()
    assert "get_image_features" not in vars(vlm.model.model)


@pytest.mark.parametrize("recipe", ["greedy", "vcd(alpha=0.5,beta=0)"])
def test_beams_after_beams_are_the_same(folder, recipe):
    with vlmfix.load(folder, recipe, device="cpu") as vlm:
        one = vlm.answer(picture(1), ASK, max_new_tokens=4, num_beams=3)
        assert vlm.answer(picture(1), ASK, max_new_tokens=4, num_beams=3) == one


def test_tiles_of_a_picture_are_told_from_pictures_by_the_processor(tmp_path):
    """Idefics3 cuts large pictures; its tokenizer's word before the last tile says where one ends."""
    folder = make_checkpoint("idefics3", tmp_path)
    with vlmfix.load(folder, "m3id", device="cpu") as vlm:
        large, small = picture(1, 64, 64), picture(2, 64, 16)
        vlm.answer([[large, small], [small, large]], ASK, max_new_tokens=1)
        assert vlm.report["pictures"] == [2, 2]
        vlm.answer([large, small], ASK, max_new_tokens=1)
        assert vlm.report["pictures"] == [1, 1]
        one, two = vlm.report["visual_tokens"]
        assert one > two > 0


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_ready(folder):
    vlm = vlmfix.load(str(folder), "greedy", device="cpu", dtype="bfloat16")
    assert not vlm.model.training
    assert vlm.model.dtype == torch.bfloat16
    assert vlm.processor.tokenizer.padding_side == "left"
    assert isinstance(vlm.answer(picture(1), ASK, max_new_tokens=2), str)
    assert vlmfix.load(folder, device="cpu", dtype=torch.float16).model.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot32"}, "dtype 'flaot32' is not known; did you mean float32"),
        ({"device": "gpu"}, "device 'gpu' is not known; give cpu, cuda"),
        ({"device": "cpu", "device_map": "auto"}, "device and device_map exclude each other"),
        ({"quantize": "3bit"}, "quantize '3bit' is not known; give 4bit or 8bit"),
        ({"device": "cpu", "processor_kwargs": {"do_rezise": False}}, "no setting 'do_rezise'; did you mean do_resize"),
        ({"device": "cpu", "processor_kwargs": {"foo": 1}}, "no setting 'foo'; known are .*do_normalize.* and others"),
        ({"device": "cpu", "recipe": "vdc"}, "unknown method 'vdc'; did you mean"),
    ],
)
def test_wrong_ways_to_load_are_answered_with_the_remedy(folder, options, message):
    with pytest.raises(UsageError, match=message):
        vlmfix.load(folder, **options)


def test_keywords_reach_from_pretrained_and_unknown_ones_are_named(folder):
    assert vlmfix.load(folder, device="cpu", attn_implementation="eager").model is not None
    with pytest.raises(UsageError, match=r"has a keyword 'engin'; did you mean engine"):
        vlmfix.load(folder, device="cpu", engin="graph")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(UsageError, match="no CUDA; use --device cpu"):
        vlmfix.load(folder, device="cuda")


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        vlmfix.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no config\.json"):
        vlmfix.load(tmp_path / "empty")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(vlmfix.Refusal, match="llama is not a vision-language model"):
        vlmfix.load(tmp_path / "text")


def test_weights_that_are_no_safetensors_are_refused(folder, tmp_path):
    import shutil

    other = tmp_path / "pickled"
    shutil.copytree(folder, other)
    (other / "model.safetensors").unlink()
    torch.save({}, other / "pytorch_model.bin")
    with pytest.raises(UsageError, match="the model could not be loaded"):
        vlmfix.load(other, device="cpu")


# --- sink dimensions -------------------------------------------------------------------------------------------------


@pytest.fixture
def massive(monkeypatch, tmp_path):
    """A model with a planted massive activation: dimension 7 of every token, from the first layer on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny = build("llava", fresh=True, text_config={"num_hidden_layers": 6})
    with torch.no_grad():
        tiny.model.get_input_embeddings().weight[:, 7] = 40.0
    return tiny


def test_sink_dimensions_are_found_and_kept_on_disk(massive, tmp_path, monkeypatch):
    with vlmfix.wrap(massive.model, None, "var") as vlm:
        assert vlm.compiled.attention[0].sink_dims == (7,)
        assert vlm.compiled.attention[0].tau == pytest.approx(20 * (64 / 4096) ** 0.5)
    (file,) = (tmp_path / "vlmfix" / "sinks").glob("*.json")
    assert json.loads(file.read_text())["sink_dims"] == [7]

    from vlmfix.hf import sinks

    monkeypatch.setattr(sinks, "_measure", lambda *args: pytest.fail("measured again"))
    with vlmfix.wrap(massive.model, None, "var") as vlm:
        assert vlm.compiled.attention[0].sink_dims == (7,)
    sinks._FOUND.clear()
    with vlmfix.wrap(massive.model, None, "var") as vlm:
        assert vlm.compiled.attention[0].sink_dims == (7,)


def test_a_model_without_massive_dimensions_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(vlmfix.Refusal, match=r"no massive-activation dimension was found.*give sink_dims"):
        vlmfix.wrap(build("llava", fresh=True, seed=3).model, None, "var")
    with vlmfix.wrap(build("llava", fresh=True, seed=3).model, None, TABLE["var"].full):
        pass


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(massive, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with vlmfix.wrap(massive.model, None, "var") as vlm:
        assert vlm.compiled.attention[0].sink_dims == (7,)
