"""Results equal those of the methods' reference implementations.

`VLMFIX_GOLDEN=DIR pytest tests/golden` checks every case under DIR/<method>/ instead of the project's own.
"""

import json

import pytest

from vlmfix import registry

from . import cases
from .cases import FIXTURES, adapter, find, folder, slugs

CASES = [case for slug in slugs(folder())[0] for case in find(folder(), slug)]
OWN = [case for slug in slugs(FIXTURES)[0] for case in find(FIXTURES, slug)]
MUTATIONS = [
    (slug, name) for slug in slugs(FIXTURES)[0] if (module := adapter(slug)) is not None for name in module.MUTANTS
]


COVERED = {
    name for slug in slugs(FIXTURES)[0] if find(FIXTURES, slug) for name in getattr(adapter(slug), "COVERS", (slug,))
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.slug}-{case.path.stem}")
def test_equals_the_reference(case):
    case.check()


@pytest.mark.parametrize("slug", slugs(folder())[0])
def test_every_folder_of_a_method_has_cases(slug):
    assert find(folder(), slug), f"{folder() / slug}: no case"


@pytest.mark.parametrize("row", [row for row in registry.ROWS if row.evidence == "ref-run"], ids=lambda row: row.name)
def test_methods_said_to_equal_their_reference_have_vectors(row):
    assert row.name in COVERED


@pytest.mark.parametrize(("slug", "name"), MUTATIONS)
def test_the_vectors_notice_a_mistake(slug, name, monkeypatch):
    module = adapter(slug)
    assert module is not None
    module.MUTANTS[name](monkeypatch)
    noticed = False
    for case in find(FIXTURES, slug):
        try:
            case.check()
        except AssertionError:
            noticed = True
            break
    assert noticed, f"{slug}: {name} goes unnoticed"


def test_a_method_without_an_adapter_fails(tmp_path, monkeypatch):
    (tmp_path / "greedy").mkdir()
    (tmp_path / "greedy" / "case_1.json").write_text("{}")
    (tmp_path / "greedy" / "case_1.safetensors").write_bytes((FIXTURES / "vcd" / "case_5.safetensors").read_bytes())
    (tmp_path / "nosuch").mkdir()
    monkeypatch.setenv("VLMFIX_GOLDEN", str(tmp_path))
    assert slugs(folder()) == (["greedy"], ["nosuch"])
    with pytest.raises(AssertionError, match=r"no adapter tests/golden/adapters/greedy\.py"):
        find(folder(), "greedy")[0].check()


def test_a_missing_folder_is_an_error(monkeypatch):
    monkeypatch.setenv("VLMFIX_GOLDEN", "/nonexistent")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cases.folder()


def test_every_case_says_where_it_comes_from():
    for case in OWN:
        info = json.loads(case.path.read_text())
        assert info.get("source") or info.get("reference_repo") or info.get("made_by")
