"""One partition of one table on disk: committed values, and the checkpoint they stand for.

Only committed values reach a store. It keeps the last ones in memory, where most are read again soon, and most are
overwritten; now and then what is new goes to disk, with the checkpoint, in one atomic write. So after any crash what is on
disk equals the changelog as of its checkpoint, and what is missing is read from there on.

Layout of the RocksDB (one a table and partition, below the folder of the slot), keys by their first byte:

====== ============================== ============================================================
prefix rest of the key                value
====== ============================== ============================================================
``v``  the table's key                the table's value; in a table that expires: 8 bytes time first
``t``  8 bytes time, the table's key  empty; index of a table that expires, oldest first
``c``  nothing                        checkpoint: changelog offset, time of writing (ms), id of the changelog topic
====== ============================== ============================================================

Times are milliseconds since 1970, big endian, so that they sort as bytes.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from weakref import WeakSet

from rocksdict import (
    AccessType,
    BlockBasedOptions,
    Cache,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteBufferManager,
    WriteOptions,
)

from streams_app.errors import StoreCorrupted, StoreFailed

log = logging.getLogger(__name__)

_VALUE, _TIME, _CHECKPOINT = b"v", b"t", b"c"
_AFTER_VALUES, _AFTER_TIMES = b"w", b"u"
_CHECKPOINT_FORMAT = struct.Struct(">qq")
#: What RocksDB says of files that it cannot make sense of; anything else is the disk's fault.
_CORRUPT = "Corruption"
#: Bytes of the time in front of each value of a table that expires.
TIME_BYTES = 8
#: One cache for all stores of the process: RocksDB's own default would be one for each of them.
BLOCK_CACHE_BYTES = 128 * 1024 * 1024
BLOCK_CACHE = Cache(BLOCK_CACHE_BYTES)
#: What is not on disk yet: of one store, and of all. Large ones mean less to merge; a process with a hundred small stores
#: must not take a hundred times as much.
_WRITE_BUFFER_BYTES = 16 * 1024 * 1024
_WRITE_BUFFERS = WriteBufferManager(6 * _WRITE_BUFFER_BYTES, allow_stall=False)
#: What all stores of the process keep in memory, and so what a restore after a crash has to read again, and what Python
#: needs for a row beside its bytes.
_RECENT_BYTES, _ROW_BYTES = 32 * 1024 * 1024, 200
_NOT_RECENT = b"not recent"
_NEVER_MS = 2**63
_SIZE_PROPERTIES = ("rocksdb.total-sst-files-size", "rocksdb.cur-size-all-mem-tables", "rocksdb.estimate-num-keys")


class Checkpoint(NamedTuple):
    """Where in its changelog a store stands."""

    #: Last changelog offset whose value the store holds.
    offset: int
    #: When it was written, by this machine's clock.
    written_ms: int
    #: Id of the changelog topic: a topic deleted and created again has another one.
    topic_id: str


class Size(NamedTuple):
    """Of a store."""

    size_bytes: int
    #: About; index entries counted.
    keys: int


class Store:
    """The committed values of one partition of one table.

    One thread writes. Any may read meanwhile: what leaves memory is on disk by then.
    """

    _open_stores: ClassVar[WeakSet[Store]] = WeakSet()

    def __init__(self, path: Path, *, topic_id: str, expires_ms: int | None = None) -> None:
        self.path = path
        self.topic_id = topic_id
        self.expires_ms = expires_ms
        path.parent.mkdir(parents=True, exist_ok=True)
        #: RocksDB found it corrupt: `wipe` it.
        self.corrupt = False
        self._open()
        Store._open_stores.add(self)

    @classmethod
    def trusted(cls, path: Path, *, topic_id: str, expires_ms: int | None = None) -> Store:
        """Open the store at ``path``; one that RocksDB finds corrupt is removed, as the changelog has it all.

        Raises:
            StoreFailed: the disk is full, or too many files are open: removing would not help.
        """
        try:
            return cls(path, topic_id=topic_id, expires_ms=expires_ms)
        except Exception as error:  # rocksdict raises nothing narrower
            if _CORRUPT not in str(error):
                raise _failed(path, error) from error
            log.warning("%s is corrupt, it is removed and restored: %s", path, error)
            shutil.rmtree(path, ignore_errors=True)
            return cls(path, topic_id=topic_id, expires_ms=expires_ms)

    def _open(self) -> None:
        self._db: Rdict = Rdict(str(self.path), options=_options())
        self._get: Callable[[bytes], bytes | None] = self._db.get
        self._unlogged_writes = False
        #: Published last, and what of it is not on disk; None is a deletion.
        self._recent: dict[bytes, bytes | None] = {}
        self._recent_bytes = 0
        self._unwritten: dict[bytes, bytes | None] = {}
        self._stale: list[bytes] = []
        self._oldest_unwritten_ms = _NEVER_MS
        self.checkpoint = _read_checkpoint(self._db)
        self.clock_ms = self._newest_time() if self.expires_ms is not None else 0

    def get(self, key: bytes) -> bytes | None:
        """The stored bytes of ``key``, with their time in front if the table expires.

        Raises:
            StoreCorrupted, StoreFailed: as all methods that touch the disk.
        """
        recent = self._recent.get(key, _NOT_RECENT)
        if recent is not _NOT_RECENT:
            return recent
        try:
            return self._get(_VALUE + key)
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._trouble(error) from error

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All keys with their stored bytes: those on disk in the order of their bytes, then the others."""
        unwritten = dict(self._unwritten)  # before the disk is looked at: what goes there meanwhile is in here
        with self._disk():
            for key, value in scan(self._db, _VALUE, _AFTER_VALUES):
                if key[1:] not in unwritten:
                    yield key[1:], value
        for key, written in unwritten.items():
            if written is not None:
                yield key, written

    def publish(self, writes: Mapping[bytes, bytes | None], stale: Iterable[bytes], offset: int | None) -> None:
        """Take over the writes of a committed batch.

        ``offset`` is the last changelog offset that the delivery reports gave; without one the checkpoint stays where it
        is, and a restore replays what is already here, to the same end.
        """
        self._recent.update(writes)
        self._unwritten.update(writes)
        before = len(self._stale)
        self._stale += stale
        if self.expires_ms is not None:
            self._note_times(writes.values())
        self._recent_bytes += sum(map(len, filter(None, writes.values()))) + _ROW_BYTES * (
            len(writes) + len(self._stale) - before
        )
        if offset is not None:
            self.checkpoint = Checkpoint(offset, int(time.time() * 1000), self.topic_id)
        if self._recent_is_full:
            self.write_out()

    def _note_times(self, values: Iterable[bytes | None]) -> None:
        """Of values of a table that expires, the time in front: the newest is the clock, the oldest is what expires first."""
        times = [value[:TIME_BYTES] for value in values if value is not None]
        if times:
            self.clock_ms = max(self.clock_ms, int.from_bytes(max(times)))
            self._oldest_unwritten_ms = min(self._oldest_unwritten_ms, int.from_bytes(min(times)))

    def write_out(self) -> None:
        """Bring what was published to disk, values and checkpoint in one atomic, logged write.

        Never values without a checkpoint: nobody could tell which topic they are of.
        """
        if self._unwritten and self.checkpoint is not None:
            if self._unlogged_writes:
                # Restored values stand in RocksDB's memory only. Logged writes outlive a crash that they do not: without
                # this flush the checkpoint would survive and the values below it would be gone.
                self._flush()
            batch = WriteBatch(raw_mode=True)
            for index_key in self._stale:
                # First: a write of the same key may put the same entry again.
                batch.delete(index_key)
            self._put_values(batch, self._unwritten)
            if self.expires_ms is not None:
                # The clock: the newest row may be deleted before it was ever on disk. It expires as an entry without a row.
                batch.put(_TIME + self.clock_ms.to_bytes(TIME_BYTES), b"")
            _put_checkpoint(batch, self.checkpoint)
            with self._disk():
                self._db.write(batch)
            self._unwritten, self._stale, self._oldest_unwritten_ms = {}, [], _NEVER_MS
        if self._recent_is_full and not self._unwritten:
            self._recent, self._recent_bytes = {}, 0

    def restore(
        self, keys: Iterable[bytes], values: Iterable[bytes | None], timestamps_ms: Iterable[int], offset: int
    ) -> None:
        """Apply changelog records up to ``offset``, without a log: `finish_restore` makes them last.

        Timestamps count in a table that expires only.
        """
        writes: dict[bytes, bytes | None]
        if self.expires_ms is None:
            writes = dict(zip(keys, values, strict=True))
        else:
            writes = {
                key: None if value is None else timestamp_ms.to_bytes(TIME_BYTES) + value
                for key, value, timestamp_ms in zip(keys, values, timestamps_ms, strict=True)
            }
        # What was published comes first; what is restored is newer. What has no place in the changelog that is known of is
        # restored from its beginning.
        self.write_out()
        self._unwritten, self._stale = {}, []
        self._recent, self._recent_bytes = {}, 0
        if self.expires_ms is not None:
            self._note_times(writes.values())
            self._oldest_unwritten_ms = _NEVER_MS  # they are written now
        batch = WriteBatch(raw_mode=True)
        self._put_values(batch, writes)
        self.checkpoint = Checkpoint(offset, int(time.time() * 1000), self.topic_id)
        _put_checkpoint(batch, self.checkpoint)
        self._write_unlogged(batch)

    def confirm(self) -> None:
        """What was restored reaches to the end of the changelog: its checkpoint is as good as new, however old the end is."""
        if self.checkpoint is None:
            return
        # It counts what was published, too, and nothing is as bad as a checkpoint without its values.
        self.write_out()
        self.checkpoint = self.checkpoint._replace(written_ms=int(time.time() * 1000))
        batch = WriteBatch(raw_mode=True)
        _put_checkpoint(batch, self.checkpoint)
        self._write_unlogged(batch)

    def finish_restore(self) -> None:
        """Make what was restored last: the first logged write relies on it."""
        if self._unlogged_writes:
            self._flush()

    def expired(self, now_ms: int, limit: int) -> Iterator[tuple[bytes, bytes | None]]:
        """The oldest index entries that expire at ``now_ms``: ``(index key, table key)``, at most ``limit``.

        The table key is None where the index entry is left over from an older write of the same key.
        """
        if self.expires_ms is None or now_ms <= self.expires_ms:
            return
        if self._oldest_unwritten_ms < now_ms - self.expires_ms:
            self.write_out()  # what expires is found by the index, which is on disk
        until = _TIME + (now_ms - self.expires_ms).to_bytes(TIME_BYTES)
        # Behind those that expired already: on disk they are still there, and no older one comes before the next write.
        start = self._stale[-1] + b"\0" if self._stale else _TIME
        with self._disk():
            oldest = [index_key for index_key, _ in islice(scan(self._db, start, until), limit)]
        for index_key in oldest:
            key = index_key[1 + TIME_BYTES :]
            stored = self.get(key)
            current = stored is not None and stored[:TIME_BYTES] == index_key[1 : 1 + TIME_BYTES]
            yield index_key, key if current else None

    def size(self) -> Size | None:
        """How large it is, as RocksDB has it; None: it is being closed. Any thread may ask."""
        try:
            on_disk, in_memory, keys = (self._db.property_int_value(name) or 0 for name in _SIZE_PROPERTIES)
        except Exception:  # noqa: BLE001 - rocksdict raises nothing narrower
            return None
        return Size(on_disk + in_memory, keys)

    def wipe(self) -> None:
        """Forget everything: the next restore starts at the beginning of the changelog."""
        self.corrupt = True  # to whoever reads it just now
        self._db.close()
        shutil.rmtree(self.path)
        self.corrupt = False
        self._open()

    def close(self) -> None:
        """Bring to disk what is not there, as far as it takes it, and give the files back."""
        Store._open_stores.discard(self)
        try:
            self.write_out()
        except (StoreCorrupted, StoreFailed) as error:
            log.warning("the next start restores what the disk did not take at the end: %s", error)
        finally:
            with self._disk():
                self._db.close()

    def _put_values(self, batch: WriteBatch, writes: Mapping[bytes, bytes | None]) -> None:
        put, delete = batch.put, batch.delete
        expires = self.expires_ms is not None
        for key in sorted(writes):  # in their order RocksDB takes them in twice as fast
            value = writes[key]
            if value is None:
                delete(_VALUE + key)
            else:
                put(_VALUE + key, value)
                if expires:
                    put(_TIME + value[:TIME_BYTES] + key, b"")

    def _write_unlogged(self, batch: WriteBatch) -> None:
        options = WriteOptions()
        setattr(options, "disable_wal", True)  # noqa: B010 - a property, though its stub says a method
        self._unlogged_writes = True
        with self._disk():
            self._db.write(batch, options)

    @property
    def _recent_is_full(self) -> bool:
        return self._recent_bytes > _RECENT_BYTES // max(1, len(Store._open_stores))

    def _flush(self) -> None:
        with self._disk():
            self._db.flush()
        self._unlogged_writes = False

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # rocksdict raises nothing narrower
            raise self._trouble(error) from error

    def _trouble(self, error: Exception) -> StoreCorrupted | StoreFailed:
        if not self.corrupt and _CORRUPT not in str(error):
            return _failed(self.path, error)
        self.corrupt = True
        return StoreCorrupted(f"{self.path} is corrupt, it is wiped and restored: {error}")

    def _newest_time(self) -> int:
        cursor = self._db.iter()
        cursor.seek_for_prev(_AFTER_TIMES)
        if cursor.valid() and cursor.key()[:1] == _TIME:
            return int.from_bytes(cursor.key()[1 : 1 + TIME_BYTES])
        return 0


def _failed(path: Path, error: Exception) -> StoreFailed:
    return StoreFailed(
        f"the table's store {path} cannot be used: {error}. Make room on the disk, or give the worker another one "
        "(STREAMS_APP_DATADIR); until then other workers take over its partitions"
    )


def _options() -> Options:
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_write_buffer_size(_WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(2)
    options.set_write_buffer_manager(_WRITE_BUFFERS)
    # Logs of RocksDB itself: two small files a store, or a long-lived worker fills its disk with them.
    options.set_keep_log_file_num(2)
    options.set_max_log_file_size(1024 * 1024)
    # A key that was never written is told without a search: half of the time that it took.
    options.set_memtable_prefix_bloom_ratio(0.1)
    options.set_memtable_whole_key_filtering(True)
    table = BlockBasedOptions()
    table.set_block_cache(BLOCK_CACHE)
    table.set_bloom_filter(10, False)
    options.set_block_based_table_factory(table)
    return options


def _put_checkpoint(batch: WriteBatch, checkpoint: Checkpoint) -> None:
    stored = _CHECKPOINT_FORMAT.pack(checkpoint.offset, checkpoint.written_ms) + checkpoint.topic_id.encode()
    batch.put(_CHECKPOINT, stored)


def _read_checkpoint(db: Rdict) -> Checkpoint | None:
    stored = db.get(_CHECKPOINT)
    if stored is None:
        return None
    offset, written_ms = _CHECKPOINT_FORMAT.unpack_from(stored)
    return Checkpoint(offset, written_ms, stored[_CHECKPOINT_FORMAT.size :].decode())


def scan(db: Rdict, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys from ``start`` to before ``end`` with their values, in the order of their bytes."""
    options = ReadOptions()
    options.set_iterate_upper_bound(end)
    cursor: Any = db.iter(options)
    try:
        cursor.seek(start)
        while cursor.valid():
            yield cursor.key(), cursor.value()
            cursor.next()
        cursor.status()  # raises what ended it before its end: to the loop that looks like the end
    finally:
        del cursor  # a traceback would keep it, and it keeps the database open, which is to be wiped


def store_path(folder: Path, table: str, partition: int) -> Path:
    """Where below the folder of a slot the store of a table's partition lies."""
    return folder / "tables" / table / str(partition)


def local_stores(datadir: Path, app_id: str) -> Iterator[tuple[str, int, Path]]:
    """All stores of all slots of ``app_id`` on this machine: ``(table, partition, path)``."""
    for path in sorted((datadir / app_id).glob("*/tables/*/*")):
        if path.name.isdigit():
            yield path.parent.name, int(path.name), path


def read_only_copy(path: Path) -> tuple[int | None, dict[bytes, bytes]]:
    """The checkpoint and the values of a store, while a live worker may hold it; times in front of values are kept."""
    db = Rdict(str(path), options=_options(), access_type=AccessType.read_only(False))
    try:
        checkpoint = _read_checkpoint(db)
        values = {key[1:]: value for key, value in scan(db, _VALUE, _AFTER_VALUES)}
    finally:
        db.close()
    return (checkpoint.offset if checkpoint else None), values
