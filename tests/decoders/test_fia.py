"""FIA: where the class token looks, its alignment with visual tokens, and what is refused."""

import pytest
import torch

from tests import families
from tests.families.core import released
from vlmfix.api import wrap
from vlmfix.decoders.fia import FIA, select
from vlmfix.errors import Refusal
from vlmfix.hf.hooks import installed
from vlmfix.hf.inputs import read
from vlmfix.hf.vision import class_row, class_tower, on_tokens

from .running import RECENT, gap, generate


@torch.no_grad()
def test_the_class_row_is_that_of_the_towers_attention():
    tiny = families.build("llava", fresh=True)
    tower = class_tower(tiny.model)
    seen = {}
    for layer, module in tower.items():
        module.register_forward_pre_hook(
            lambda m, args, kw, layer=layer: seen.update(
                {layer: class_row(m, args[0] if args else kw["hidden_states"])}
            ),
            with_kwargs=True,
        )
    pixels = tiny.inputs([2])["pixel_values"]
    tiny.model.model.vision_tower.set_attn_implementation("eager")
    out = tiny.model.model.vision_tower(pixels, output_attentions=True)
    for layer, weights in enumerate(out.attentions):
        torch.testing.assert_close(seen[layer], weights[:, :, 0, 1:].sum(1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_next"])
def test_values_of_patches_land_on_their_tokens(family):
    """Features that name their patch put the same name on the token that `on_tokens` gives the patch's value."""
    tiny = families.build(family)
    inputs = tiny.inputs(list(tiny.rows))
    with installed(tiny.model) as parts:
        layout = read(parts, inputs).layout
    tiles = inputs["pixel_values"].flatten(0, 1) if family == "llava_next" else inputs["pixel_values"]
    real = tiles[tiles.flatten(1).any(1)]
    tower = tiny.model.model.vision_tower
    rows = tower(real).last_hidden_state[:, 1:, 0]
    found = on_tokens(tiny.model, layout, rows, inputs)
    assert found[~layout.visual].isnan().all()
    model = tiny.model.model
    width = tiny.model.config.get_text_config().hidden_size

    def named(features, *args, **kwargs):
        return features.new_zeros(*features.shape[:-1], width) + features[..., :1]

    original = model.multi_modal_projector.forward
    model.multi_modal_projector.forward = named
    try:
        kwargs = {"image_sizes": inputs["image_sizes"]} if "image_sizes" in inputs else {}
        layers = [-1] if family == "vipllava" else -1
        name = "vision_feature_layers" if family == "vipllava" and not released("5.23") else "vision_feature_layer"
        features = model.get_image_features(inputs["pixel_values"], **{name: layers}, **kwargs).pooler_output
    finally:
        model.multi_modal_projector.forward = original
    expected = torch.cat([part.reshape(-1, width) for part in features])[:, 0]
    values = found[layout.visual]
    is_patch = values.isfinite()
    torch.testing.assert_close(values[is_patch], expected[is_patch])
    if family == "llava_next":
        assert (~is_patch).any()
        newline = model.image_newline[0]
        torch.testing.assert_close(expected[~is_patch], newline.expand(int((~is_patch).sum())))
    else:
        assert is_patch.all()


@torch.no_grad()
def test_repeated_pictures_need_no_second_look():
    tiny = families.build("llava", fresh=True)
    inputs, other = tiny.inputs([2, 1, 0]), tiny.inputs([2, 1, 0], seed=7)
    options = {"max_new_tokens": 2, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    with wrap(tiny.model, None, "fia(beta=2)") as vlm:
        results = [vlm.generate(**x, **options) for x in (inputs, inputs, other, inputs)]
    assert gap(results[0], results[1]) == gap(results[0], results[3]) == 0
    assert gap(results[0], results[2]) > 0.1


def test_sets_are_disjoint_and_of_the_named_size():
    generator = torch.Generator().manual_seed(0)
    first, late = torch.rand(100, generator=generator), torch.rand(100, generator=generator)
    late[[3, 50]] = 5.0
    first[3], first[50] = 9.0, 0.0
    local, summary = select(first, late, 0.25)
    assert summary.nonzero()[:, 0].tolist() == [3, 50]
    assert int(local.sum()) == 24
    assert not (local & summary).any()


@torch.no_grad()
def test_beams_see_the_same_pictures():
    tiny = families.build("llava_next")
    inputs = tiny.inputs([1, 1])
    one = generate(tiny, "fia", inputs, num_beams=3)
    two = generate(tiny, "fia", inputs, num_beams=3, use_cache=False)
    assert torch.equal(one.sequences, two.sequences)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3", "internvl", "instructblip"])
def test_towers_without_a_class_token_are_refused(family):
    with pytest.raises(Refusal, match="class token"):
        generate(families.build(family), FIA(), families.build(family).inputs([1]))


@RECENT
def test_a_prompt_in_chunks_is_refused_where_heads_are_measured():
    tiny = families.build("llava")
    with pytest.raises(Refusal, match="prefill_chunk_size"):
        generate(tiny, "fia", tiny.inputs([1]), prefill_chunk_size=5)
    plain = generate(tiny, "fia(head_sensitivity=False)", tiny.inputs([1]))
    chunked = generate(tiny, "fia(head_sensitivity=False)", tiny.inputs([1]), prefill_chunk_size=5)
    assert gap(plain, chunked) < 2e-5


@RECENT
@torch.no_grad()
def test_pictures_encoded_elsewhere_are_refused():
    tiny = families.build("llava")
    inputs = dict(tiny.inputs([1]))
    features = tiny.model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with pytest.raises(Refusal, match="pixel_values"):
        generate(tiny, "fia", {**inputs, "mm_encoder_outputs": {"image": features}})
