"""Every kind of awkward picture file is either right or an error that names file and remedy."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import vlmfix.pictures as pictures
from vlmfix.errors import PictureError

RED, BLUE = (200, 30, 40), (20, 40, 220)


def halves(mode="RGB", size=(8, 4)):
    """Left half red, right half blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def near(pixel, colour, tolerance=12):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= tolerance


def saved(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "name"),
    [("RGB", "a.png"), ("RGB", "a.jpg"), ("CMYK", "a.jpg"), ("CMYK", "a.tif"), ("P", "a.png"), ("P", "a.gif"),
     ("YCbCr", "a.jpg"), ("RGBA", "a.webp"), ("RGB", "a.avif"), ("RGB", "a.bmp"), ("HSV", None), ("RGBa", None)],
)  # fmt: skip
def test_modes(tmp_path, mode, name):
    if name is None:
        image = pictures.rgb(halves("RGBA").convert(mode) if mode == "RGBa" else halves(mode))
    else:
        options = {"quality": 95, "subsampling": 0} if name.endswith("jpg") else {}
        image = pictures.load(saved(tmp_path, halves(mode, (64, 32)), name, **options))
    assert image.mode == "RGB"
    assert near(image.getpixel((0, 0)), RED, 40 if mode == "P" else 12)
    assert near(image.getpixel((image.width - 1, 0)), BLUE, 40 if mode == "P" else 12)


def test_transparency_is_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (2, 1), (*RED, 0))
    clear.putpixel((1, 0), (*RED, 255))
    for image in (clear, clear.convert("RGBa")):
        seen = pictures.rgb(image)
        assert seen.getpixel((0, 0)) == (255, 255, 255)
        assert seen.getpixel((1, 0)) == RED
    gray = Image.new("LA", (1, 1), (7, 0))
    assert pictures.rgb(gray).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putpixel((1, 0), 1)
    path = saved(tmp_path, palette, "p.png", transparency=0)
    assert [pictures.load(path).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), BLUE]


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bit_gray_keeps_its_range(tmp_path, name):
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    path = saved(tmp_path, image.convert("I") if name.endswith("pgm") else image, name)
    assert [pixel[0] for pixel in np.asarray(pictures.load(path))[0]] == [0, 100, 255]


def test_sixteen_bit_colour(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">3H", *(257 * value for value in RED))
    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    )
    assert pictures.load(path).getpixel((0, 0)) == RED


def test_float_gray(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32)), "a.tif")
    assert np.asarray(pictures.load(path))[0, :, 0].tolist() == [0, 51, 255]
    path = saved(tmp_path, Image.fromarray(np.array([[0.0, 4000.0]], dtype=np.float32)), "b.tif")
    with pytest.raises(PictureError, match=r"b\.tif.*export it as"):
        pictures.load(path)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (7, 0)), (6, (0, 0)), (8, (0, 7))])
def test_exif_rotation(tmp_path, orientation, corner):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = pictures.load(saved(tmp_path, halves(), "a.png", exif=exif))
    assert image.size == ((8, 4) if orientation < 5 else (4, 8))
    assert near(image.getpixel(corner), RED)


def test_damaged_exif_is_noted(tmp_path):
    image = pictures.load(saved(tmp_path, halves(), "a.png", exif=b"Exif\0\0not a TIFF header"))
    assert image.size == (8, 4)
    assert "EXIF" in " ".join(pictures.notes(image))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_animation_gives_first_frame_and_a_note(tmp_path, name):
    first, second = Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)
    options = {"lossless": True} if name.endswith("webp") else {}
    image = pictures.load(saved(tmp_path, first, name, save_all=True, append_images=[second], **options))
    assert near(image.getpixel((3, 3)), RED)
    assert "first frame" in pictures.notes(image)[0]


def test_plain_picture_has_no_notes(tmp_path):
    assert pictures.notes(pictures.load(saved(tmp_path, halves(), "a.png"))) == ()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    path = tmp_path / "cut.picture"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * share)])
    with pytest.raises(PictureError, match=r"cut\.picture.*(again|convert)"):
        pictures.load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"hello", "not a picture"), (b"<html><body>404</body></html>", "web page"),
     (b"<svg></svg>", "SVG"), (b"%PDF-1.7", "PDF"),
     (b"\0\0\0\x18ftypheic", "HEIC"), (b"\0\0\0\x18ftypmp42", "video"), (b"PK\x03\x04", "ZIP")],
)  # fmt: skip
def test_not_a_picture(tmp_path, content, words):
    path = tmp_path / "thing.jpg"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=rf"thing\.jpg.*{words}.*;"):
        pictures.load(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(PictureError, match=r"gone\.jpg: no such file"):
        pictures.load(tmp_path / "gone.jpg")
    with pytest.raises(PictureError, match="not a file"):
        pictures.load(tmp_path)


def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    path = saved(tmp_path, Image.new("1", (20_000, 20_000)), "bomb.png")
    assert path.stat().st_size < 200_000
    with pytest.raises(PictureError, match=r"bomb\.png: more than 179 megapixels; scale"):
        pictures.load(path)
    with pytest.raises(PictureError, match="scale the picture down"):
        pictures.load(saved(tmp_path, halves(size=(100, 100)), "a.png"), max_pixels=9_999)
