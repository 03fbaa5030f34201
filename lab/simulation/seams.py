"""All of the engine that is replaced: clocks, threads, clients of Kafka, and RocksDB. Nothing else of it is touched."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

from lab.simulation import clients, disk
from lab.simulation.process import running
from lab.simulation.world import World
from streams_app import batch, commit, guarantees, offsets, outbox, restore, session, start, store

T = TypeVar("T")


class Clock:
    """`time`, of the history that runs."""

    def __init__(self) -> None:
        self.world: World | None = None

    def monotonic(self) -> float:
        """Seconds since the history began."""
        assert self.world is not None
        return self.world.now_s

    def time(self) -> float:
        """Seconds since 1970, some day in 2026."""
        return 1_780_000_000.0 + self.monotonic()


def within(_timeout_s: float, call: Callable[..., T], *args: Any) -> T:
    """`deadlines.within`: the models keep their time-outs."""
    return call(*args)


def discard(client: Any, last_call: str | None = None) -> None:
    """`deadlines.discard`."""
    if last_call is not None:
        getattr(client, last_call)()


def step(name: str) -> None:
    """`faults.step`."""
    running().step(name)


@contextlib.contextmanager
def seams() -> Iterator[Clock]:
    """The engine with all of it replaced; gives the clock, which is to be told the world of each history."""
    clock, numbers = Clock(), itertools.count()
    replaced: list[tuple[Any, str, Any]] = [
        *((module, "time", clock) for module in (batch, guarantees, offsets, outbox, restore, session, start, store)),
        *((module, "within", within) for module in (outbox, session)),
        *((module, "discard", discard) for module in (offsets, outbox, restore, session)),
        *((module, "step", step) for module in (commit, guarantees)),
        (guarantees, "uuid4", lambda: SimpleNamespace(hex=f"{next(numbers):08d}")),
        (offsets, "Consumer", clients.Reader),
        (offsets, "AdminClient", clients.Admin),
        (restore, "Consumer", clients.ChangelogReader),
        (store, "Rdict", disk.Database),
        (store, "WriteBatch", disk.Batch),
        (store, "WriteOptions", disk.WriteOptions),
        (store, "shutil", disk.Shutil),
        (store, "_options", lambda: None),
    ]
    new_producer = {"new_producer": clients.new_producer}
    level = logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        for module, name, stand_in in replaced:
            stack.enter_context(patch.object(module, name, stand_in))
        for kind in (session.Session, outbox.Outbox):
            stack.enter_context(patch.dict(kind.__init__.__kwdefaults__, new_producer))
        # What the engine logs about faults is expected, and writing it would take most of the time.
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, level)
        yield clock
