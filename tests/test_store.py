"""The stores of tables: what a crash leaves, what a checkpoint is worth, what expires when."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import pytest

from streams_app.batch import Overlay
from streams_app.commit import expire
from streams_app.errors import StoreCorrupted
from streams_app.start import trusted_start
from streams_app.store import BLOCK_CACHE, BLOCK_CACHE_BYTES, Store, local_stores, read_only_copy, scan, store_path

DAY_MS = 24 * 60 * 60 * 1000


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """All stores of a process share memory: with whatever other tests left open, these would write out earlier."""
    monkeypatch.setattr(Store, "_open_stores", WeakSet())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "0", topic_id="topic")
    yield made
    made.close()


def test_values_and_checkpoint_survive_together(tmp_path: Path) -> None:
    """A checkpoint without its values would hide them from the restore for ever."""
    store = Store(tmp_path / "0", topic_id="topic")
    store.publish({b"a": b"1", b"b": b"2"}, [], 7)
    store.publish({b"a": None}, [], 9)
    store.close()
    store = Store(tmp_path / "0", topic_id="topic")
    assert store.checkpoint is not None
    assert store.checkpoint.offset == 9
    assert dict(store.items()) == {b"b": b"2"}
    store.close()


def test_a_write_whose_offset_is_unknown_leaves_the_checkpoint(store: Store) -> None:
    """The restore then replays what is here already, to the same end."""
    store.publish({b"a": b"1"}, [], 7)
    store.publish({b"a": b"2"}, [], None)
    assert store.get(b"a") == b"2"
    assert store.checkpoint is not None
    assert store.checkpoint.offset == 7


def test_what_is_not_on_disk_yet_is_read_and_overwritten_as_if_it_were(store: Store) -> None:
    """Whoever reads must not have to know what was written out when."""
    expected: dict[bytes, bytes] = {}
    draw = random.Random(1)
    for offset in range(2_000):
        writes = {b"%d" % draw.randrange(50): draw.choice([None, b"%d" % offset]) for _ in range(3)}
        store.publish(writes, [], offset)
        for key, value in writes.items():
            expected.pop(key, None)
            if value is not None:
                expected[key] = value
        if draw.random() < 0.05:
            store.write_out()
        if draw.random() < 0.02:
            store.restore([b"restored"], [b"%d" % offset], [], offset)
            expected[b"restored"] = b"%d" % offset
        if offset % 50 == 0:
            assert dict(store.items()) == expected
        assert all(store.get(b"%d" % number) == expected.get(b"%d" % number) for number in range(50))


def test_memory_of_what_was_published_is_bounded(store: Store, tmp_path: Path) -> None:
    """And what is pushed out of it is on disk."""
    for number in range(40):
        store.publish({b"%d" % number: bytes(1_000_000)}, [], number)
    checkpoint, values = read_only_copy(store.path)
    assert checkpoint is not None
    assert 25 < len(values) == checkpoint + 1
    assert all(store.get(b"%d" % number) == bytes(1_000_000) for number in range(40))
    assert store._recent_bytes < 40_000_000


def test_a_confirmed_checkpoint_has_its_values(store: Store) -> None:
    """A worker that had written a partition follows it as a standby, is killed, and takes over again: it trusts its disk."""
    store.publish({b"k": b"written"}, [], 5)
    store.confirm()
    store.finish_restore()
    assert read_only_copy(store.path) == (5, {b"k": b"written"})


def test_what_was_published_without_a_place_does_not_come_behind_what_is_restored(store: Store) -> None:
    """Its place is somewhere in the changelog, which is read from its beginning: there it is older than the last value."""
    store.publish({b"k": b"old"}, [], None)
    store.restore([b"k", b"k"], [b"old", b"new"], (), 7)
    store.publish({b"other": b"x"}, [], 8)
    store.write_out()
    assert dict(store.items()) == {b"k": b"new", b"other": b"x"}


def test_values_whose_place_in_the_changelog_is_unknown_stay_off_the_disk(tmp_path: Path) -> None:
    """Nobody could tell later which topic they are of."""
    store = Store(tmp_path / "0", topic_id="topic")
    store.publish({b"a": b"1"}, [], None)
    store.close()
    store = Store(tmp_path / "0", topic_id="topic")
    assert dict(store.items()) == {}
    store.close()


KILLED_AFTER_PUBLISH = """
import os, signal, sys
from pathlib import Path
from streams_app.store import Store
store = Store(Path(sys.argv[1]), topic_id="topic")
store.restore([b"k%d" % n for n in range(1000)], [b"v"] * 1000, [], 999)
{finish}
store.publish({{b"k0": b"new"}}, [], 1000)
store.write_out()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("finish", ["store.finish_restore()", "pass"])
def test_a_kill_after_the_first_publish_loses_no_restored_value(tmp_path: Path, finish: str) -> None:
    """Restored without a log, published with one: the checkpoint would survive, the values not."""
    command = [sys.executable, "-c", KILLED_AFTER_PUBLISH.format(finish=finish), str(tmp_path / "0")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    store = Store(tmp_path / "0", topic_id="topic")
    values = dict(store.items())
    checkpoint = store.checkpoint
    store.close()
    assert checkpoint is not None
    assert checkpoint.offset == 1000
    assert len(values) == 1000
    assert values[b"k0"] == b"new"


def test_a_damaged_store_is_removed(tmp_path: Path) -> None:
    """The changelog has it all; a worker that cannot start has nothing."""
    store = Store(tmp_path / "0", topic_id="topic")
    store.publish({b"a": b"1"}, [], 7)
    store.close()
    (tmp_path / "0" / "CURRENT").write_text("nonsense")
    store = Store.trusted(tmp_path / "0", topic_id="topic")
    assert store.checkpoint is None
    assert list(store.items()) == []
    store.close()


def test_a_full_disk_is_told_from_a_damaged_store(tmp_path: Path) -> None:
    """Removing the tables of a worker whose disk is full would not help; restoring damaged ones does."""
    script = """
import resource, signal, sys
from pathlib import Path
from streams_app.errors import StoreFailed
from streams_app.store import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]), topic_id="topic")
store.publish({b"a": b"1"}, [], 7)
store.write_out()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
try:
    store.publish({b"b": bytes(100_000)}, [], 8)
    store.write_out()
except StoreFailed as error:
    print(error, store.corrupt)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "0")], capture_output=True, text=True, check=True, timeout=60
    )
    assert "Make room on the disk" in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_store_that_turns_out_corrupt_is_wiped(tmp_path: Path) -> None:
    """Found while it is in use: what it holds cannot be trusted, and the changelog has it all."""
    path = tmp_path / "0"
    store = Store(path, topic_id="topic")
    store.restore([b"a%d" % n for n in range(2000)], [random.randbytes(1000) for _ in range(2000)], [], 7)
    store.finish_restore()
    store.close()
    [table] = path.glob("*.sst")
    content = bytearray(table.read_bytes())
    content[1_000_000:1_000_100] = bytes(100)
    table.write_bytes(content)
    store = Store(path, topic_id="topic")
    with pytest.raises(StoreCorrupted, match="restored"):
        list(store.items())
    assert store.corrupt
    store.wipe()
    assert not store.corrupt
    assert list(store.items()) == []
    store.close()


def test_a_store_with_a_good_checkpoint_reads_only_the_tail(store: Store) -> None:
    """Reading everything again would make each restart as slow as the table is large."""
    store.publish({b"a": b"1"}, [], 7)
    assert trusted_start(store, end=8, tombstones_kept_ms=DAY_MS) == 8
    assert store.get(b"a") == b"1"


@pytest.mark.parametrize("lie", ["another topic", "beyond the end", "too old", "of the future"])
def test_a_checkpoint_that_lies_is_not_believed(store: Store, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of another topic, of a time ahead, or deleted meanwhile would stay in the table for ever."""
    store.publish({b"a": b"1"}, [], 7)
    end = 8
    if lie == "another topic":
        store.topic_id = "created anew"
    elif lie == "beyond the end":
        end = 7
    else:
        now_s = time.time() + (DAY_MS / 1000 / 2 + 60 if lie == "too old" else -DAY_MS / 1000)
        monkeypatch.setattr("streams_app.start.time.time", lambda: now_s)
    assert trusted_start(store, end, tombstones_kept_ms=DAY_MS) == 0
    assert list(store.items()) == []
    assert store.checkpoint is None


@pytest.mark.parametrize("corrupt", [True, False])
def test_a_store_is_hidden_before_it_is_wiped(store: Store, monkeypatch: pytest.MonkeyPatch, corrupt: bool) -> None:
    """Half of a table looks like a whole one. And who reads it just now hears that it is restored, not of a full disk."""
    store.publish({b"a": b"1"}, [], 7)
    store._recent, store.corrupt = {}, corrupt
    seen: list[object] = []
    remove = shutil.rmtree

    def removed(path: Path) -> None:
        with pytest.raises(StoreCorrupted, match="restored"):
            store.get(b"b")
        seen.append("removed")
        remove(path)

    monkeypatch.setattr("streams_app.store.shutil.rmtree", removed)
    end = 8 if corrupt else 7
    assert trusted_start(store, end, tombstones_kept_ms=DAY_MS, hide=lambda: seen.append(store.checkpoint)) == 0
    assert [type(each).__name__ for each in seen] == ["Checkpoint", "str"]
    assert not store.corrupt
    assert list(store.items()) == []


def remember(overlay: Overlay, key: bytes, timestamp_ms: int) -> None:
    overlay.writes[key] = overlay.time(timestamp_ms) + b"value"


def test_nothing_expires_before_its_time_and_everything_after(tmp_path: Path) -> None:
    """Forgotten too early, a repeated id would move money twice; never forgotten, the table would grow for ever."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=1_000)
    for number in range(10):
        overlay = Overlay(store, "changelog")
        remember(overlay, b"%d" % number, 5_000 + 300 * number)
        stale = expire(overlay)
        store.publish(overlay.writes, stale, number)
        clock_ms = 5_000 + 300 * number
        kept = {int(key) for key, _ in store.items()}
        assert kept == {n for n in range(number + 1) if 5_000 + 300 * n >= clock_ms - 1_000}
    store.close()


def test_a_key_written_again_lives_on_from_then(tmp_path: Path) -> None:
    """Its old index entry must not take it away."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=1_000)
    for offset, (key, time_ms) in enumerate([(b"a", 1_000), (b"a", 1_900), (b"b", 2_500)]):
        overlay = Overlay(store, "changelog")
        remember(overlay, key, time_ms)
        store.publish(overlay.writes, expire(overlay), offset)
    assert {key for key, _ in store.items()} == {b"a", b"b"}
    store.close()


def test_what_expires_is_found_though_it_never_was_on_disk(tmp_path: Path) -> None:
    """Rows stay in memory until they may expire: written to disk with each batch, they would cost more than all the rest."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=DAY_MS)
    for offset, (key, time_ms) in enumerate([(b"a", 1_000), (b"b", 2_000), (b"c", 3_000)]):
        overlay = Overlay(store, "changelog")
        remember(overlay, key, time_ms)
        store.publish(overlay.writes, expire(overlay), offset)
    assert not list(scan(store._db, b"", b"\xff")), "they are in memory only"
    overlay = Overlay(store, "changelog")
    remember(overlay, b"d", DAY_MS + 2_500)
    store.publish(overlay.writes, expire(overlay), 3)
    assert {key for key, _ in store.items()} == {b"c", b"d"}
    store.close()


def test_what_expired_once_is_not_looked_at_again(tmp_path: Path) -> None:
    """On disk it stands until the next write: found again by each batch, it would hide what expires after it."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=DAY_MS)
    for offset in range(3_000):
        overlay = Overlay(store, "changelog")
        remember(overlay, b"%d" % offset, 1_000 + offset)
        store.publish(overlay.writes, [], offset)
    store.write_out()
    for batch in range(4):
        overlay = Overlay(store, "changelog")
        remember(overlay, b"new %d" % batch, DAY_MS + 10_000)
        store.publish(overlay.writes, expire(overlay), 3_000 + batch)
    assert {key for key, _ in store.items()} == {b"new %d" % batch for batch in range(4)}
    assert len(store._stale) == 3_001, "one is the clock of what was written"
    store.close()


def test_time_does_not_run_backwards_when_the_newest_row_is_deleted(tmp_path: Path) -> None:
    """Rows that are written next would be taken for older than they are, and expire too early."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=DAY_MS)
    overlay = Overlay(store, "changelog")
    remember(overlay, b"a", 5_000)
    store.publish(overlay.writes, [], 0)
    store.publish({b"a": None}, [], 1)
    store.close()
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=DAY_MS)
    assert store.clock_ms == 5_000
    store.close()


def test_what_cannot_be_written_stays_in_memory(tmp_path: Path) -> None:
    """A balance that is in the changelog, though nobody knows where, would read as none."""
    store = Store(tmp_path / "0", topic_id="topic")
    store.publish({b"k": bytes(40_000_000)}, [], None)
    assert store.get(b"k") is not None
    store.close()


def test_a_timestamp_from_the_future_expires_nothing(tmp_path: Path) -> None:
    """One producer with a wrong clock would make the table forget all ids."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=DAY_MS)
    overlay = Overlay(store, "changelog")
    remember(overlay, b"a", int(time.time() * 1000) - 60_000)
    store.publish(overlay.writes, expire(overlay), 0)
    overlay = Overlay(store, "changelog")
    remember(overlay, b"b", int(time.time() * 1000) + 400 * DAY_MS)
    store.publish(overlay.writes, expire(overlay), 1)
    assert {key for key, _ in store.items()} == {b"a", b"b"}
    store.close()


def test_time_does_not_run_backwards(tmp_path: Path) -> None:
    """A late record's id would otherwise be forgotten before the ids that came before it."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=1_000)
    overlay = Overlay(store, "changelog")
    remember(overlay, b"a", 9_000)
    remember(overlay, b"late", 5_000)
    store.publish(overlay.writes, expire(overlay), 0)
    assert {key for key, _ in store.items()} == {b"a", b"late"}
    store.close()


def test_a_restored_store_expires_as_the_one_that_wrote_the_changelog(tmp_path: Path) -> None:
    """The time of a value is its changelog record's timestamp, so it outlives the disk."""
    store = Store(tmp_path / "0", topic_id="topic", expires_ms=1_000)
    store.restore([b"old", b"new"], [b"value", b"value"], [5_000, 5_900], 1)
    store.finish_restore()
    overlay = Overlay(store, "changelog")
    remember(overlay, b"next", 6_500)
    store.publish(overlay.writes, expire(overlay), 2)
    assert {key for key, _ in store.items()} == {b"new", b"next"}
    store.close()


def test_all_stores_of_a_process_share_one_bounded_cache(tmp_path: Path) -> None:
    """RocksDB's own default is one for each: with a few dozen partitions the process runs out of memory."""
    stores = [Store(tmp_path / str(number), topic_id="topic") for number in range(4)]
    for store in stores:
        store.restore([b"%06d" % n for n in range(10_000)], [b"x" * 4_000] * 10_000, [], 10_000)
        store.finish_restore()
        assert sum(1 for _ in store.items()) == 10_000
    used_bytes = BLOCK_CACHE.get_usage()
    assert 0 < used_bytes <= BLOCK_CACHE_BYTES
    for store in stores:
        store.close()


def test_a_store_can_be_read_while_its_worker_lives(tmp_path: Path) -> None:
    """The audit compares tables of running workers with their changelogs."""
    path = store_path(tmp_path / "app" / "slot", "accounts", 3)
    store = Store(path, topic_id="topic")
    store.publish({b"a": b"1"}, [], 4)
    store.write_out()
    assert list(local_stores(tmp_path, "app")) == [("accounts", 3, path)]
    assert read_only_copy(path) == (4, {b"a": b"1"})
    store.close()
