"""What the tests of the command line share."""

import pytest
from PIL import Image
from typer.testing import CliRunner

import vlmfix.api
from vlmfix.commands import app

from . import fake


@pytest.fixture
def vlmfix_says():
    """Runs a command line; returns its result with exit_code, stdout, stderr."""

    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def fake_model(monkeypatch):
    """Commands load a `FakeVLM`; returns the list of its calls."""
    monkeypatch.setattr(vlmfix.api, "load", fake.load)
    monkeypatch.setattr(vlmfix.api, "wrap", fake.wrap)
    monkeypatch.setattr(fake.FakeVLM, "calls", [])
    return fake.FakeVLM.calls


@pytest.fixture
def photos(tmp_path):
    """A folder of five small pictures, 1x9 to 5x9."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for width in range(1, 6):
        Image.new("RGB", (width, 9)).save(folder / f"{width}.png")
    return folder
