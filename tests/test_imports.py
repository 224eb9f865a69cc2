"""Imports point one way, transformers has one door, and importing the package does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = [
    *(
        "errors",
        "checks",
        "layout",
        "plan",
        "view",
        "shown",
        "method",
        "registry",
        "presets",
        "pico",
        "pictures",
        "rows",
        "items",
    ),
    *("kernels", "hf", "attention", "views", "pruning", "decoders", "recipe", "engine", "diagnostics"),
    *("preparing", "applying", "settling", "fixed", "api"),
    *("answering", "eval", "commands"),
]
"""Modules and packages of vlmfix; each may import itself and earlier ones."""


def modules():
    """(file, dotted name, whether it is a package) of every module, eval/ as vlmfix.eval."""
    for base, prefix in ((ROOT / "vlmfix", "vlmfix"), (ROOT / "eval", "vlmfix.eval")):
        for file in base.rglob("*.py"):
            parts = (*prefix.split("."), *file.relative_to(base).with_suffix("").parts)
            package = parts[-1] == "__init__"
            yield file, ".".join(parts[:-1] if package else parts), package


MODULES = list(modules())


def imported(file, name, package):
    """Dotted names that a file imports, anywhere in it."""
    here = name.split(".") if package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part(name):
    words = name.split(".")
    return words[1] if words[0] == "vlmfix" and len(words) > 1 else None


def test_imports_point_one_way():
    wrong = []
    for file, name, package in MODULES:
        own = part(name)
        if own is None:
            continue  # vlmfix/__init__.py names the public things and loads them when asked
        assert own in ORDER, f"{own} has no place in ORDER"
        for target in imported(file, name, package):
            other = part(target)
            if other in ORDER and ORDER.index(other) > ORDER.index(own):
                wrong.append(f"{name} imports {target}")
    assert not wrong


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("transformers", {"hf"}),
        ("triton", {"kernels"}),
        ("typer", {"commands"}),
        ("rich", {"commands", "eval"}),
        ("pycocotools", {"eval"}),
    ],
)
def test_libraries_have_their_door(library, allowed):
    users = {
        name
        for file, name, package in MODULES
        for target in imported(file, name, package)
        if target.split(".")[0] == library and part(name) not in allowed
    }
    assert not users


def test_nothing_is_imported_from_the_checkout_alone():
    for file, name, package in MODULES:
        for target in imported(file, name, package):
            assert target.split(".")[0] not in ("tests", "scripts", "benchmarks", "examples", "eval", "cli"), name


@pytest.mark.parametrize(
    "module",
    [
        "vlmfix",
        "vlmfix.registry",
        "vlmfix.hf.families",
        "vlmfix.errors",
        "vlmfix.items",
        "vlmfix.commands",
        "vlmfix.eval",
    ],
)
def test_light_modules_import_no_torch(module):
    code = f"import sys, {module}; print([x for x in ('torch', 'transformers') if x in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_exist():
    import vlmfix

    for name in vlmfix.__all__:
        assert getattr(vlmfix, name) is not None
    assert set(vlmfix.__all__) <= set(dir(vlmfix))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        vlmfix.Nonsense  # noqa: B018
