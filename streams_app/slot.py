"""A worker's lasting name: the folder of its tables, the end of its transactional ids, the member it was last.

A slot is a lock on a file. Two live workers with one slot would fence each other's transactions for ever, so the second one
is refused; the kernel gives the lock back when its holder dies, however it dies.

::

    <datadir>/<app id>/<slot>/lock       held as long as the worker lives
    <datadir>/<app id>/<slot>/member     the group member it was last, so that its successor can leave for it
    <datadir>/<app id>/<slot>/tables/    see store.py
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from streams_app.errors import ConfigurationError, SlotLost, StoreFailed

_ALLOWED = re.compile(r"[A-Za-z0-9._-]{1,100}")
_MOST_WORKERS_OF_A_FOLDER = 1_000


class Slot:
    """A held slot; see the module."""

    def __init__(self, folder: Path, lock: IO[str]) -> None:
        self.folder = folder
        self._lock = lock

    @property
    def name(self) -> str:
        """The worker's lasting name."""
        return self.folder.name

    @property
    def member_id(self) -> str | None:
        """The group member that this slot's worker was last, if it did not leave.

        Reading, writing and `check` raise `StoreFailed` where the disk fails: whoever goes on without it keeps partitions on
        a machine that cannot keep their tables.
        """
        with _on_disk(self.folder):
            try:
                return (self.folder / "member").read_text() or None
            except FileNotFoundError:
                return None

    @member_id.setter
    def member_id(self, member_id: str | None) -> None:
        scratch = self.folder / "member.new"
        with _on_disk(self.folder):
            scratch.write_text(member_id or "")
            scratch.rename(self.folder / "member")

    def check(self) -> None:
        """Raise `SlotLost` if somebody else could take the slot: its lock file is gone, or another one."""
        with _on_disk(self.folder):
            try:
                there = os.stat(self.folder / "lock")
            except FileNotFoundError:
                there = None
            held = os.fstat(self._lock.fileno())
        if there is None or (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            raise SlotLost(
                f"the lock file of slot {self.name!r} in {self.folder} was removed while this worker held it: another "
                "worker could take the slot, and both would fence each other"
            )

    def release(self) -> None:
        """Let somebody else have the slot."""
        self._lock.close()


def acquire(datadir: Path, app_id: str, name: str | None) -> Slot:
    """Take the slot ``name``, or without one the first free slot of this host in the data folder.

    Raises:
        SlotLost: a live worker holds ``name``.
        ConfigurationError: ``name`` cannot be a folder's name.
        StoreFailed: the disk does not take it.
    """
    if name is not None:
        if not _ALLOWED.fullmatch(name) or name in {".", ".."}:
            raise ConfigurationError(
                f"STREAMS_APP_SLOT is {name!r}; a slot has 1 to 100 letters, digits, dots, dashes and underscores"
            )
        slot = _try(datadir / app_id / name)
        if slot is None:
            raise SlotLost(
                f"slot {name!r} of {app_id} is held by another live worker on this machine; stop that one, "
                "or give this one a STREAMS_APP_SLOT of its own"
            )
        return slot
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:80]
    for number in itertools.islice(itertools.count(), _MOST_WORKERS_OF_A_FOLDER):
        slot = _try(datadir / app_id / f"{host}-{number}")
        if slot is not None:
            return slot
    raise SlotLost(f"all {_MOST_WORKERS_OF_A_FOLDER} slots of {app_id} in {datadir} are held by live workers")


@contextlib.contextmanager
def _on_disk(folder: Path) -> Iterator[None]:
    """What the disk refuses, as `StoreFailed`: by its exit code whoever looks after processes knows it."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"the slot in {folder} cannot be kept: {error}") from error


def _try(folder: Path) -> Slot | None:
    with _on_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "w")  # noqa: SIM115 - held as long as the slot is
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        lock.write(f"{os.getpid()}\n")
        lock.flush()
    return Slot(folder, lock)
