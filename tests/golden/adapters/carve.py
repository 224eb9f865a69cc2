"""CARVE's vectors: two series of attention maps fused, thresholded, cut into regions, masked and cropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vlmfix.decoders import carve

from ..cases import close, same

RELATIVE = 1e-4
GREY = 2
MUTANTS = {
    "the other way round": lambda patch: patch.setattr(carve, "fuse", lambda a, g, *rest, **k: _fuse(g, a, *rest, **k)),
    "weakest regions": lambda patch: patch.setattr(
        carve, "strongest", lambda f, *rest, **k: _strongest(-f, *rest, **k)
    ),
    "corners join": lambda patch: patch.setattr(carve, "components", _joined(carve.components)),
    "cropped a pixel off": lambda patch: patch.setattr(
        carve, "crop", lambda image, mask: _crop(image, np.roll(mask, 1, 1))
    ),
}
_fuse, _strongest, _crop = carve.fuse, carve.strongest, carve.crop


def check(case: dict[str, Any], arrays: dict[str, Tensor], folder: Path) -> None:
    (width, height), grid = case["image_size_wh"], case["grid"]
    layers = [layer for layer in case["layers"] if layer < arrays["query_maps"].shape[1]]
    asked, general = (arrays[name][:, layers].unflatten(-1, grid) for name in ("query_maps", "general_maps"))
    fused = carve.fuse(asked, general, (height, width), case["lam"], steps=case["step_mode"])
    expected = arrays["expected_fused"]
    assert np.allclose(fused, expected.numpy(), rtol=RELATIVE, atol=0), "fused map"
    threshold = np.quantile(fused, 1 - case["top_percent"])
    assert abs(threshold / case["threshold"] - 1) < RELATIVE, "threshold"
    above = fused >= threshold
    _, count = carve.components(above)
    same(count, case["num_components"], "number of regions")
    if case["strategy"] == "remove_small":
        mask = carve.without_small(above, case["outlier_percent"])
    else:
        kept = max(case["min_keep_regions"], int(count * 0.2))  # the released code's number of regions
        mask = carve.strongest(fused, above, kept, "area" if case["strategy"] == "size" else "sum")
    unclear = np.abs(fused - threshold) < RELATIVE * threshold
    wrong = (mask != arrays["expected_mask"].bool().numpy()) & ~unclear
    same(int(wrong.sum()), 0, "pixels on the wrong side")
    same(int(mask.sum()), case["kept_pixels"], "kept pixels")
    picture = Image.fromarray(arrays["image"].numpy())
    same(np.asarray(carve.masked(picture, mask)).tolist(), arrays["expected_masked_image"].tolist(), "masked picture")
    refined = np.asarray(carve.crop(picture, mask)).astype(int)
    same(refined.shape, tuple(arrays["expected_refined"].shape), "size of the crop")
    close(_tensor(refined), arrays["expected_refined"], GREY, "crop")


def _tensor(array: Any) -> Tensor:
    import torch

    return torch.from_numpy(array)


def _joined(original: Any) -> Any:
    """Regions that touch in a corner become one: labels of the mask grown to the right."""

    def components(mask: Any) -> Any:
        grown = mask | np.roll(mask, 1, 1)
        labels, _ = original(grown)
        names, dense = np.unique(np.where(mask, labels, 0), return_inverse=True)
        return dense.reshape(mask.shape), len(names) - 1

    return components
