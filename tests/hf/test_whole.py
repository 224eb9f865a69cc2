"""Pictures put together from patches, changed, and cut up again."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlmfix
from vlmfix.hf.hooks import installed
from vlmfix.hf.inputs import change_pixels, read
from vlmfix.view import View
from vlmfix.views.transformed import TRANSFORMS, Transformed

from ..families import build


def changed(family, inputs, view):
    tiny = build(family)
    with installed(tiny.model) as parts:
        return change_pixels(parts, read(parts, inputs), view)["pixel_values"]


def test_flipped_patches_are_the_patches_of_the_flipped_picture():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tiny = build("qwen2_5_vl")
    vision = tiny.model.config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, temporal_patch_size=2
    )
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (side * 3, side * 2, 3), dtype=np.uint8))
    made, mirrored = (
        processor([p], do_resize=False, return_tensors="pt")
        for p in (picture, picture.transpose(Image.FLIP_LEFT_RIGHT))
    )
    tokens = int(made["image_grid_thw"].prod()) // vision.spatial_merge_size**2
    ids = torch.tensor([[20, *[tiny.model.config.image_token_id] * tokens, 21]])
    inputs = {"input_ids": ids, "mm_token_type_ids": (ids == tiny.model.config.image_token_id).long(), **made}
    got = changed("qwen2_5_vl", inputs, Transformed("hflip"))
    torch.testing.assert_close(got, mirrored["pixel_values"], atol=1e-6, rtol=0)
    assert not torch.equal(got, made["pixel_values"])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mistral3"])
@pytest.mark.parametrize("name", [*TRANSFORMS, "random"])
def test_a_picture_does_not_depend_on_its_batch(family, name):
    tiny = build(family)
    both, alone = (
        changed(family, tiny.inputs([1] * n, keys=keys), Transformed(name)) for n, keys in ((2, (0, 1)), (1, (1,)))
    )
    if family == "mistral3":
        height, width = tiny.inputs([1], keys=[1])["image_sizes"][0]
        torch.testing.assert_close(both[1, :, :height, :width], alone[0, :, :height, :width], atol=1e-6, rtol=0)
    else:
        torch.testing.assert_close(both[-len(alone) :], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_change_a_picture_and_keep_its_shape(name):
    picture = torch.randn(3, 96, 120)
    one, same, other = (TRANSFORMS[name](picture, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert one.shape == picture.shape
    assert torch.equal(one, same)
    assert not torch.equal(one, picture)
    assert torch.equal(one, other) == (name in ("hflip", "vflip", "rotate"))


def test_the_seed_draws_the_transformation():
    inputs = build("llava").inputs([2])
    views = [changed("llava", inputs, Transformed("random", seed)) for seed in range(4)]
    assert any(not torch.equal(views[0], view) for view in views[1:])


@pytest.mark.parametrize("family", ["idefics3", "ovis2", "llava_next", "internvl", "minicpmv4_6", "lfm2_vl"])
def test_tiles_and_unknown_patches_are_refused_by_name(family):
    inputs = build(family).inputs([1])
    with pytest.raises(vlmfix.Refusal, match=f"{family}: Transformed changes a picture as a whole"):
        changed(family, inputs, Transformed("hflip"))


def test_a_view_that_changes_nothing_keeps_every_pixel():
    for family in ("llava", "qwen2_5_vl", "mistral3"):
        inputs = build(family).inputs([2])

        class Same(View):
            def picture(self, pixels, place):
                return pixels

        assert torch.equal(changed(family, inputs, Same()), inputs["pixel_values"])
