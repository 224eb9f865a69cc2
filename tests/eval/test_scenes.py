"""The scenes: what a seed gives, what the splits differ in, and that files and tensors show the same pictures."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from vlmfix.eval import scenes
from vlmfix.eval.scenes.render import CELL
from vlmfix.eval.scenes.text import PLURALS

from vlmfix.errors import UsageError


def test_world_has_enough_in_it():
    assert len(scenes.NAMES) >= 60
    assert len(scenes.KINDS) >= 8
    assert all(set(kind.frequent) <= set(scenes.NAMES) for kind in scenes.KINDS.values())
    assert scenes.atlas().shape == (len(scenes.NAMES), 4, CELL, CELL)
    assert (scenes.atlas()[:, 3].amax((1, 2)) > 0.9).all()


def test_same_seed_same_files(tmp_path):
    first, second, other = (
        scenes.build(tmp_path / name, 5, "test", seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    names = sorted(str(p.relative_to(first)) for p in first.rglob("*") if p.is_file())
    assert len(names) == 7
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert all((first / name).read_bytes() != (other / name).read_bytes() for name in names)


def test_pycocotools_loads_it(tmp_path):
    folder = scenes.build(tmp_path, 12, "tuning", 0)
    coco = COCO(folder / "instances.json")
    spoken = COCO(folder / "captions.json")
    for scene in scenes.scenes("tuning", 0, 12):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[scene.number]))
        named = Counter(coco.loadCats(a["category_id"])[0]["name"] for a in annotations)
        assert named == scene.counts
        assert len(spoken.getAnnIds(imgIds=[scene.number])) == 5
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            assert 0 <= x <= x + width <= scenes.IMAGE_SIZE + 0.1
            assert 0 <= y <= y + height <= scenes.IMAGE_SIZE + 0.1
            assert coco.annToMask(annotation).sum() > 40
            assert annotation["area"] > 0 or annotation["hard"] or len(annotations) > 5


def test_tensors_and_files_agree(tmp_path):
    folder = scenes.build(tmp_path, 70, "test", 1)
    drawn = list(scenes.scenes("test", 1, 70))[60:]
    pictures, _ = scenes.compose(scenes.pack(drawn))
    for scene, picture in zip(drawn, pictures, strict=True):
        stored = np.array(Image.open(folder / "images" / f"{scene.number:06d}.png"), dtype=int)
        assert np.abs(stored - picture.permute(1, 2, 0).numpy()).max() <= 1


def test_composition_equals_pillow():
    """The batched composer against Pillow's affine map and alpha compositing, sprite by sprite."""
    quiet = replace(scenes.WORLD, noise=0.0)
    for scene in scenes.scenes("train", 0, 4, quiet):
        whole, _ = scenes.compose(scenes.pack([scene]))
        empty, _ = scenes.compose(scenes.pack([replace(scene, objects=())]))
        canvas = np.moveaxis(empty[0].numpy().astype(float), 0, 2)
        for item in scene.objects:
            sprite = scenes.atlas()[scenes.NAMES.index(item.name)].permute(1, 2, 0).numpy() * 255
            cos, sin, zoom = np.cos(item.angle), np.sin(item.angle), CELL / item.size
            mirror = -1 if item.mirrored else 1
            a, b, d, e = zoom * mirror * cos, zoom * mirror * sin, -zoom * sin, zoom * cos
            affine = (a, b, CELL / 2 - a * item.x - b * item.y, d, e, CELL / 2 - d * item.x - e * item.y)
            layers = [
                np.array(
                    Image.fromarray(sprite[..., i].astype(np.float32)).transform(
                        (scenes.IMAGE_SIZE,) * 2, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR
                    )
                )
                for i in range(4)
            ]
            layer = np.stack(layers, 2) * item.opacity
            canvas = layer[..., :3] + canvas * (1 - layer[..., 3:] / 255)
        difference = np.abs(canvas - np.moveaxis(whole[0].numpy().astype(float), 0, 2))
        assert difference.mean() < 0.6
        assert np.quantile(difference, 0.99) < 3


def test_sprites_in_front_hide_those_behind():
    front, back = (
        scenes.Object(name, 48, 48, 40, 0.0, False, 1.0, False) for name in ("stop sign", "fork")
    )  # the sign is opaque in its middle
    scene = replace(scenes.scene("test", 0, 0), objects=(back, front))
    _, visible = scenes.compose(scenes.pack([scene]))
    assert visible[0, 0].sum() < 0.05 * visible[0, 1].sum()
    assert visible[0].sum(0).max() <= 1 + 1e-5


def test_noise_is_as_strong_as_told():
    scene = replace(scenes.scene("test", 0, 0), objects=(), noise=8.0)
    loud, _ = scenes.compose(scenes.pack([scene]))
    quiet, _ = scenes.compose(scenes.pack([replace(scene, noise=0.0)]))
    difference = (loud.float() - quiet.float()).flatten()
    assert 7.5 < difference.std() < 8.5
    assert abs(difference.mean()) < 0.3
    again, _ = scenes.compose(scenes.pack([replace(scene, number=1)]))
    assert not torch.equal(loud, again)


@pytest.mark.parametrize(("split", "rate"), [("train", scenes.WORLD.cooccurrence), ("test", scenes.WORLD.kept)])
def test_cooccurrence_differs_between_splits(split, rate):
    drawn = list(scenes.scenes(split, 0, 600))
    there = np.mean([name in scene.counts for scene in drawn for name in scene.frequent])
    assert abs(there - rate) < 0.02
    assert 5 < np.mean([len(scene.counts) for scene in drawn]) < 6


def test_splits_share_nothing():
    seen = {
        split: {(s.kind, s.objects) for seed in range(3) for s in scenes.scenes(split, seed, 60)}
        for split in scenes.SPLITS
    }
    for split, some in seen.items():
        assert len(some) == 180
        assert all(some.isdisjoint(others) for name, others in seen.items() if name != split)


def test_captions_name_exactly_what_is_there():
    singular = {plural: name for name, plural in PLURALS.items()}
    for scene in scenes.scenes("train", 5, 40):
        for turn in scenes.captions(scene):
            said = turn.answer.lower()
            for form in sorted((*scenes.NAMES, *singular), key=len, reverse=True):
                name = singular.get(form, form)
                if form in said:
                    assert name in scene.counts, (turn.answer, name)
                    said = said.replace(form, "")
            assert all(name in turn.answer or PLURALS.get(name, "?") in turn.answer for name in scene.counts)


def test_answers_follow_from_the_annotations():
    kinds = Counter()
    for scene in scenes.scenes("train", 6, 80):
        for turn in scenes.questions(scene):
            kinds[turn.kind] += 1
            if turn.kind == "existence":
                assert turn.answer.startswith("Yes") == (turn.about in scene.counts)
                assert turn.about in turn.prompt
            if turn.kind == "size":
                (item,) = (item for item in scene.objects if item.name == turn.about)
                if turn.answer not in ("Yes", "No"):
                    assert item.largeness in turn.answer
                else:
                    assert (item.largeness in turn.prompt) == (turn.answer == "Yes")
            if turn.kind == "position":
                (item,) = (item for item in scene.objects if item.name == turn.about)
                assert turn.answer == f"The {item.name} is {item.region}."
    assert set(kinds) == set(scenes.QUESTIONS)


def test_wrong_names_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="tuning"):
        scenes.scene("tunning", 0, 0)
    with pytest.raises(UsageError, match="short"):
        scenes.caption(scenes.scene("test", 0, 0), "shorts")
    with pytest.raises(UsageError, match="existence"):
        scenes.question(scenes.scene("test", 0, 0), "existance")


def test_examples_are_the_demo_split(tmp_path, request):
    folder = request.config.rootpath / "examples" / "scenes"
    built = scenes.build(tmp_path, 24, "demo", 0)
    for name in ("instances.json", "captions.json"):
        assert json.loads((folder / name).read_text()) == json.loads((built / name).read_text())
    prompts = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 72
    assert {(folder / line["image"]).is_file() for line in prompts} == {True}
