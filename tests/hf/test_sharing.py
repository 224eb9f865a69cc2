"""Questions about one picture share its prefix: same answers, fewer positions read."""

import pytest
import torch
from PIL import Image

import vlmfix
from tests.families.checkpoints import make_checkpoint
from vlmfix.hf.sharing import share as shared

WORDS = ("cat", "wine glass", "very large brown dog", "bus")


@pytest.fixture(scope="module", params=["llava", "idefics3", "internvl"])
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def questions():
    pictures = [Image.effect_noise((40 + 8 * i, 40), 60 + 30 * i).convert("RGB") for i in range(2)]
    return [p for p in pictures for _ in WORDS], [f"Is there a {word}?" for _ in pictures for word in WORDS]


def ask(vlm, questions, **options):
    return vlm.answer(*questions, max_new_tokens=5, details=True, **options)


@pytest.mark.parametrize("recipe", ["greedy", "pai(alpha=0.5)", "vaf", "locore(window=2)", "dola(beta=0)"])
def test_answers_are_those_of_rows_on_their_own(checkpoint, questions, recipe, monkeypatch):
    with vlmfix.load(checkpoint, recipe, device="cpu") as vlm:
        read = []
        monkeypatch.setattr("vlmfix.fixed.share", lambda *args: read.append(shared(*args)) or read[-1])
        together = ask(vlm, questions)
        apart = [ask(vlm, ([picture], [prompt]))[0] for picture, prompt in zip(*questions, strict=True)]
    assert len(read) == 1
    assert read[0]["past_key_values"].get_seq_length() > 0
    assert [a.text for a in together] == [a.text for a in apart]
    for a, b in zip(together, apart, strict=True):
        assert a.evidence.get("margin") == pytest.approx(b.evidence.get("margin"), abs=1e-4)


@pytest.mark.parametrize("recipe", ["var(sink_dims=(1,2),tau=1.0)", "vcd", "vhr"])
def test_methods_that_touch_the_prefix_do_not_share(checkpoint, questions, recipe, monkeypatch):
    monkeypatch.setattr("vlmfix.fixed.share", lambda *args: pytest.fail("the prefix was shared"))
    with vlmfix.load(checkpoint, recipe, device="cpu") as vlm:
        ask(vlm, questions)


def test_sampling_with_a_seed_is_the_same_shared_or_not(checkpoint, questions):
    with vlmfix.load(checkpoint, "greedy", device="cpu") as vlm:
        options = {"do_sample": True, "seed": 3}
        names = [f"item {i}" for i in range(len(questions[0]))]
        together = ask(vlm, questions, ids=names, **options)
        apart = [
            ask(vlm, ([picture], [prompt]), ids=[name], **options)[0]
            for picture, prompt, name in zip(*questions, names, strict=True)
        ]
    assert [a.text for a in together] == [a.text for a in apart]


def test_the_picture_is_encoded_once(checkpoint, questions):
    with vlmfix.load(checkpoint, "greedy", device="cpu") as vlm:
        model = vlm.model.model
        tower = getattr(model, "vision_tower", None) or model.vision_model
        seen = []
        handle = tower.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape[0]), with_kwargs=True
        )
        ask(vlm, questions)
        handle.remove()
        alone = []
        handle = tower.register_forward_pre_hook(
            lambda module, args, kwargs: alone.append((args or tuple(kwargs.values()))[0].shape[0]), with_kwargs=True
        )
        ask(vlm, ([questions[0][0], questions[0][-1]], ["a", "b"]))
        handle.remove()
    assert sum(seen) == sum(alone)
    assert torch.is_grad_enabled()
