"""The builders keep their promises: what every other test of a family stands on."""

import pytest
import torch

from . import FAMILIES, MAIN, REQUIRED, SPECS, build

TOLERANCE = 2e-5


def logits(tiny, inputs):
    with torch.no_grad():
        return tiny.model(**inputs).logits


def test_required_families_come_first():
    assert FAMILIES[: len(REQUIRED)] == REQUIRED
    assert set(MAIN) <= set(REQUIRED)
    assert set(FAMILIES) == set(SPECS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_batch_is_the_row_alone(family):
    tiny = build(family)
    batch = tiny.inputs(tiny.rows)
    together = logits(tiny, batch)
    assert together[batch["attention_mask"].bool()].std() > 1
    lengths = set()
    for i, count in enumerate(tiny.rows):
        alone = tiny.inputs([count], keys=[i])
        length = alone["input_ids"].shape[1]
        lengths.add(length)
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][i, -length:])
        assert torch.equal(alone.images[0], batch.images[i, -length:])
        if tiny.spec.left_padding:
            torch.testing.assert_close(together[i, -length:], logits(tiny, alone)[0], atol=TOLERANCE, rtol=0)
    assert len(lengths) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_truth_counts_the_features_the_model_scatters(family):
    tiny = build(family)
    inputs = tiny.inputs(tiny.rows)
    visual, images = tiny.expected_visual(inputs), tiny.expected_images(inputs)
    assert torch.equal(visual, images >= 0)
    assert not (visual & ~inputs["attention_mask"].bool()).any()
    assert [len(set(row[row >= 0].tolist())) for row in images] == list(tiny.rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_picture_matters(family):
    tiny = build(family)
    count = max(tiny.spec.images)
    one, other = tiny.inputs([count]), tiny.inputs([count], changed={(0, count - 1)})
    assert all(torch.equal(one[k], other[k]) for k in one if one[k].dtype != torch.float32)
    assert (logits(tiny, one)[0, -1] - logits(tiny, other)[0, -1]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_generates(family):
    tiny = build(family)
    inputs = tiny.inputs(tiny.rows)
    tokens = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
    assert tokens.shape == (3, 4)
    assert len({tuple(row) for row in tokens.tolist()}) == 3


def test_over_replaces_leaves_and_keeps_the_rest():
    deep = build("llava", text_config={"num_hidden_layers": 6})
    assert deep.model.config.text_config.num_hidden_layers == 6
    assert deep.model.config.text_config.num_key_value_heads == 2
    assert build("llava") is build("llava")
    assert build("llava", fresh=True).model is not build("llava").model


def test_rows_a_family_cannot_take_are_refused():
    with pytest.raises(ValueError, match="instructblip takes rows"):
        build("instructblip").inputs([0])
