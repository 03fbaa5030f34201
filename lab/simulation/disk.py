"""A stand-in for RocksDB that knows what a crash leaves: logged writes, and others only if they were flushed.

A logged write outlives a crash even where an earlier unlogged one does not: that hole is trap 10.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast


class Folder:
    """Where one store lies; stands where the engine has a path."""

    def __init__(self) -> None:
        #: What is there after a crash.
        self.durable: dict[bytes, bytes] = {}
        #: Called after each write that is not logged; a memtable may be flushed at any time.
        self.after_unlogged_write: Any = None
        #: Called with what is about to be written.
        self.on_write: Callable[[list[tuple[bytes, bytes | None]]], None] = lambda _writes: None
        #: The open database: values that readers see.
        self.memory: dict[bytes, bytes] = self.durable

    def __str__(self) -> str:
        return _Path(self)

    @property
    def parent(self) -> Folder:
        """The folder above, which is there."""
        return self

    def mkdir(self, **_how: bool) -> None:
        """Done already."""


class _Path(str):
    """The path of a folder, which leads back to it."""

    folder: Folder

    def __new__(cls, folder: Folder) -> _Path:
        path = super().__new__(cls, "folder")
        path.folder = folder
        return path


class Database:
    """`rocksdict.Rdict`."""

    def __init__(self, path: Any, options: object = None) -> None:
        folder = self._folder = cast(_Path, path).folder
        self._values = folder.memory = dict(folder.durable)
        self.get = self._values.get

    def write(self, batch: Batch, options: WriteOptions | None = None) -> None:
        """Apply a write batch, whole."""
        self._folder.on_write(batch.writes)
        _apply(batch, self._values)
        if options is None or not options.disable_wal:
            _apply(batch, self._folder.durable)
        elif self._folder.after_unlogged_write is not None:
            self._folder.after_unlogged_write(self.flush)

    def flush(self) -> None:
        """Make all of it last."""
        self._folder.durable = dict(self._values)

    def close(self) -> None:
        """Close, which flushes."""
        self.flush()


def _apply(batch: Batch, values: dict[bytes, bytes]) -> None:
    for key, value in batch.writes:
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value


class Batch:
    """`rocksdict.WriteBatch`."""

    def __init__(self, **_how: bool) -> None:
        self.writes: list[tuple[bytes, bytes | None]] = []

    def put(self, key: bytes, value: bytes) -> None:
        """Write a value."""
        self.writes.append((key, value))

    def delete(self, key: bytes) -> None:
        """Write that there is none."""
        self.writes.append((key, None))


class WriteOptions:
    """`rocksdict.WriteOptions`."""

    disable_wal: ClassVar[bool] = False


class Shutil:
    """The one function of `shutil` that stores need."""

    @staticmethod
    def rmtree(folder: Any, ignore_errors: bool = False) -> None:
        """Delete a store."""
        folder.durable = {}
