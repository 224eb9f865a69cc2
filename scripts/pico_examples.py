"""Write examples/scenes: 24 shifted pictures of the demo split with prompts and annotations.

python scripts/pico_examples.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from vlmfix.eval import scenes
from vlmfix.eval.scenes.files import file_name
from vlmfix.eval.scenes.text import article

FOLDER = Path(__file__).parent.parent / "examples" / "scenes"
PICTURES = 24


def main() -> None:
    """Pictures, annotations and prompts: for each picture a caption, questions about a present and an absent object."""
    scenes.build(FOLDER, PICTURES, "demo", 0)
    lines = []
    for scene in scenes.scenes("demo", 0, PICTURES):
        rng = np.random.default_rng([*scene.key, 6])
        present = list(scene.counts)
        absent = [name for name in scene.frequent if name not in present]
        absent = absent or [name for name in scenes.NAMES if name not in present]
        asked = {"caption": "Please describe this image in detail."}
        for what, names in (("present", present), ("absent", absent)):
            asked[what] = f"Is there {article(names[int(rng.integers(len(names)))])} in the image?"
        image = f"images/{file_name(scene)}"
        lines += [{"id": f"{scene.number:02d}-{what}", "image": image, "prompt": text} for what, text in asked.items()]
    (FOLDER / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
