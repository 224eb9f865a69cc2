"""Cut the atlas of the scenes out of the Noto Color Emoji font (Debian: fonts-noto-color-emoji).

python scripts/pico_atlas.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from vlmfix.eval.scenes.world import NAMES

CELL, COLUMNS = 48, 8
CODES = {
    "person": 0x1F9CD, "bicycle": 0x1F6B2, "car": 0x1F697, "motorcycle": 0x1F3CD, "airplane": 0x2708, "bus": 0x1F68C,
    "train": 0x1F686, "truck": 0x1F69A, "boat": 0x26F5, "traffic light": 0x1F6A6, "stop sign": 0x1F6D1, "bird": 0x1F426,
    "cat": 0x1F408, "dog": 0x1F415, "horse": 0x1F40E, "sheep": 0x1F411, "cow": 0x1F404, "elephant": 0x1F418,
    "bear": 0x1F43B, "zebra": 0x1F993, "giraffe": 0x1F992, "backpack": 0x1F392, "umbrella": 0x2602, "handbag": 0x1F45C,
    "tie": 0x1F454, "suitcase": 0x1F9F3, "frisbee": 0x1F94F, "skis": 0x1F3BF, "sports ball": 0x26BD, "kite": 0x1FA81,
    "skateboard": 0x1F6F9, "tennis racket": 0x1F3BE, "bottle": 0x1F37E, "wine glass": 0x1F377, "cup": 0x2615,
    "fork": 0x1F374, "knife": 0x1F52A, "spoon": 0x1F944, "bowl": 0x1F963, "banana": 0x1F34C, "apple": 0x1F34E,
    "sandwich": 0x1F96A, "orange": 0x1F34A, "broccoli": 0x1F966, "carrot": 0x1F955, "hot dog": 0x1F32D,
    "pizza": 0x1F355, "donut": 0x1F369, "cake": 0x1F382, "chair": 0x1FA91, "couch": 0x1F6CB, "potted plant": 0x1FAB4,
    "bed": 0x1F6CF, "toilet": 0x1F6BD, "tv": 0x1F4FA, "laptop": 0x1F4BB, "mouse": 0x1F5B1, "keyboard": 0x2328,
    "cell phone": 0x1F4F1, "book": 0x1F4D5, "clock": 0x23F0, "vase": 0x1F3FA, "scissors": 0x2702,
    "teddy bear": 0x1F9F8, "toothbrush": 0x1FAA5,
}  # fmt: skip


def sprite(font: ImageFont.FreeTypeFont, name: str) -> Image.Image:
    """One glyph, cropped, centred in a square cell with a transparent pixel around."""
    glyph = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(glyph).text((12, 12), chr(CODES[name]), font=font, embedded_color=True)
    box = glyph.getbbox()
    if box is None:
        raise SystemExit(f"the font has no glyph for {name}")
    if name == "fork":  # the glyph shows fork and knife; the fork is its left half
        glyph = glyph.crop((box[0], box[1], (box[0] + box[2]) // 2, box[3]))
        box = glyph.getbbox()
    glyph = glyph.crop(box)
    glyph.thumbnail((CELL - 2, CELL - 2), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
    cell.paste(glyph, ((CELL - glyph.width) // 2, (CELL - glyph.height) // 2))
    return cell


def main() -> None:
    """Write eval/scenes/atlas.png."""
    font = ImageFont.truetype(sys.argv[1], 109)
    rows = -(-len(NAMES) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * CELL, rows * CELL), (0, 0, 0, 0))
    for i, name in enumerate(NAMES):
        atlas.paste(sprite(font, name), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    atlas.save(Path(__file__).parent.parent / "eval" / "scenes" / "atlas.png", optimize=True)


if __name__ == "__main__":
    main()
