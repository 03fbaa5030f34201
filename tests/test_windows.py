"""Windowed tables: which windows an event counts in, what is late, what is deleted when, and that no count is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import faust
import msgspec
import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types import TP
from faust.types.tuples import Message
from faust.windows import HoppingWindow, SlidingWindow
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams_app.application import App
from streams_app.batch import Batch
from streams_app.commit import changelog_records, expire
from streams_app.events import Event, in_hand
from streams_app.session import Pin
from streams_app.settings import Settings
from streams_app.store import Store
from streams_app.windows import AHEAD_S, CLOCK_ROW, TimeWindow, WindowedTable, split_window_key, to_ms
from tests.rig import Rig, wait_until

NOW_S = datetime(2024, 5, 6, 12, tzinfo=UTC).timestamp()
MINUTE_S, HOUR_S = 60.0, 3600.0


class PageView(msgspec.Struct):
    """What the tables of these tests count."""

    at: Any


class RecordView(faust.Record):
    """The same, as a model of Faust's."""

    at: float


@cache
def an_app() -> App:
    folder = Path(tempfile.gettempdir())
    return App("windows", settings=Settings(datadir=folder, kafka_url="kafka://127.0.0.1:1"), autodiscover=False)


_names = map("views-{}".format, itertools.count())


def declared(**options: Any) -> Any:
    """A table without windows yet."""
    return an_app().Table(next(_names), **{"key_type": str, "value_type": int, "default": int, **options})


class Partition:
    """One partition of a windowed table, with batches that commit or not, and its changelog, but without Kafka."""

    def __init__(self, folder: Path, views: WindowedTable) -> None:
        self.views = views.relative_to_field(PageView.at)
        self.table: Any = views.table
        self.path = folder / self.table.name
        self.changelog: list[tuple[bytes, bytes | None, int]] = []
        #: What this machine's clock says.
        self.clock_s = NOW_S
        self._open()
        self._begin()

    def _open(self) -> None:
        self.store = Store(self.path, topic_id="topic", expires_ms=self.table.expires_ms)
        self.table.data.partitions = {0: self.store}

    def _begin(self) -> None:
        self.batch = Batch(Pin("group", 1, "member"))
        in_hand.set(None)

    def take(self, at: Any, *, value: Any = None, timestamp: float | None = None) -> Event:
        """Put an event into the agent's hand that happened ``at``."""
        timestamp = self.clock_s if timestamp is None else timestamp
        message = Message("in", 0, 0, timestamp, 0, None, b"k", b"v", None, tp=TP("in", 0))
        self.event = Event(self.table.app, "k", value or PageView(at), None, message)
        self.event.batch = self.batch
        in_hand.set(self.event)
        return self.event

    def view(self, page: str, at: Any) -> int:
        """An agent's work: count a view, and give what its window has."""
        self.take(at)
        self.views[page] += 1
        value: int = self.views[page].value()
        return value

    def commit(self) -> None:
        """As `streams_app.commit.commit`, with a list for Kafka."""
        for overlay in self.batch.overlays.values():
            stale = expire(overlay)
            written = changelog_records(overlay, int(self.clock_s * 1000))
            self.changelog += written
            self.store.publish(overlay.writes, stale, len(self.changelog) - 1)
        self._begin()

    def commit_below(self) -> None:
        """As `commit`, and the next batch has begun over it before."""
        below = self.batch
        self.batch = Batch(Pin("group", 1, "member"))
        self.batch.over(below)
        self.take(0).batch = self.batch
        self.table.data._overlay()
        self.batch, filled = below, self.batch
        self.commit()
        filled.over(None)
        self.batch = filled

    def abort(self) -> None:
        """Drop the batch."""
        self.batch.drop()
        self._begin()

    def reopen(self) -> None:
        """As a restarted worker does."""
        self.abort()
        self.store.close()
        self._open()

    def restore(self) -> None:
        """As a worker without the disk does, from a changelog that Kafka has compacted to the full."""
        self.abort()
        self.store.close()
        shutil.rmtree(self.path)
        self._open()
        compacted = {record[0]: record for record in self.changelog}
        self.changelog = [record for record in self.changelog if compacted[record[0]] is record and record[1]]
        columns = zip(*self.changelog, strict=True) if self.changelog else ((), (), ())
        self.store.restore(*columns, len(self.changelog) - 1)
        self.store.finish_restore()

    def rows(self) -> dict[tuple[str, float], int]:
        """Page and start of the window to count, of what is committed."""
        skip = 8 if self.table.expires_s else 0
        split = {split_window_key(key): value for key, value in self.store.items() if key != CLOCK_ROW}
        return {(key.decode(), start_s): int(value[skip:]) for (key, start_s), value in split.items()}

    def tombstones(self) -> set[tuple[str, float]]:
        """Page and start of the windows that the changelog deletes."""
        dead = (split_window_key(record[0]) for record in self.changelog if record[1] is None)
        return {(key.decode(), start_s) for key, start_s in dead}


Make: TypeAlias = Callable[[WindowedTable], Partition]


@contextmanager
def clock_of(partition: Partition) -> Iterator[None]:
    """Let this machine's clock be the partition's, which the test sets."""
    clock = SimpleNamespace(time=lambda: partition.clock_s)
    with ExitStack() as patches:
        for module in ("batch", "faust_adapter", "windows"):
            patches.enter_context(mock.patch.multiple(f"streams_app.{module}", time=clock))
        yield


@pytest.fixture
def partition(tmp_path: Path) -> Iterator[Make]:
    """Makes a partition of a table, at whose clock it then is."""
    made: list[Any] = []

    def make(views: WindowedTable) -> Partition:
        new = Partition(tmp_path, views)
        clock = clock_of(new)
        clock.__enter__()
        made.append((new, clock))
        return new

    yield make
    in_hand.set(None)
    for new, clock in reversed(made):  # each puts back the clock that it found
        clock.__exit__(None, None, None)
        new.store.close()


def minutes(**options: Any) -> Any:
    """Counts per minute that stay open for an hour."""
    return declared(**options).tumbling(MINUTE_S, expires=HOUR_S)


# What an event counts in.


def test_an_event_counts_in_the_window_of_its_time(partition: Make) -> None:
    """A view of 12:00:59 that arrives at 12:05 belongs to the first minute."""
    one = partition(minutes())
    one.clock_s = NOW_S + 600
    assert [one.view("a", NOW_S + offset_s) for offset_s in (0, 59.999, 60, 119, 0.001)] == [1, 2, 1, 2, 3]
    assert one.view("b", NOW_S) == 1
    one.commit()
    assert one.rows() == {("a", NOW_S): 3, ("a", NOW_S + 60): 2, ("b", NOW_S): 1}


def test_hopping_windows_overlap(partition: Make) -> None:
    """Each view of the last ten minutes, asked every five."""
    one = partition(declared().hopping(600, 300, expires=HOUR_S))
    assert one.view("a", NOW_S - 1) == 1
    assert one.view("a", NOW_S) == 1
    one.commit()
    assert one.rows() == {("a", NOW_S - 600): 1, ("a", NOW_S - 300): 2, ("a", NOW_S): 1}
    one.take(NOW_S)
    assert one.views["a"].now() == 2, "Faust's now() is the oldest of the windows that are not over"
    assert one.views["a"].value() == 1


def test_a_window_is_read_and_written_as_faust_documents_it(partition: Make) -> None:
    """Agents written for Faust run unchanged."""
    one = partition(minutes())
    views, event = one.views, one.take(NOW_S - 60, timestamp=NOW_S)
    assert "a" not in views
    assert views["a"].value() == 0, "the default"
    views["a"] = 5
    views["a"] *= 3
    assert "a" in views
    assert views["a"].value() == 15
    assert views["a"].current() == 0, "by the timestamp of the event's record"
    assert views["a"].delta(60) == views["a"].delta(timedelta(minutes=1)) == 15
    assert views["a"][event].value() == 15
    [window] = one.table.window.ranges(NOW_S - 60)
    assert window == HoppingWindow(60, 60).ranges(NOW_S - 60)[0]
    assert views["a"][window] == 15
    views["a"][window] += 1
    assert views["a"].value() == 16
    views["b"][window] = 7
    assert (sorted(views), len(views), sorted(views.keys())) == (["a", "b"], 2, ["a", "b"])
    assert dict(views.items()) == {"a": 16, "b": 7}
    assert sorted(views.values()) == [7, 16]
    assert dict(views.items().delta(60, event)) == {"a": 16, "b": 7}
    del views["b"][window]
    del views["a"]
    assert "a" not in views
    assert len(views) == 0
    with pytest.raises(KeyError):
        del views["a"]


def test_a_table_without_default_has_no_value_before_the_first(partition: Make) -> None:
    """As a dict."""
    one = partition(minutes(default=None))
    one.take(NOW_S)
    with pytest.raises(KeyError):
        one.views["a"].value()
    with pytest.raises(KeyError):
        one.views["a"] += 1


def test_deleting_takes_the_windows_that_are_there(partition: Make) -> None:
    """One of two overlapping windows may be gone already."""
    one = partition(declared().hopping(600, 300, expires=HOUR_S))
    one.view("a", NOW_S)
    first, second = one.table.window.ranges(NOW_S)
    del one.views["a"][first]
    del one.views["a"]
    assert list(one.views) == []
    with pytest.raises(KeyError):
        one.table.data["a", second]


@pytest.mark.parametrize(
    "at",
    [
        datetime(2024, 5, 6, 12, 0, 30, tzinfo=UTC),
        datetime(2024, 5, 6, 14, 0, 30, tzinfo=UTC).replace(tzinfo=None) - timedelta(hours=2),
        "2024-05-06T12:00:30Z",
        "2024-05-06T14:00:30+02:00",
        "2024-05-06T12:00:30",
        int(NOW_S) + 30,
        NOW_S + 30.5,
    ],
)
def test_a_time_may_have_many_forms(partition: Make, at: Any) -> None:
    """Where a zone is missing it is UTC: workers in different zones must agree on the window."""
    one = partition(minutes())
    one.view("a", at)
    one.commit()
    assert one.rows() == {("a", NOW_S): 1}


@pytest.mark.parametrize("at", [None, "soon", float("nan"), float("inf"), NOW_S * 1000, b"2024"])
def test_what_is_no_time_is_the_events_fault(partition: Make, at: Any) -> None:
    """Milliseconds in the place of seconds would count in the year 56000."""
    one = partition(minutes())
    with pytest.raises(ValueError, match=r"time|iso"):
        one.view("a", at)


def test_a_field_may_be_of_a_struct_or_of_a_record_or_a_callable(partition: Make) -> None:
    """Every form in which an agent's events come."""
    one = partition(minutes())
    by_record = one.views.relative_to_field(RecordView.at)
    by_callable = one.views.relative_to_field(lambda event: event.value["at"])
    one.take(NOW_S)
    one.views["struct"] += 1
    one.take(None, value=RecordView(at=NOW_S))
    by_record["record"] += 1
    one.take(None, value={"at": NOW_S})
    by_callable["callable"] += 1
    one.commit()
    assert one.rows() == {("struct", NOW_S): 1, ("record", NOW_S): 1, ("callable", NOW_S): 1}
    with pytest.raises(ImproperlyConfigured, match="relative_to_field"):
        one.views.relative_to_field("at")


def test_time_may_be_the_records_or_the_clocks(partition: Make) -> None:
    """Faust's other two relations; the record's time is the default."""
    views = minutes()
    one = partition(views)
    one.take(None, timestamp=NOW_S - 120)
    views["default"] += 1
    views.relative_to_stream()["stream"] += 1
    assert views.newest() == datetime.fromtimestamp(NOW_S - 120, UTC)
    views.relative_to_now()["now"] += 1
    one.commit()
    assert one.rows() == {("default", NOW_S - 120): 1, ("stream", NOW_S - 120): 1, ("now", NOW_S): 1}


def test_from_outside_committed_windows_are_read_by_the_clock(partition: Make) -> None:
    """A web view has no event, and must not show what an aborted batch takes back."""
    one = partition(minutes())
    one.view("a", NOW_S)
    one.commit()
    one.view("a", NOW_S)
    one.view("b", NOW_S)
    in_hand.set(None)
    assert one.views["a"].now() == 1
    assert dict(one.views.relative_to_now().items()) == {"a": 1}
    for read in (one.views["a"].value, one.views["a"].current, one.views.newest):
        with pytest.raises(RuntimeError, match=r"[oO]utside"):
            read()
    with pytest.raises(TypeError, match="outside of an agent"):
        one.views.relative_to_now()["a"] += 1


def test_a_write_past_the_windows_is_refused(partition: Make) -> None:
    """It would be stamped with another time than the table's own."""
    one = partition(minutes())
    one.take(NOW_S)
    [window] = one.table.window.ranges(NOW_S)
    with pytest.raises(TypeError, match="has windows"):
        one.table["a", window] = 1


@pytest.mark.parametrize("window", [(NOW_S + 1, NOW_S + 60.9), (NOW_S, NOW_S + 90), (NOW_S, NOW_S)])
def test_what_is_no_window_of_the_table_is_refused(partition: Make, window: tuple[float, float]) -> None:
    """Nobody would ever read such a row."""
    one = partition(minutes())
    one.take(NOW_S)
    with pytest.raises(ValueError, match="none of the windows"):
        one.views["a"][window] = 1


# What is late, what is from the future, what expires.


def test_a_late_event_finds_its_count_as_long_as_its_window_is_open(partition: Make) -> None:
    """Deleted a moment too early, the count would begin again at one, and nobody would know."""
    one = partition(minutes())
    one.view("a", NOW_S)
    one.commit()
    one.clock_s = NOW_S + 2 * HOUR_S
    one.view("b", NOW_S + HOUR_S + 59.999)
    one.commit()
    assert one.view("a", NOW_S + 30) == 2
    one.commit()
    one.view("b", NOW_S + HOUR_S + 60)
    with pytest.raises(ValueError, match="is closed"):
        one.view("a", NOW_S + 59)


def test_a_refused_write_changes_nothing(partition: Make) -> None:
    """An agent may catch it and set the event aside, in a batch that commits."""
    one = partition(declared().hopping(120, 60, expires=HOUR_S))
    one.view("a", NOW_S)
    one.commit()
    for at in (NOW_S - HOUR_S - 30, NOW_S + AHEAD_S + 60):
        one.take(at)
        for write in (lambda: one.view("a", at), lambda: one.views.__setitem__("a", 9)):  # noqa: B023
            with pytest.raises(ValueError, match=r"closed|ahead"):
                write()
        assert one.views.newest() == datetime.fromtimestamp(NOW_S, UTC)
    one.commit()
    assert one.rows() == {("a", NOW_S - 60): 1, ("a", NOW_S): 1}


def test_a_row_expires_with_its_tombstone(partition: Make) -> None:
    """Without expiry the table grows for ever; without the tombstone the row is back after a restore."""
    one = partition(minutes())
    one.view("a", NOW_S)
    one.commit()
    kept_s = one.table.expires_s
    assert kept_s == HOUR_S + MINUTE_S + AHEAD_S
    one.clock_s = NOW_S + 10 * HOUR_S
    one.view("b", NOW_S + kept_s)
    one.commit()
    assert ("a", NOW_S) in one.rows()
    one.view("b", NOW_S + kept_s + 0.001)
    one.commit()
    assert [page for page, _ in one.rows()] == ["b"]
    assert one.tombstones() == {("a", NOW_S)}
    one.restore()
    assert [page for page, _ in one.rows()] == ["b"]


def test_a_count_of_the_near_future_is_there_when_the_future_comes(partition: Make) -> None:
    """Its row is stamped with the clock of today: kept only for size and expiry, it would be gone in its own time."""
    one = partition(minutes())
    one.view("a", NOW_S + HOUR_S - 1)
    one.commit()
    for minute in range(119):
        one.clock_s = NOW_S + 60 * minute
        one.view("b", one.clock_s)
        one.commit()
    assert one.view("a", NOW_S + HOUR_S - 2) == 2


def test_an_event_of_next_year_closes_nothing(partition: Make) -> None:
    """One phone with a wrong clock would put every other view aside."""
    one = partition(minutes())
    one.view("a", NOW_S)
    with pytest.raises(ValueError, match="ahead of the clock"):
        one.view("a", NOW_S + 365 * 24 * HOUR_S)
    one.view("a", NOW_S + HOUR_S)
    assert one.view("a", NOW_S - 59 * MINUTE_S) == 1
    assert one.views.newest() == datetime.fromtimestamp(NOW_S, UTC)


def test_windows_without_expiry_stay_open(partition: Make) -> None:
    """Faust's default; the time of such a table is not kept."""
    one = partition(declared().tumbling(MINUTE_S))
    assert one.table.expires_s is None
    one.view("a", NOW_S)
    assert one.view("a", 0) == 1
    assert one.view("a", -1) == 1
    assert one.view("a", NOW_S + 365 * 24 * HOUR_S) == 1
    with pytest.raises(ImproperlyConfigured, match="without expires"):
        one.views.newest()
    del one.views["a"]
    one.commit()
    assert set(one.rows()) == {("a", -60), ("a", 0), ("a", NOW_S)}


def test_the_newest_time_is_that_of_the_batch(partition: Make) -> None:
    """An agent finds late events by it, also those of the batch in hand; an aborted batch takes it back."""
    one = partition(minutes())
    one.take(NOW_S)
    assert one.views.newest() is None
    one.view("a", NOW_S - 0.25)
    one.view("a", NOW_S - 60)
    assert one.views.newest() == datetime.fromtimestamp(NOW_S - 0.25, UTC)
    one.commit()
    one.view("a", NOW_S)
    one.abort()
    one.take(NOW_S)
    assert one.views.newest() == datetime.fromtimestamp(NOW_S - 0.25, UTC)


@pytest.mark.parametrize("again", [Partition.reopen, Partition.restore])
def test_the_newest_time_outlives_the_row_that_had_it(partition: Make, again: Callable[[Partition], None]) -> None:
    """Time that runs backwards opens windows again whose rows are deleted."""
    one = partition(minutes())
    one.view("a", NOW_S - 60)
    one.view("b", NOW_S)
    del one.views["b"]
    one.commit()
    again(one)
    one.take(NOW_S)
    assert one.views.newest() == datetime.fromtimestamp(NOW_S, UTC)
    assert one.rows() == {("a", NOW_S - 60): 1}
    assert list(one.views) == ["a"]
    assert len(one.table) == 1


@pytest.mark.parametrize("at", [0, -MINUTE_S])
def test_a_row_has_the_same_time_on_disk_and_in_the_changelog(partition: Make, at: float) -> None:
    """A record cannot be of the very beginning of 1970: to librdkafka that is now."""
    one = partition(minutes())
    one.view("a", at)
    one.commit()
    on_disk = dict(one.store.items())
    assert {key: value[:8] for key, value in on_disk.items()} == {
        key: timestamp_ms.to_bytes(8) for key, _, timestamp_ms in one.changelog
    }
    assert all(timestamp_ms > 0 for _, _, timestamp_ms in one.changelog)


def test_rows_of_windows_of_another_size_are_not_taken_for_these(partition: Make) -> None:
    """After a change of the size, the old rows' counts are of other spans of time."""
    one = partition(minutes())
    one.view("a", NOW_S)
    one.commit()
    other = declared().tumbling(2 * MINUTE_S, expires=HOUR_S)
    other.table.data.partitions = one.table.data.partitions
    assert other.relative_to_now()["a"].value() == 0
    assert list(other) == []


# Windows that close.


class Told:
    """What ``on_window_close`` was told, of committed batches and of the one in hand."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def __call__(self, key: tuple[str, tuple[float, float]], value: int) -> None:
        page, window = key
        self.rows.append((page, window[0] - NOW_S, value))


def told_minutes(told: Callable[..., Any]) -> Any:
    return minutes(on_window_close=told)


def test_who_asks_is_told_of_each_window_once_when_it_closes(partition: Make) -> None:
    """Final counts go out exactly once, and to nobody before they are final."""
    told = Told()
    views = partition(told_minutes(told))
    views.clock_s = NOW_S + 10 * HOUR_S
    for page, at in ("b", NOW_S), ("a", NOW_S), ("a", NOW_S + 1), ("a", NOW_S + MINUTE_S), ("a", NOW_S + HOUR_S + 59):
        views.view(page, at)
    assert told.rows == []
    views.view("a", NOW_S + HOUR_S + MINUTE_S)
    assert told.rows == [("a", 0.0, 2), ("b", 0.0, 1)]
    views.commit()
    views.view("a", NOW_S + HOUR_S + 2 * MINUTE_S)
    views.commit()
    assert told.rows[2:] == [("a", MINUTE_S, 1)]
    assert {at - NOW_S for _, at in views.rows()} == {HOUR_S, HOUR_S + MINUTE_S, HOUR_S + 2 * MINUTE_S}
    views.take(NOW_S)
    with pytest.raises(ValueError, match="is closed"):
        views.views["a"] += 1


@pytest.mark.parametrize("again", [Partition.abort, Partition.reopen, Partition.restore])
def test_what_was_told_in_a_batch_that_did_not_commit_is_told_again(
    partition: Make, again: Callable[[Partition], None]
) -> None:
    """What the callback sent went with the batch: untold, the final count of the window would be lost."""
    told = Told()
    views = partition(told_minutes(told))
    views.clock_s = NOW_S + 10 * HOUR_S
    views.view("a", NOW_S)
    views.commit()
    for _ in range(2):
        views.view("a", NOW_S + 2 * HOUR_S)
        assert told.rows.pop() == ("a", 0.0, 1)
        again(views)
    views.view("a", NOW_S + 2 * HOUR_S)
    views.commit()
    views.view("a", NOW_S + 2 * HOUR_S)
    assert told.rows == [("a", 0.0, 1)]


def test_a_callback_that_raises_fails_the_event_and_is_called_again(partition: Make) -> None:
    """The window is told when the event is delivered again, and so are those behind it."""
    told, fails = Told(), [True]

    def callback(key: Any, value: int) -> None:
        if key[0] == "b" and fails.pop():
            raise ValueError("not now")
        told(key, value)

    views = partition(told_minutes(callback))
    views.clock_s = NOW_S + 10 * HOUR_S
    for page in "abc":
        views.view(page, NOW_S)
    views.commit()
    with pytest.raises(ValueError, match="not now"):
        views.view("a", NOW_S + 2 * HOUR_S)
    # At most once, the batch commits all the same.
    fails.append(False)
    views.view("a", NOW_S + 3 * HOUR_S)
    assert [page for page, *_ in told.rows] == ["a", "b", "c"]


def test_windows_that_were_closed_before_anybody_asked_are_told_until_that_is_committed(partition: Make) -> None:
    """Whoever adds the callback to a table that is in use gets all of its windows; a batch that is dropped loses none."""
    before = partition(minutes())
    before.clock_s = NOW_S + 10 * HOUR_S
    before.view("a", NOW_S)
    before.view("a", NOW_S + 3 * HOUR_S)
    before.commit()
    told = Told()
    views = partition(told_minutes(told))
    views.clock_s = NOW_S + 10 * HOUR_S
    views.store.close()
    views.store, views.table.data.partitions = before.store, {0: before.store}
    for _ in range(2):
        views.view("b", NOW_S + 3 * HOUR_S)
        assert told.rows == [("a", 0.0, 1)]
        told.rows.clear()
        views.abort()
    views.store = Store(views.path, topic_id="topic", expires_ms=views.table.expires_ms)


def test_windows_that_others_wrote_meanwhile_are_told(partition: Make) -> None:
    """A store that was followed for a while comes back with rows that this worker has never seen."""
    told = Told()
    views, other = partition(told_minutes(told)), partition(minutes())
    views.clock_s = other.clock_s = NOW_S + 10 * HOUR_S
    views.view("a", NOW_S)
    views.commit()
    mine, other.store = other.store, views.store
    other.table.data.partitions = {0: views.store}
    other.view("b", NOW_S)
    other.commit()
    other.store = mine
    views.table.data.partitions = {0: views.store}
    views.view("a", NOW_S + 2 * HOUR_S)
    assert told.rows == [("a", 0.0, 1), ("b", 0.0, 1)]


async def test_what_a_callback_sends_belongs_to_the_event(partition: Make) -> None:
    """A coroutine may send, as sends are done at once; it cannot wait for anything else."""
    topic = an_app().topic("closed", key_type=str, value_type=int)

    async def send(key: Any, value: int) -> None:
        await (await topic.send(key=key[0], value=value))

    views = partition(told_minutes(send))
    views.clock_s = NOW_S + 10 * HOUR_S
    views.view("a", NOW_S)
    views.view("a", NOW_S + 2 * HOUR_S)
    assert [(output.key, output.value) for output in views.batch.outputs] == [(b"a", b"1")]

    async def sleep(key: Any, value: int) -> None:
        await asyncio.sleep(0)

    other = partition(told_minutes(sleep))
    other.clock_s = NOW_S + 10 * HOUR_S
    other.view("a", NOW_S)
    with pytest.raises(ImproperlyConfigured, match="takes time"):
        other.view("a", NOW_S + 2 * HOUR_S)


async def test_a_table_without_windows_has_none_that_close() -> None:
    with pytest.raises(ImproperlyConfigured, match="no windows"):
        await declared(on_window_close=print).on_start()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 400), st.sampled_from("..cpr")), max_size=60))
def test_each_window_is_told_once_with_its_last_count_whatever_is_dropped(steps: list[tuple[str, int, str]]) -> None:
    """Of all that commits: the counts of closed windows are those that were told, and no row of theirs is left.

    Steps: a view, then nothing, a commit, a commit over which the next batch is filled, or a drop.
    """
    told = Told()
    with tempfile.TemporaryDirectory() as folder:
        views = Partition(Path(folder), told_minutes(told))
        views.clock_s = NOW_S + 10 * HOUR_S
        with clock_of(views):
            kept, counts, committed = 0, Counter[tuple[str, float]](), Counter[tuple[str, float]]()
            for page, minute, then in steps:
                start_s = minute * MINUTE_S
                views.take(NOW_S + start_s)
                newest = views.views.newest()
                if newest and start_s + MINUTE_S <= newest.timestamp() - NOW_S - HOUR_S:
                    continue
                views.views[page] += 1
                counts[page, start_s] += 1
                if then == "c":
                    views.commit()
                    kept, committed = len(told.rows), counts.copy()
                elif then == "p":
                    views.commit_below()
                    kept, committed = len(told.rows), counts.copy()
                elif then == "r":
                    views.abort()
                    del told.rows[kept:]
                    counts = committed.copy()
            views.commit()
            newest_s = views.store.clock_ms / 1000 - NOW_S
            closed = {row: count for row, count in counts.items() if row[1] + MINUTE_S <= newest_s - HOUR_S}
            assert Counter({row[:2]: row[2] for row in told.rows}) == Counter(closed)
            assert len(told.rows) == len(closed)
            assert {(page, at - NOW_S) for page, at in views.rows()} == counts.keys() - closed.keys()
            views.store.close()


# What a declaration may say.


def test_what_is_not_supported_is_refused_at_once() -> None:
    """Half working windows are worse than none."""
    with pytest.raises(ImproperlyConfigured, match="SlidingWindow"):
        declared().using_window(SlidingWindow(1, 1, 1))
    with pytest.raises(ImproperlyConfigured, match="on_window_close needs expires"):
        declared(on_window_close=print).tumbling(60)
    with pytest.raises(ImproperlyConfigured, match="SlidingWindow"):
        declared(window=SlidingWindow(1, 1, 1))
    with pytest.raises(ImproperlyConfigured, match="give them expires"):
        declared(expires_s=5).tumbling(60)
    with pytest.raises(ImproperlyConfigured, match="count in none"):
        declared().hopping(5, 10)
    for size, expires in (0, 1), (-1, 1), (0.0005, 1), (1, -1):
        with pytest.raises(ImproperlyConfigured, match="milliseconds"):
            declared().tumbling(size, expires)
    windowed = minutes()
    with pytest.raises(ImproperlyConfigured, match="already"):
        windowed.table.tumbling(60)


def test_the_broker_deletes_nothing_by_its_clock() -> None:
    """Faust's changelogs of windows do; with a backlog of old events, rows that are needed would be gone."""
    table = minutes().table
    assert table.changelog_topic.compacting
    assert not table.changelog_topic.deleting


def test_fausts_cleanup_does_not_run() -> None:
    """It would delete outside of transactions."""
    assert not minutes().table._should_expire_keys()


# Properties.


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0, 1e9))
def test_windows_are_those_of_faust(size: int, step: int, at: float) -> None:
    """Where Faust's own are right: whole seconds."""
    size = max(size, step)
    ours, fausts = TimeWindow(size, step, None), HoppingWindow(size, step)
    at = to_ms(at) / 1000
    assert ours.ranges(at) == fausts.ranges(at)
    assert ours.current(at) == fausts.current(at)
    assert ours.earliest(at) == fausts.earliest(at)
    assert ours.delta(at, 60) == fausts.delta(at, 60)


@example(1, 1, 8_589_934_592_001)
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.integers(-(10**9), 10**13))
def test_an_event_is_within_each_of_its_windows_and_within_no_other(size_ms: int, step_ms: int, time_ms: int) -> None:
    """To the millisecond, where Faust's own windows of fractions of a second are wrong."""
    size_ms = max(size_ms, step_ms)
    window = TimeWindow(size_ms / 1000, step_ms / 1000, None)
    starts_ms = [window.start_ms(each) for each in window.ranges(time_ms / 1000)]
    around = range(time_ms - size_ms - 1, time_ms + 2)
    first = next(start_ms for start_ms in around if (start_ms + size_ms) % step_ms == 0)
    grid = range(first, around.stop, step_ms)
    assert starts_ms == [start_ms for start_ms in grid if start_ms <= time_ms < start_ms + size_ms]


@given(st.tuples(st.text(), st.integers(0, 10**8)), st.tuples(st.text(), st.integers(0, 10**8)))
def test_no_two_windows_share_a_row(one: tuple[str, int], other: tuple[str, int]) -> None:
    """Whatever characters a key has."""
    table = shared_table()
    rows = []
    for key, minute in (one, other):
        row_key = table.data._keys.encode((key, table.window.range_of(minute * 60_000)))
        assert split_window_key(row_key) == (key.encode(), minute * 60)
        assert table.data._keys.decode(row_key) == (key, table.window.range_of(minute * 60_000))
        rows.append(row_key)
    assert (rows[0] == rows[1]) == (one == other)


@cache
def shared_table() -> Any:
    return minutes().table


def test_a_row_that_is_no_windows_is_not_split() -> None:
    """Checks that read changelogs must not take it for a count."""
    with pytest.raises(ValueError, match="not the key"):
        split_window_key(CLOCK_ROW)


class Model:
    """Windows on a plain dict, which never forgets anything. Times in whole seconds."""

    def __init__(self, size_s: int, step_s: int, expires_s: int | None) -> None:
        self.size_s, self.step_s, self.expires_s = size_s, step_s, expires_s
        self.counts: dict[tuple[str, int], int] = {}
        self.newest_s = 0

    def starts(self, at_s: int) -> list[int]:
        """Of the windows of a time, the first first."""
        return [s for s in range(at_s - self.size_s + 1, at_s + 1) if (s + self.size_s) % self.step_s == 0]

    def is_open(self, start_s: int) -> bool:
        """Whether a late event may still come."""
        return self.expires_s is None or start_s + self.size_s > self.newest_s - self.expires_s

    def takes(self, at_s: int, clock_s: int) -> bool:
        """Whether an event of ``at_s`` may write its windows; its time counts from then on."""
        starts, newest_s = self.starts(at_s), max(self.newest_s, min(at_s, clock_s))
        if not all(map(self.is_open, starts)):
            return False
        if self.expires_s is not None and starts[-1] > newest_s + MODEL_AHEAD_S:
            return False
        self.newest_s = newest_s
        return True

    def copy(self) -> Model:
        """For an abort to come back to."""
        new = Model(self.size_s, self.step_s, self.expires_s)
        new.counts, new.newest_s = dict(self.counts), self.newest_s
        return new


#: In the model's world an event may be so far ahead. All its times are of one order, so that they often meet.
MODEL_AHEAD_S = 20
PAGES, OFFSETS_S = st.sampled_from("ab"), st.one_of(st.just(0), st.integers(-10, 25), st.integers(-60, 40))
STEPS = st.one_of(
    st.tuples(st.sampled_from(["add", "add", "set", "delete"]), PAGES, OFFSETS_S),
    # Over and over about the same time: a late event meets what was counted.
    st.tuples(st.just("add at the start"), PAGES, st.integers(-5, 40)),
    st.tuples(st.just("tick"), st.just(""), st.one_of(st.integers(1, 10), st.integers(0, 60))),
    st.tuples(st.sampled_from(["commit", "commit", "commit", "abort", "reopen", "restore"]), st.just(""), st.just(0)),
)


@settings(max_examples=100, deadline=None)
@given(
    size_s=st.sampled_from([1, 10, 20]),
    hops=st.sampled_from([1, 1, 2, 3]),
    expires_s=st.sampled_from([None, 1, 10, 30]),
    steps=st.lists(STEPS, min_size=10, max_size=60),
)
def test_a_windowed_table_is_a_dict_that_forgets_only_what_is_closed(
    size_s: int, hops: int, expires_s: int | None, steps: list[tuple[str, str, int]]
) -> None:
    """Whatever is late, ahead, deleted, aborted, restarted or restored: no open count is wrong, no closed one is written."""
    step_s = max(1, size_s // hops)
    ahead = {"AHEAD_S": MODEL_AHEAD_S, "_AHEAD_MS": MODEL_AHEAD_S * 1000}
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple("streams_app.windows", **ahead):
        one = Partition(Path(folder), declared().hopping(size_s, step_s, expires=expires_s))
        try:
            with clock_of(one):
                _compare(one, Model(size_s, step_s, expires_s), steps)
        finally:
            in_hand.set(None)
            one.store.close()


def _compare(one: Partition, model: Model, steps: list[tuple[str, str, int]]) -> None:
    committed = model.copy()
    for kind, page, number in steps:
        if kind == "tick":
            one.clock_s += number
        elif kind == "commit":
            one.commit()
            committed = model.copy()
            _compare_rows(one, model)
        elif kind in {"abort", "reopen", "restore"}:
            getattr(one, kind)()
            model = committed.copy()
            _compare_rows(one, model)
        else:
            start_s = NOW_S if kind == "add at the start" else one.clock_s
            _do(one, model, kind, page, int(start_s) + number)
    # What a batch wrote, a later one lets expire.
    for _ in range(2):
        one.take(NOW_S)
        len(one.views)
        one.commit()
    _compare_rows(one, model)
    if model.expires_s is not None:
        # A row may be written until its window is closed, and is kept for so long from then on.
        kept_s = 2 * (model.size_s + model.expires_s) + MODEL_AHEAD_S
        assert all(start_s >= model.newest_s - kept_s for _, start_s in one.rows()), "nothing is kept for ever"


def _do(one: Partition, model: Model, kind: str, page: str, at_s: int) -> None:
    one.take(at_s)
    if model.expires_s is not None:
        newest = one.views.newest()
        assert (newest.timestamp() if newest else 0) == model.newest_s
    starts = model.starts(at_s)
    if kind == "delete":
        if any((page, start_s) in model.counts for start_s in starts):
            # What is closed may be gone already.
            try:
                del one.views[page]
            except KeyError:
                assert not any(model.is_open(start_s) for start_s in starts if (page, start_s) in model.counts)
            for start_s in starts:
                model.counts.pop((page, start_s), None)
        return
    if not model.takes(at_s, int(one.clock_s)):
        with pytest.raises(ValueError, match=r"is closed|ahead of the clock"):
            one.views[page] = 1
        return
    if kind == "set":
        one.views[page] = 5
        model.counts |= {(page, start_s): 5 for start_s in starts}
    else:
        one.views[page] += 1
        model.counts |= {(page, start_s): model.counts.get((page, start_s), 0) + 1 for start_s in starts}
    assert one.views[page].value() == model.counts[page, starts[-1]]


def _compare_rows(one: Partition, model: Model) -> None:
    rows = {(page, int(start_s)): count for (page, start_s), count in one.rows().items()}
    assert rows.items() <= model.counts.items()
    assert {row for row in model.counts if model.is_open(row[1])} <= rows.keys()


# With a real worker.

#: As in tests/apps/windows.py, whose import would declare its app here.
APART_S, SIZE_S = 60, 600


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_a_killed_worker_leaves_exact_counts(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """Killed while rows expire: each entry counts in its window once, and is told once, or at least once."""
    rig = Rig(kafka_url, tmp_path, app="tests.apps.windows", settings={"GUARANTEE": guarantee})
    rig.create_topics("counts")
    try:
        worker = rig.worker(STREAMS_APP_FAULT="kill 4 publish@4").wait_started()
        rig.send(1_500, keys=8, rate=600)
        assert worker.wait() == -signal.SIGKILL
        rig.worker()
        rig.send(300, keys=8)
        wait_until(lambda: len(_told(rig)) >= rig.sent, f"{rig.sent} entries counted")
        rig.stop()
    finally:
        rig.end()
    totals, expected = _expected(rig)
    told = _told(rig)
    assert told.keys() == expected
    if guarantee == "exactly_once":
        assert set(told.values()) == {1}
    rows, deleted = _rows(rig)
    assert deleted
    assert rows.items() <= totals.items()
    assert len(rows) == len(totals) - deleted


def _expected(rig: Rig) -> tuple[Counter[tuple[str, float]], set[tuple[str, int, float, int]]]:
    """The count of each key and window, and all outputs: key, id, start of the window, count."""
    totals: Counter[tuple[str, float]] = Counter()
    outputs = set()
    for message in rig.read("entries"):
        key, number = message.key().decode(), json.loads(message.value())["id"]
        start_s = number * APART_S // SIZE_S * SIZE_S
        totals[key, start_s] += 1
        outputs.add((key, number, start_s, totals[key, start_s]))
    return totals, outputs


def _told(rig: Rig) -> Counter[tuple[str, int, float, int]]:
    """How often each output is there."""
    told: Counter[tuple[str, int, float, int]] = Counter()
    for message in rig.read("counts"):
        output = json.loads(message.value())
        told[message.key().decode(), output["id"], output["window_start"], output["count"]] += 1
    return told


def _rows(rig: Rig) -> tuple[dict[tuple[str, float], int], int]:
    """The rows that the changelog leaves, and how many it deleted."""
    rows: dict[tuple[str, float], int] = {}
    deleted = 0
    for message in rig.read("windows-count-changelog"):
        key, start_s = split_window_key(message.key())
        if message.value() is None:
            deleted += 1
            del rows[key.decode(), start_s]
        else:
            rows[key.decode(), start_s] = int(message.value())
    return rows, deleted
