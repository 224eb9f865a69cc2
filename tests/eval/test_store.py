import json
import os
import signal
import subprocess
import sys
import time

import pytest
from vlmfix.eval.store import Store

from vlmfix.errors import UsageError, VlmfixError

PLACES = ["answers.jsonl", "folder"]


@pytest.mark.parametrize("place", PLACES)
def test_answers_and_errors_are_kept_apart_and_come_back(tmp_path, place):
    with Store(tmp_path / place, "s") as store:
        assert store.done() == set()
        store.append({"id": "1", "text": "a dog", "tokens": 2})
        store.append({"id": "2", "error": "PictureError: b.jpg is empty"})
        store.append({"id": "3", "text": ""})
    again = Store(tmp_path / place, "s")
    assert again.done() == {"1", "2", "3"}
    assert again.done(retry_errors=True) == {"1", "3"}
    assert again.records() == [
        {"spec": "s", "id": "1", "text": "a dog", "tokens": 2},
        {"spec": "s", "id": "3", "text": ""},
    ]
    assert [e["id"] for e in again.errors()] == ["2"]
    assert again.problems() == []


@pytest.mark.parametrize("place", PLACES)
def test_a_retried_error_gives_way_to_the_answer(tmp_path, place):
    store = Store(tmp_path / place, "s")
    store.append({"id": "1", "error": "first"})
    store.append({"id": "1", "error": "second"})
    assert [e["error"] for e in store.errors()] == ["second"]
    store.append({"id": "1", "text": "yes"})
    assert store.errors() == []
    assert [r["text"] for r in store.records()] == ["yes"]


@pytest.mark.parametrize("place", PLACES)
def test_no_key_twice(tmp_path, place):
    store = Store(tmp_path / place, "s")
    store.append({"id": "1", "text": "yes"})
    with pytest.raises(UsageError, match="'1' has an answer"):
        store.append({"id": "1", "text": "no"})
    store.close()
    with pytest.raises(UsageError, match="'1' has an answer"):
        Store(tmp_path / place, "s").append({"id": "1", "text": "no"})
    with pytest.raises(UsageError, match="'2' has an answer"):
        Store(tmp_path / place, "t").extend([{"id": "2", "text": "a"}, {"id": "2", "text": "b"}])
    assert len(store.records()) == 1


def test_specs_share_a_file_without_meeting(tmp_path):
    path = tmp_path / "answers.jsonl"
    with Store(path, "a") as store:
        store.append({"id": "1", "text": "yes"})
    with Store(path, "b") as store:
        store.append({"id": "1", "text": "no"})
    assert [r["text"] for r in Store(path, "a").records()] == ["yes"]
    assert [r["text"] for r in Store(path, "b").records()] == ["no"]


def test_duplicates_of_two_processes_are_named_and_the_first_counts(tmp_path):
    for name, text in [("answers-1", "yes"), ("answers-2", "no"), ("answers-3", "yes")]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"spec": "s", "id": "1", "text": text}) + "\n")
    store = Store(tmp_path, "s")
    assert [r["text"] for r in store.records()] == ["yes"]
    assert store.problems() == [
        "answers-2.jsonl:1: another answer to item '1' as in answers-1.jsonl:1; the first counts",
        "answers-3.jsonl:1: the same answer to item '1' as in answers-1.jsonl:1; the first counts",
    ]


def test_two_writers_in_a_folder_but_one_on_a_file(tmp_path):
    first, second = Store(tmp_path / "d", "s"), Store(tmp_path / "d", "s")
    first.append({"id": "1", "text": "a"})
    second.append({"id": "2", "text": "b"})
    assert first.done() == second.done() == {"1", "2"}
    assert len(first.files()) == 2
    alone, late = Store(tmp_path / "x.jsonl", "s"), Store(tmp_path / "x.jsonl", "s")
    alone.append({"id": "1", "text": "a"})
    with pytest.raises(VlmfixError, match="being written already"):
        late.append({"id": "2", "text": "b"})
    alone.close()
    late.append({"id": "2", "text": "b"})
    assert late.done() == {"1", "2"}


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_every_truncation_of_the_last_line_is_tolerated_and_named(tmp_path, cut):
    path = tmp_path / "answers.jsonl"
    with Store(path, "s") as store:
        store.append({"id": "1", "text": "grün"})
        store.append({"id": "2", "text": "grün"})
    path.write_bytes(path.read_bytes()[:-cut])
    store = Store(path, "s")
    lost = cut > 1  # without its newline alone the record is whole
    assert store.done() == ({"1"} if lost else {"1", "2"})
    assert store.problems() == (
        ["answers.jsonl:2: unfinished or broken line, its item counts as not answered"] if lost else []
    )
    store.append({"id": "3", "text": "new"})
    assert store.done() == ({"1", "3"} if lost else {"1", "2", "3"})


WRITER = """
import sys
from vlmfix.eval.store import Store
store = Store(sys.argv[1], "s")
for n in range(10**6):
    store.append({"id": str(n), "text": "x" * 2000})
    if n == 20: print("going", flush=True)
"""


def test_kill_9_loses_nothing_that_was_appended(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"going\n"
    time.sleep(0.05)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    store = Store(tmp_path, "s")
    done = store.done()
    assert done == {str(n) for n in range(len(done))}
    assert len(done) > 20
    assert len(store.problems()) <= 1


def test_full_disk_is_an_error_that_keeps_the_file_whole(tmp_path, monkeypatch):
    store = Store(tmp_path / "a.jsonl", "s")
    store.append({"id": "1", "text": "a"})
    write = os.write

    def half(file, data):
        if len(data) > 10:
            return write(file, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(VlmfixError, match=r"a\.jsonl cannot be written: No space left on device.*goes on"):
        store.append({"id": "2", "text": "bbbbbbbbbbbbbb"})
    monkeypatch.undo()
    assert store.problems() == []
    store.append({"id": "2", "text": "b"})
    assert store.done() == {"1", "2"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "no id"),
        ({"id": 3, "text": "a"}, "no id"),
        ({"id": "1"}, "either text or error"),
        ({"id": "1", "text": "a", "error": "b"}, "either text or error"),
        ({"id": "1", "text": None}, "no text"),
        ({"id": "1", "text": "a", "report": {"x": object()}}, r"1\.report\.x holds a object"),
    ],
)
def test_bad_records_are_refused(tmp_path, record, message):
    with pytest.raises(UsageError, match=message):
        Store(tmp_path / "d", "s").append(record)
    assert Store(tmp_path / "d", "s").done() == set()


def test_odd_values_are_stored_as_json(tmp_path):
    import numpy as np

    store = Store(tmp_path / "d", "s")
    store.append({"id": "1", "text": "\ud800 \u2028 a\nb", "margin": float("nan"), "x": np.float32(0.5), "p": tmp_path})
    (record,) = store.records()
    assert record["text"] == "\ud800 \u2028 a\nb"
    assert record["margin"] is None
    assert record["x"] == 0.5
    assert record["p"] == str(tmp_path)


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmfixError, match="cannot be written: Not a directory"):
        Store(tmp_path / "file" / "below", "s").append({"id": "1", "text": "a"})


def test_strange_lines_are_named_not_used(tmp_path):
    (tmp_path / "a.jsonl").write_text('[1]\n{"id": "1", "text": "a"}\n\n{"spec": "s", "id": "2"}\n')
    store = Store(tmp_path, "s")
    assert store.records() == []
    assert store.problems() == [
        "a.jsonl:1: the record is not an object, it is not used",
        "a.jsonl:2: the record has no spec, it is not used",
        "a.jsonl:4: the record needs either text or error, it is not used",
    ]
