"""The builders keep their promises: what every other test of a family stands on."""

import subprocess
import sys

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmfix.hf.families import FAMILIES as TABLE
from vlmfix.layout import MaskKind

from . import FAMILIES, MAIN, REFUSED, REQUIRED, SPECS, build
from .core import released

TOLERANCE = 2e-5
NEW = 4


def logits(tiny, inputs):
    with torch.no_grad():
        return tiny.model(**inputs).logits


def generated(tiny, inputs, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    return tiny.model.generate(**inputs, **options)[:, -NEW:]


def test_required_families_come_first():
    assert FAMILIES[: len(REQUIRED)] == REQUIRED
    assert set(MAIN) <= set(REQUIRED)
    assert set(FAMILIES) == {name for name, spec in SPECS.items() if released(spec.min_transformers)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_row_alone(family):
    tiny = build(family)
    batch = tiny.inputs(tiny.rows)
    together = logits(tiny, batch)
    tokens = generated(tiny, batch)
    assert len({tuple(row) for row in tokens.tolist()}) == 3
    lengths = set()
    for i, count in enumerate(tiny.rows):
        alone = tiny.inputs([count], keys=[i])
        length = alone["input_ids"].shape[1]
        lengths.add(length)
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][i, -length:])
        assert torch.equal(alone.images[0], batch.images[i, -length:])
        torch.testing.assert_close(together[i, -length:], logits(tiny, alone)[0], atol=TOLERANCE, rtol=0)
        if tiny.spec.left_padding:
            assert torch.equal(tokens[i], generated(tiny, alone)[0])
    assert len(lengths) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_truth_marks_one_run_of_indices_per_picture(family):
    tiny = build(family)
    inputs = tiny.inputs(tiny.rows)
    visual, images = tiny.expected_visual(inputs), tiny.expected_images(inputs)
    assert torch.equal(visual, images >= 0)
    assert not (visual & ~inputs["attention_mask"].bool()).any()
    for count, row in zip(tiny.rows, images, strict=True):
        seen = row[row >= 0]
        assert torch.equal(seen, seen.sort().values)
        assert seen.unique().tolist() == list(range(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_picture_matters_after_its_visual_tokens_only(family):
    tiny = build(family)
    count = max(tiny.spec.images)
    inputs = tiny.inputs([count])
    before = logits(tiny, inputs)[0]
    for j in range(count):
        other = tiny.inputs([count], changed={(0, j)})
        assert all(torch.equal(inputs[k], other[k]) for k in inputs if inputs[k].dtype != torch.float32)
        difference = (before - logits(tiny, other)[0]).abs().amax(1)
        assert difference[-1] > 0.1
        if not tiny.spec.sees_ahead:
            first = int((inputs.images[0] == j).nonzero()[0])
            assert difference[:first].max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_modes_of_generation_work_where_the_family_says_so(family):
    tiny = build(family)
    inputs = tiny.inputs(tiny.rows)
    modes = {
        "beams": (tiny.beams, {"num_beams": 2}),
        "static": (tiny.static, {"cache_implementation": "static"}),
    }
    for works, options in modes.values():
        if works:
            assert generated(tiny, inputs, **options).shape == (3, NEW)
        else:
            with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)):
                generated(tiny, inputs, **options)


@pytest.mark.parametrize("family", [name for name in FAMILIES if 0 in SPECS[name].images])
def test_generates_without_a_picture(family):
    tiny = build(family)
    inputs = tiny.inputs([0, 0])
    assert not tiny.expected_visual(inputs).any()
    assert generated(tiny, inputs).shape == (2, NEW)


@pytest.mark.parametrize("family", FAMILIES)
def test_query_heads_share_keys_where_the_family_says_so(family):
    text = build(family).model.config.get_text_config(decoder=True)
    heads, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    assert (keys is not None and keys < heads) == SPECS[family].grouped


def test_over_replaces_leaves_and_keeps_the_rest():
    deep = build("llava", text_config={"num_hidden_layers": 6})
    assert deep.model.config.text_config.num_hidden_layers == 6
    assert deep.model.config.text_config.num_key_value_heads == 2
    assert build("llava") is build("llava")
    assert build("llava", fresh=True).model is not build("llava").model


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    one, same, other = (build("llava", seed=seed, fresh=True).model.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_can_be_built(family):
    model = build(family).model
    assert model.config.model_type == family
    assert model.can_generate()


def test_rows_a_family_cannot_take_are_refused():
    with pytest.raises(ValueError, match="instructblip takes rows"):
        build("instructblip").inputs([0])


def test_table_and_builders_agree():
    tested = {name for name, row in TABLE.items() if row.status == "tested"}
    refused = {name for name, row in TABLE.items() if row.status.startswith("refused: ")}
    assert tested == set(SPECS)
    assert set(REFUSED) <= refused
    assert set(REQUIRED) == set(list(TABLE)[: len(REQUIRED)])
    for name, spec in SPECS.items():
        row = TABLE[name]
        assert (row.mask, row.min_transformers) == (spec.mask, spec.min_transformers)
        assert row.mask in list(MaskKind)


def test_every_family_of_transformers_has_a_row():
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(TABLE)


@pytest.mark.parametrize("family", [name for name in FAMILIES if SPECS[name].types or SPECS[name].zeros])
def test_pictures_are_silently_misread_without_the_types_the_table_demands(family):
    tiny = build(family)
    inputs = tiny.inputs([1])
    (dropped,) = (*tiny.spec.types, *tiny.spec.zeros)
    if dropped == "image_embeds_position_mask":
        with pytest.raises(AttributeError):
            generated(tiny, {k: v for k, v in inputs.items() if k != dropped})
        return
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 1, "do_sample": False}
    seeing, blind = (
        tiny.model.generate(**given, **options).logits[0]
        for given in (inputs, {k: v for k, v in inputs.items() if k != dropped})
    )
    assert TABLE[family].types in ("", dropped)
    misread = (seeing - blind).abs().max() > 1e-3
    if family == "paligemma":  # its default configuration looks both ways anyway; a checkpoint's need not
        assert not misread
    else:
        assert misread == bool(TABLE[family].types)


def test_reading_the_table_imports_no_framework():
    code = "import sys, vlmfix.hf.families; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
