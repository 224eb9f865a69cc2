"""Drawings show what they are given, as SVG and as PNG alike."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from vlmfix.diagnostics.canvas import Box, Drawing, blend
from vlmfix.diagnostics.drawing import SCALE, curve, head_matrix, heat_map
from vlmfix.errors import UsageError


def elements(drawing, name):
    return ElementTree.fromstring(drawing.svg()).findall("{http://www.w3.org/2000/svg}" + name)


def test_a_matrix_has_a_cell_per_head_and_a_frame_per_choice():
    values = torch.tensor([[0.0, 1.0, 0.5], [math.nan, 0.25, 0.75]])
    drawing = head_matrix(values, layers=[4, 7], chosen={(1, 2)}, title="a < b & c")
    fills = [e.get("fill") for e in elements(drawing, "rect")[1:7]]
    assert fills[0] == "#440154"
    assert fills[1] == "#fde725"
    assert fills[3] == "#e1e1e1"
    assert len(elements(drawing, "polyline")) == 1
    texts = [e.text for e in elements(drawing, "text")]
    assert "a < b & c" in texts
    assert {"4", "7", "0", "1"} <= set(texts)
    picture = drawing.image()
    assert picture.getpixel((46 + 14 + 5, 44 + 5)) == SCALE[-1]
    assert picture.getpixel((46 + 5, 44 + 5)) == SCALE[0]


def test_a_heat_map_lies_over_the_picture():
    grid = torch.zeros(4, 4)
    grid[0, 0] = 1
    drawing = heat_map(Image.new("RGB", (64, 48), "black"), grid, opacity=1.0, title="map")
    page = drawing.image()
    assert page.getpixel((12, 28)) == SCALE[-1]
    assert page.getpixel((70, 70)) == SCALE[0]
    assert {"0", "1"} <= {e.text for e in elements(drawing, "text")}
    shared = heat_map(Image.new("RGB", (64, 48), "black"), grid, low=0, high=4, opacity=1.0).image()
    assert shared.getpixel((12, 28)) == blend(SCALE, 0.25)


def test_a_curve_breaks_where_a_value_is_missing():
    drawing = curve(["a", " dog", "."], {"one": [0.0, 1.0, 0.5], "two": [0.2, math.nan, 0.3]}, shaded={1}, mark=0.5)
    lines = [e for e in elements(drawing, "polyline") if e.get("stroke-width") == "2"]
    assert len(lines) == 2 + 2  # two pieces of the first, none of the second, one sample of each in the legend
    assert any(e.get("fill") == "#fde2e2" for e in elements(drawing, "rect"))


def test_files_by_ending(tmp_path):
    drawing = Drawing(20, 10, [Box(0, 0, 20, 10, (1, 2, 3))])
    drawing.save(tmp_path / "a.png")
    drawing.save(tmp_path / "a.svg")
    assert Image.open(tmp_path / "a.png").getpixel((5, 5)) == (1, 2, 3)
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        drawing.save(tmp_path / "a.gif")


def test_bad_input_is_said():
    with pytest.raises(UsageError, match="grid of finite values"):
        heat_map(Image.new("RGB", (8, 8)), torch.tensor([[math.nan]]))
    with pytest.raises(UsageError, match="'one' has 1 values for 2 tokens"):
        curve(["a", "b"], {"one": [1.0]})
