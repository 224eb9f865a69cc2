"""Branches of a prompt that comes as embeddings."""

import pytest
import torch

import vlmfix
from vlmfix.api import wrap

from ..families import build

OPTIONS = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
RECIPES = (
    "m3id(beta=0,forget_rate=0.05)",
    "icd(alpha=0.5,beta=0,disturbance_ids=(40,41,42))",
    "lcd(alpha=0.3,beta=0)",
    "sid(beta=0,keep_lowest=0.5)",
    "avisc(alpha=0.5,beta=0)",
    "iava(alpha=0.5,beta=0,lamb=0,instruction_ids=(40,41,42))",
)


def embedded(tiny, inputs):
    """The same prompt as embeddings, with a mask of its visual tokens."""
    model, ids = tiny.model, inputs["input_ids"]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True).pooler_output
        features = torch.cat(list(features)) if not isinstance(features, torch.Tensor) else features
        embeds = model.get_input_embeddings()(ids)
    visual = ids == model.config.image_token_id
    embeds = embeds.masked_scatter(visual[..., None], features.reshape(-1).to(embeds))
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "visual_mask": visual}


@pytest.mark.parametrize("recipe", RECIPES)
def test_embeddings_give_what_ids_give(recipe):
    tiny = build("llava", fresh=True)
    inputs = tiny.inputs((2, 1, 0))
    with wrap(tiny.model, None, recipe) as fixed:
        want = fixed.generate(**inputs, **OPTIONS)
        got = fixed.generate(**embedded(tiny, inputs), **OPTIONS)
        beams = fixed.generate(**inputs, max_new_tokens=4, num_beams=2)
        assert torch.equal(
            fixed.generate(**embedded(tiny, inputs), max_new_tokens=4, num_beams=2)[:, -4:], beams[:, -4:]
        )
    assert torch.equal(got.sequences[:, -4:], want.sequences[:, -4:])
    for ours, theirs in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("recipe", "view"),
    [("vcd", "Noised"), ("ritual", "Transformed"), ("agla(colours=((0.5,0.5,0.5),(0.5,0.5,0.5)))", "Masked")],
)
def test_views_that_need_pixels_are_refused(recipe, view):
    tiny = build("llava", fresh=True)
    with wrap(tiny.model, None, recipe) as fixed, pytest.raises(vlmfix.Refusal, match=rf"no pixels .* \({view}\)"):
        fixed.generate(**embedded(tiny, tiny.inputs((1,))), **OPTIONS)


def test_transformers_own_cache_for_embeddings_is_followed():
    tiny = build("llava", fresh=True)
    inputs = embedded(tiny, tiny.inputs((1,)))
    with wrap(tiny.model, None, "m3id") as fixed:
        try:
            uncached = fixed.generate(**inputs, use_cache=False, **OPTIONS)
        except vlmfix.Refusal as refusal:  # releases that really do without one
            assert "set use_cache=True" in str(refusal)  # noqa: PT017
            return
        assert torch.equal(uncached.sequences, fixed.generate(**inputs, **OPTIONS).sequences)


def test_the_mask_of_visual_tokens_is_asked_for():
    tiny = build("llava", fresh=True)
    inputs = {k: v for k, v in embedded(tiny, tiny.inputs((1,))).items() if k != "visual_mask"}
    with wrap(tiny.model, None, "m3id") as fixed, pytest.raises(vlmfix.VlmfixError, match="give visual_mask"):
        fixed.generate(**inputs, **OPTIONS)
