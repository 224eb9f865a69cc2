import json
import os
import subprocess
import sys
import threading
import time

import pytest
from vlmfix.eval.base import Item
from vlmfix.eval.runner import GIVE_UP, batches, estimate, evaluate
from vlmfix.eval.store import Store
from vlmfix.eval.world import World, alone, shard, wait, world

from vlmfix.errors import UsageError, VlmfixError

ITEMS = [Item(f"q{n}", f"p{n // 3}.png", "Is it?" + " really" * (n % 7)) for n in range(40)]


class Echo:
    """Answers with the prompt's length; items in `broken` raise."""

    def __init__(self, broken=(), empty=()):
        self.broken, self.empty, self.calls = set(broken), set(empty), []

    def answer(self, items, images, settings):
        self.calls.append([item.id for item in items])
        for item in items:
            if item.id in self.broken:
                raise ValueError(f"cannot digest {item.id}")
        return [
            {"id": i.id, "text": "" if i.id in self.empty else f"{len(i.prompt)} {image} {settings.get('x')}"}
            for i, image in zip(items, images, strict=True)
        ]


def test_every_item_is_answered_once_with_its_picture_and_settings(tmp_path):
    store, seen = Store(tmp_path / "r", "s"), []
    opened = []
    outcome = evaluate(
        ITEMS, Echo(empty=["q3"]), store, batch_size=5, settings={"x": 1},
        pictures=lambda name: opened.append(name) or name.upper(), progress=lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert (outcome.answered, outcome.failed, outcome.kept) == (40, 0, 0)
    found = {record["id"]: record for record in store.records()}
    assert found["q0"]["text"] == "6 P0.PNG 1"
    assert found["q0"]["prompt"] == "Is it?"
    assert found["q3"]["text"] == ""
    assert seen[-1] == (40, 40)
    assert len(opened) <= 14 + 8  # a picture is opened once a batch


def test_batches_keep_a_picture_together_and_lengths_alike():
    made = list(batches(ITEMS, 6))
    assert sorted(item.id for batch in made for item in batch) == sorted(item.id for item in ITEMS)
    pictures = [item.image for batch in made for item in batch]
    assert [p for n, p in enumerate(pictures) if n == 0 or pictures[n - 1] != p] == list(dict.fromkeys(pictures))
    longest = [max(len(item.prompt) for item in ITEMS if item.image == picture) for picture in dict.fromkeys(pictures)]
    assert longest == sorted(longest)
    with pytest.raises(UsageError, match="--batch-size 0"):
        list(batches(ITEMS, 0))


def test_one_bad_item_does_not_cost_its_batch(tmp_path):
    store = Store(tmp_path / "r", "s")
    outcome = evaluate(ITEMS, Echo(broken=["q4", "q20"]), store, batch_size=8)
    assert (outcome.answered, outcome.failed) == (38, 2)
    assert {e["id"]: e["error"] for e in store.errors()} == {
        "q4": "ValueError: cannot digest q4",
        "q20": "ValueError: cannot digest q20",
    }
    again = Echo()
    assert evaluate(ITEMS, again, store).answered == 0
    assert again.calls == []
    assert evaluate(ITEMS, again, store, retry_errors=True).answered == 2
    assert store.errors() == []
    assert len(store.records()) == 40


def test_unreadable_pictures_are_errors_of_their_items(tmp_path):
    def open_(name):
        if name == "p1.png":
            raise VlmfixError("p1.png is empty; copy it again")
        return name

    store = Store(tmp_path / "r", "s")
    outcome = evaluate(ITEMS, Echo(), store, pictures=open_)
    assert outcome.failed == 3
    assert {e["id"] for e in store.errors()} == {"q3", "q4", "q5"}
    assert store.errors()[0]["error"] == "VlmfixError: p1.png is empty; copy it again"


def test_a_broken_model_stops_the_run(tmp_path):
    class Dead:
        def answer(self, items, images, settings):
            raise RuntimeError("device lost")

    store = Store(tmp_path / "r", "s")
    with pytest.raises(VlmfixError, match=r"16 items in a row failed with: RuntimeError: device lost.*--retry-errors"):
        evaluate(ITEMS, Dead(), store, batch_size=4)
    assert len(store.errors()) == GIVE_UP


def test_answerers_that_mix_up_items_are_stopped(tmp_path):
    class Mixed:
        def answer(self, items, images, settings):
            return [{"id": item.id, "text": ""} for item in reversed(items)]

    with pytest.raises(VlmfixError, match="one record per item, in order"):
        evaluate(ITEMS, Mixed(), Store(tmp_path / "r", "s"))


def test_limit_and_repeated_ids(tmp_path):
    store = Store(tmp_path / "r", "s")
    evaluate(ITEMS, Echo(), store, limit=7)
    assert len(store.records()) == 7
    evaluate(ITEMS, Echo(), store, limit=9)
    assert len(store.records()) == 9
    with pytest.raises(UsageError, match="--limit 0"):
        evaluate(ITEMS, Echo(), store, limit=0)
    with pytest.raises(UsageError, match="two items 'q1'"):
        evaluate([ITEMS[1], ITEMS[1]], Echo(), store)


def test_estimate_times_a_few_items_and_stores_nothing():
    class Slow(Echo):
        def answer(self, items, images, settings):
            time.sleep(0.01 * len(items))
            return [{**r, "peak_bytes": 3 * 2**20} for r in super().answer(items, images, settings)]

    slow = Slow()
    found = estimate(ITEMS, slow, batch_size=4, done=["q0", "q1"], processes=2)
    assert found.items == 38
    assert found.sampled == 8 - (38 % 4 > 0) * (4 - 38 % 4)
    assert len(slow.calls) == 3
    assert 0.01 <= found.seconds_per_item < 0.03
    assert found.hours == pytest.approx(found.seconds_per_item * 38 / 2 / 3600)
    assert found.peak_mib == 3.0
    assert estimate(ITEMS[:1], slow, done=["q0"]).items == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_shards_are_a_partition_by_picture(size):
    parts = [shard(ITEMS, World(rank, size)) for rank in range(size)]
    assert sorted(i.id for part in parts for i in part) == sorted(i.id for i in ITEMS)
    pictures = [{i.image for i in part} for part in parts]
    assert sum(map(len, pictures)) == 14
    assert max(map(len, pictures)) - min(map(len, pictures)) <= 1


def test_the_world_of_launchers():
    assert world({}) == World(0, 1, 0)
    assert world({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}) == World(3, 4, 1)
    for bad in ({"RANK": "4", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}):
        with pytest.raises(UsageError, match="start"):
            world(bad)


def test_a_model_is_loaded_as_if_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with alone():
        assert "WORLD_SIZE" not in os.environ
        assert world() == World(0, 1, 0)
    assert world() == World(1, 2, 1)


def test_waiting_ends_with_the_last_record_or_with_patience(tmp_path):
    store = Store(tmp_path / "r", "s")
    store.append({"id": "1", "text": "a"})

    def late():
        time.sleep(0.1)
        other = Store(tmp_path / "r", "s")
        other.append({"id": "2", "error": "x"})
        other.close()

    thread = threading.Thread(target=late)
    thread.start()
    wait(store, ["1", "2"], poll=0.02)
    thread.join()
    with pytest.raises(VlmfixError, match="1 items have no record"):
        wait(store, ["1", "3"], patience=0.05, poll=0.02)


WORKER = """
import json, os, signal, sys
from accelerate import PartialState
from vlmfix.eval.base import Item
from vlmfix.eval.runner import evaluate
from vlmfix.eval.store import Store
from vlmfix.eval.world import wait, world

state = PartialState(cpu=True, backend="gloo")
assert state.num_processes == 2 and world().size == 2, state
folder, killed = sys.argv[1], sys.argv[2]
items = [Item(*row) for row in json.load(open(sys.argv[3]))]

class Fake:
    count = 0
    def answer(self, items, images, settings):
        self.count += len(items)
        if killed == "kill" and world().rank == 1 and self.count > 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"id": i.id, "text": i.prompt.upper(), "rank": world().rank} for i in items]

store = Store(folder, "s")
evaluate(items, Fake(), store, batch_size=2)
if world().rank == 0:
    wait(store, [i.id for i in items], patience=60, poll=0.1)
"""


@pytest.mark.timeout(120)
def test_two_processes_share_a_run_one_dies_and_another_number_goes_on(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "items.json").write_text(json.dumps([[i.id, i.image, i.prompt] for i in ITEMS]))

    def launch(folder, mode):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command += ["worker.py", folder, mode, "items.json"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    assert launch("run", "kill").returncode != 0
    store = Store(tmp_path / "run", "s")
    before = {record["id"]: record for record in store.records()}
    assert 6 <= len(before) < 40
    evaluate(ITEMS, Echo(), store, batch_size=3)  # goes on with one process
    after = {record["id"]: record for record in store.records()}
    assert set(after) == {item.id for item in ITEMS}
    assert all(after[key] == record for key, record in before.items())
    assert all("duplicate" not in p and "answer to item" not in p for p in store.problems())

    done = launch("full", "live")
    assert done.returncode == 0, done.stderr[-2000:]
    records = Store(tmp_path / "full", "s").records()
    assert len(records) == 40
    assert {record["rank"] for record in records} == {0, 1}
    assert Store(tmp_path / "full", "s").problems() == []
    assert all(r["text"] == next(i.prompt.upper() for i in ITEMS if i.id == r["id"]) for r in records)
