"""Which process of how many this is. No process group is made and nothing is exchanged: results meet in files."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UsageError, VlmfixError
from .base import Item
from .store import Store

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process among all that share a run.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its host.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def device(self) -> str | None:
        """The GPU of this process when several share the hosts, `cuda:LOCAL_RANK`; None to let the loader choose.

        Raises:
            UsageError: if there are more processes on this host than GPUs.
        """
        import torch

        if self.size == 1 or not torch.cuda.is_available():
            return None
        if self.local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"process {self.local_rank} of this host has no GPU of its own ({torch.cuda.device_count()} there); "
                "start one process per GPU"
            )
        return f"cuda:{self.local_rank}"


def world(environment: Mapping[str, str] | None = None) -> World:
    """The world that torchrun, accelerate launch or an initialised `PartialState` tells of; else a single process.

    Args:
        environment: variables to read; the process's own by default.

    Raises:
        UsageError: for variables that contradict each other.
    """
    given = os.environ if environment is None else environment
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None) if environment is None else None
    if state is not None and state._shared_state:
        now = state()
        return World(now.process_index, now.num_processes, now.local_process_index)
    try:
        size, rank = int(given.get("WORLD_SIZE", "1")), int(given.get("RANK", "0"))
        local = int(given.get("LOCAL_RANK", str(rank)))
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}; start with torchrun") from None
    if not 0 <= rank < size or (size > 1 and "RANK" not in given):
        raise UsageError(f"RANK={given.get('RANK')} does not fit WORLD_SIZE={size}; start all processes with torchrun")
    return World(rank, size, local)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hides the launcher while a model is loaded, since device_map="auto" under torchrun splits it over processes."""
    hidden = {name: os.environ.pop(name) for name in _LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def shard(items: Sequence[Item], world: World) -> list[Item]:
    """The items of this process: pictures dealt round robin, a picture's items together.

    It depends on the items alone, never on what is done, so that processes that start at different times agree.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.image or item.id, []).append(item)
    return [item for group in list(groups.values())[world.rank :: world.size] for item in group]


def wait(store: Store, ids: Collection[str], patience: float = 1800.0, poll: float = 2.0) -> None:
    """Waits until every item has a record, whichever process writes it.

    Args:
        store: read again and again.
        ids: items that must have an answer or an error.
        patience: seconds without any new record after which the others count as lost.
        poll: seconds between readings.

    Raises:
        VlmfixError: if nothing new came for too long; a restart goes on.
    """
    last, since = -1, time.monotonic()
    while missing := set(ids) - store.done():
        if len(missing) != last:
            last, since = len(missing), time.monotonic()
        if time.monotonic() - since > patience:
            raise VlmfixError(
                f"{len(missing)} items have no record in {store.path} and none came for {patience:g} s; "
                "another process may have died: start again, the run goes on where it stopped"
            )
        time.sleep(poll)
