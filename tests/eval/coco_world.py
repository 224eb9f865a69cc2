"""A tiny folder in COCO's format, written for tests."""

import json

NAMES = ("person", "dog", "cat", "car", "cup", "fork", "dining table", "kite")
SCENES = (  # objects, left edge of each
    (("person", 0), ("dog", 60), ("dog", 30), ("cat", 80)),
    (("dog", 0), ("cat", 50), ("car", 75)),
    (("cup", 10), ("fork", 40), ("dining table", 70), ("person", 5)),
    (("cup", 0), ("dining table", 40), ("fork", 80)),
    (("kite", 0), ("person", 50), ("dog", 80)),
    (("person", 0),),
)


def write(folder, captions=True, name="{:06d}.png", year=None, sentences=("Two things.",)):
    """Writes instances.json and captions.json; picture numbers start at 10."""
    images, rows = [], []
    for number, objects in enumerate(SCENES, 10):
        images.append({"id": number, "file_name": name.format(number), "width": 100, "height": 100})
        for thing, left in objects:
            box = [left, 10, 10, 10]
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": number,
                    "category_id": NAMES.index(thing) + 1,
                    "bbox": box,
                    "area": 100,
                    "iscrowd": 0,
                }
            )
    info = {"year": year} if year else {}
    categories = [{"id": i, "name": n} for i, n in enumerate(NAMES, 1)]
    data = {"info": info, "images": images, "annotations": rows, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(data))
    if captions:
        said = [
            {"id": 5 * image["id"] + i, "image_id": image["id"], "caption": sentence}
            for image in images
            for i, sentence in enumerate(sentences)
        ]
        (folder / "captions.json").write_text(json.dumps({"info": info, "images": images, "annotations": said}))
    return folder


def sums(score):
    """Column sums of a score."""
    return dict(zip(score.columns, score.values.sum(0), strict=True))


def named(score):
    """All problems of a score: kind -> names."""
    return score.details["problems"]
