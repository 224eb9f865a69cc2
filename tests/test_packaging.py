"""The wheel is built, installed aside and used from outside the checkout; nothing unlicensed travels in it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.xdist_group("packaging")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LEFT_OUT = (".*", "build", "dist", "demo", "*.egg-info", "__pycache__", "node_modules")
OURS = ("vlmfix/py.typed", "vlmfix/presets/", "vlmfix/pico/")
"""Data made by this project, under its own licence."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the sdist and the wheel made from it."""
    source = tmp_path_factory.mktemp("build") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return source / "dist"


@pytest.fixture(scope="module")
def wheel_names(built):
    return zipfile.ZipFile(next(built.glob("*.whl"))).namelist()


@pytest.fixture(scope="module")
def sdist_names(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        return [name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()]


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Runs the installed console script from outside the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(folder), str(next(built.glob("*.whl")))], check=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}

    def call(*arguments):
        command = [sys.executable, str(folder / "bin" / "vlmfix"), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    call.python = lambda code: subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    call.folder = folder
    return call


def test_every_package_is_declared():
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    for base, prefix in ((ROOT / "vlmfix", "vlmfix"), (ROOT / "eval", "vlmfix.eval")):
        for file in base.rglob("__init__.py"):
            name = ".".join([prefix, *file.parent.relative_to(base).parts])
            assert name in declared, f"add {name} to packages in pyproject.toml"
            if prefix == "vlmfix.eval":
                assert mapped.get(name) == file.parent.relative_to(ROOT).as_posix(), f"map {name} in package-dir"


def test_wheel_holds_every_module(wheel_names):
    for base, prefix in ((ROOT / "vlmfix", "vlmfix"), (ROOT / "eval", "vlmfix/eval")):
        for file in base.rglob("*.py"):
            assert f"{prefix}/{file.relative_to(base).as_posix()}" in wheel_names


def test_wheel_holds_nothing_else(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert len(tops) == 2
    assert "vlmfix" in tops
    licences = {Path(name).name for name in wheel_names if "/licenses/" in name}
    assert {"LICENSE", "NOTICE"} <= licences
    assert "vlmfix/py.typed" in wheel_names


def data_files(names):
    return [name for name in names if name.startswith(("vlmfix/", "eval/")) and not name.endswith((".py", "py.typed"))]


def test_data_is_ours_or_its_licence_is_named(wheel_names, sdist_names):
    notice = (ROOT / "NOTICE").read_text()
    data = (ROOT / "eval" / "data" / "README.md").read_text()
    found = data_files(wheel_names) + data_files(sdist_names)
    assert found
    for name in found:
        path = name.replace("vlmfix/eval/", "eval/")
        licensed = (
            path in notice
            or f"`{Path(path).name}`" in data
            or path.endswith(("LICENSE.txt", "LICENSES.txt", "README.md"))
        )
        assert licensed or path.startswith(OURS), (
            f"say in NOTICE or eval/data/README.md where {path} comes from and under which licence"
        )


def test_tests_and_their_data_stay_out(wheel_names, sdist_names):
    for names in (wheel_names, sdist_names):
        assert not [name for name in names if re.match(r"(tests|shared|benchmarks)/", name)]
    assert {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "pyproject.toml", "cli.py"} <= set(sdist_names)


def test_installed_copy_is_the_one_that_runs(installed):
    done = installed.python("import vlmfix, vlmfix.eval, sys; print(vlmfix.__file__, vlmfix.eval.__file__)")
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(installed.folder)) for path in done.stdout.split())


def test_installed_listings(installed):
    assert installed("--version").stdout.split() == ["vlmfix", PROJECT["project"]["version"]]
    assert json.loads(installed("methods", "--json").stdout)
    assert json.loads(installed("models", "--json").stdout)


def test_installed_copy_answers(installed):
    picture = installed.folder / "gray.png"
    Image.new("RGB", (96, 96), "gray").save(picture)
    done = installed("run", picture, "-p", "Describe the image.", "--method", "vcd", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["text"]
    assert record["report"]["branches"] == 1


def test_launcher_of_a_checkout(tmp_path):
    """`python cli.py` finds eval/ as vlmfix.eval without an installation."""
    for name in ("vlmfix", "eval"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copy(ROOT / "cli.py", tmp_path)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "import cli, vlmfix, vlmfix.eval.store; print(vlmfix.eval.store.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str(tmp_path / "eval" / "store.py"), done.stderr


def test_versions_agree():
    from vlmfix import __version__

    assert PROJECT["project"]["version"] == __version__
    assert re.search(rf"^## {re.escape(__version__)}", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_constraints_cover_the_direct_dependencies():
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["dev"]]
    names = {re.match(r"[\w-]+", line)[0] for line in wanted}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert names <= pinned.keys()
