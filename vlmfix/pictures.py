"""Picture files as models expect them: upright 8-bit RGB, or an error that names the file and the remedy."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from vlmfix.errors import PictureError

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded, in pixels: 512 MiB as RGB, where Pillow too sees a decompression bomb."""

SUFFIXES = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pcx", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
"""File name endings that stand for a picture when a folder is read."""

_NOTES = "vlmfix_notes"
_LOOKS_LIKE = (
    (b"<", "a web page or SVG text", "download the picture itself, or export it as PNG"),
    (b"%PDF", "a PDF document", "export the page as PNG"),
    (b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer", "run `git lfs pull`"),
    (b"\x1aE\xdf\xa3", "a video", "extract a frame as PNG"),
)


def load(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a picture file.

    The first frame of an animation is taken, EXIF rotation applied, transparency laid on white, 16-bit and float gray
    scaled to 8 bit, and CMYK, palette and other modes converted.

    Args:
        path: the file.
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        An RGB image; `notes` tells what was not plain about the file.

    Raises:
        PictureError: the file is missing, empty, cut short, too large or no picture.
    """
    path = Path(path)
    _check_file(path)
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as opened:
                if opened.width * opened.height > max_pixels:
                    raise Image.DecompressionBombError
                if opened.format != "MPO" and getattr(opened, "is_animated", False):
                    notes.append("animated or of several pages: the first frame was used")
                    opened.seek(0)
                opened.load()
                try:
                    ImageOps.exif_transpose(opened, in_place=True)
                except Exception:  # a damaged EXIF block says nothing about the pixels
                    notes.append("damaged EXIF data: taken as upright")
                image = rgb(opened, str(path))
    except PictureError:
        raise
    except Image.DecompressionBombError:
        raise PictureError(
            f"{path}: more than {max_pixels / 1e6:.0f} megapixels; scale the picture down first"
        ) from None
    except UnidentifiedImageError:
        raise PictureError(f"{path}: {_not_a_picture(path)}") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        reason = str(error) or type(error).__name__
        raise PictureError(f"{path}: damaged or cut short ({reason}); copy or download it again") from error
    image.info = {_NOTES: tuple(notes)}
    return image


def rgb(image: Image.Image, name: str = "picture") -> Image.Image:
    """Converts an image of any mode to 8-bit RGB: transparency on white, 16-bit and float gray scaled.

    Args:
        image: the picture.
        name: how an error calls it.

    Raises:
        PictureError: its values have no defined black and white.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image, name)
    if image.has_transparency_data or image.mode in ("La", "RGBa"):
        picture = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(picture)
    return image.convert("RGB")


def notes(image: Image.Image) -> tuple[str, ...]:
    """What `load` had to decide about the file: an empty tuple for a plain picture."""
    found: tuple[str, ...] = image.info.get(_NOTES, ())
    return found


def is_picture(path: Path) -> bool:
    """Whether the file name stands for a picture."""
    return path.suffix.lower() in SUFFIXES


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise PictureError(f"{path}: no such file; check the path") from None
    except (OSError, ValueError) as error:
        raise PictureError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    if not path.is_file():
        raise PictureError(f"{path}: is not a file; give a picture file")
    if size == 0:
        raise PictureError(f"{path}: is empty (0 bytes); copy or download it again")
    if not os.access(path, os.R_OK):
        raise PictureError(f"{path}: cannot be read (permission denied); run `chmod u+r` on it")


def _not_a_picture(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    for start, what, remedy in _LOOKS_LIKE:
        if head.startswith(start):
            return f"is {what}, not a picture; {remedy}"
    if head[4:8] == b"ftyp":
        heic = head[8:11] in (b"hei", b"hev", b"mif")
        return "is a HEIC picture; convert it to JPEG or PNG" if heic else "is a video; extract a frame as PNG"
    return "is not a picture in a format that can be read; convert it to PNG or JPEG"


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    import numpy as np  # here, so that the command line's help stays quick

    values: Any = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))
    if image.mode == "F" and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1:
        return Image.fromarray((values * 255).round().astype(np.uint8))
    raise PictureError(
        f"{name}: its {image.mode}-mode values have no defined black and white; export it as 8- or 16-bit PNG"
    )
