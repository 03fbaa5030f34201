"""Whether page views are counted at least once, judged while they come (``audit --follow``); repetitions are a figure.

Independent of the agent on purpose. Read are the views, their counts and the dead letters; the table is the audit's matter.

========= =========================================================================================================
lost      a minute of a page all of whose views were consumed, and whose counts, with its dead letters, are fewer
========= =========================================================================================================

Counts of a page and minute go up one by one, and after a crash they go back a little: those that were there before are the
repetitions. Memory, by the first byte of its keys:

===== ============================== ========================================================================
``m`` minute, page                   `_Minute`; forgotten a day after the newest
``d`` day, place                     dead letters that were seen; forgotten after a day or two
``i`` place                          ill-formed views without dead letter (``v``), or the other way round (``l``)
``j`` cut, ``m`` and its key         what to judge once a cut above this one is reached
``t`` nothing                        `_Totals`
===== ============================== ========================================================================
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice

import msgspec

from streams_app.evidence import letter_from, read
from streams_app.latency import Latencies
from streams_app.registry import (
    JUDGED_AT_ONCE,
    Cut,
    Followed,
    Follower,
    Observed,
    Panel,
    due,
    follower,
    panel,
    taken_due,
)
from tables.analytics import PageView, PageViewCount

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE = timedelta(minutes=1)
#: Views come up to an hour late; of those that come later, for a day, it is noticed when they are not set aside.
_KEPT_MINUTES = 26 * 60

panel(
    Panel(
        topic="page-views",
        title="Analytics",
        unit="views",
        promise="Nothing is lost. An output may be there twice after a crash; tables count each event once.",
        figures={"views.counts_total": "Counts sent"},
    )
)


class _Minute(msgspec.Struct, array_like=True):
    """One page in one minute."""

    #: Views, less those that were set aside.
    views: int = 0
    counts: int = 0
    highest: int = 0
    #: Partition, as text, to the offset of the last view in it.
    lasts: dict[str, int] = {}
    lost: int = 0
    cut: int = 0
    #: A view of which the answer is waited for: the count that it makes, and its time.
    sample: tuple[int, int] | None = None


class _Totals(msgspec.Struct):
    views: int = 0
    counts: int = 0
    set_aside: int = 0
    lost: int = 0
    repeated: int = 0
    newest_minute: int = 0
    forgotten_minute: int = 0


@follower("views")
class ViewsFollower(Follower):
    """See the module."""

    topics = ("page-views", "page-view-counts", "dead-letters")

    def __init__(self, followed: Followed) -> None:
        super().__init__(followed)
        stored = self.memory.get([b"t"]).get(b"t")
        self._totals = _totals.decode(stored) if stored else _Totals()
        self._latencies = Latencies()
        self._minutes: dict[bytes, _Minute] = {}

    # -- chunks

    def observe(self, records: Sequence[Observed]) -> None:
        """Take note of a chunk."""
        self._minutes = {}
        views: list[tuple[bytes, Observed]] = []
        counts: list[tuple[bytes, PageViewCount, Observed]] = []
        letters: list[tuple[tuple[int, int], bytes | None, Observed]] = []
        for record in records:
            if record.topic == "page-views":
                self._totals.views += 1
                key = _viewed(record)
                if key is None:
                    self._meet((record.partition, record.offset), b"v", b"l")
                else:
                    views.append((key, record))
            elif record.topic == "page-view-counts":
                self._totals.counts += 1
                count = read(_counts, record.value)
                if count is None:
                    self.memory.report("unreadable", f"{record} is not of the form that we write")
                else:
                    counts.append((_minute_key(count.page, count.window_start), count, record))
            elif (letter := letter_from(self.followed.settings.kafka_prefix + "page-views", record)) is not None:
                letters.append((letter.where, _viewed(record), record))
        letters = self._new_ones(letters)
        self._load(
            {key for key, _ in views} | {key for key, *_ in counts} | {key for _, key, _ in letters if key is not None}
        )
        for key, record in views:
            self._view(key, record)
        for where, viewed, _ in letters:
            self._letter(where, viewed)
        for key, count, record in counts:
            self._count(key, count, record)
        self._keep()

    def _load(self, keys: set[bytes]) -> None:
        stored = self.memory.get(keys)
        self._minutes = {key: _minutes.decode(stored[key]) if key in stored else _Minute(lasts={}) for key in keys}

    def _view(self, key: bytes, record: Observed) -> None:
        minute, totals = self._minutes[key], self._totals
        minute.views += 1
        partition = str(record.partition)
        minute.lasts[partition] = max(record.offset, minute.lasts.get(partition, -1))
        if minute.sample is None and minute.views > minute.highest:
            minute.sample = (minute.views, record.timestamp_ms)
        # A clock that runs ahead does not make us forget the minutes of today.
        totals.newest_minute = max(totals.newest_minute, min(int.from_bytes(key[1:9]), record.timestamp_ms // 60_000))

    def _meet(self, place: tuple[int, int], came: bytes, waited: bytes) -> None:
        """One of an ill-formed view and its dead letter came: if the other is there nothing is missing."""
        key = _ill_key(*place)
        known = self.memory.get([key]).get(key)
        self.memory.put(key, None if known == waited else came)

    def _count(self, key: bytes, count: PageViewCount, record: Observed) -> None:
        minute = self._minutes[key]
        minute.counts += 1
        if count.views <= minute.highest and len(minute.lasts) <= 1:
            self._totals.repeated += 1
        minute.highest = max(minute.highest, count.views)
        if minute.sample is not None and count.views >= minute.sample[0]:
            self._latencies.add(minute.sample[1], record.timestamp_ms)
            minute.sample = None

    def _new_ones(
        self, letters: Sequence[tuple[tuple[int, int], bytes | None, Observed]]
    ) -> list[tuple[tuple[int, int], bytes | None, Observed]]:
        """Those of places that have no letter yet; the others are repetitions."""
        found = []
        for where, key, record in letters:
            # A batch is done again within minutes: a day is plenty.
            day = record.timestamp_ms // 86_400_000
            names = [_letter_key(each, where) for each in (day - 1, day)] if min(where) >= 0 else []
            if self.memory.get(names):
                self._totals.repeated += 1
            elif names:
                self.memory.put(names[-1], b"")
                self.memory.drop(b"d", _letter_key(min(day, _today()) - 2, (0, 0)))
                self._totals.set_aside += 1
                found.append((where, key, record))
        return found

    def _letter(self, where: tuple[int, int], key: bytes | None) -> None:
        if key is None:
            self._meet(where, b"l", b"v")
        else:
            minute = self._minutes[key]
            minute.views, minute.sample = minute.views - 1, None

    def _keep(self) -> None:
        for key, minute in self._minutes.items():
            minute.cut = self.memory.cut
            self.memory.put(key, _encode(minute))
            self.memory.put(due(minute.cut, key), b"")
        self.memory.put(b"t", _encode(self._totals))

    # -- cuts

    def cut(self, cut: Cut) -> None:
        """Judge the minutes all of whose views were consumed; the others wait."""
        for key, value in taken_due(self.memory, cut).items():
            minute = _minutes.decode(value)
            consumed = all(
                cut.committed.get(("page-views", int(partition)), 0) > offset
                for partition, offset in minute.lasts.items()
            )
            if minute.cut < cut.number and consumed:
                self._judge(key, minute)
            else:
                self.memory.put(due(cut.number, key), b"")
        self._judge_ill(cut)
        self._forget()
        self.memory.put(b"t", _encode(self._totals))

    def _judge(self, key: bytes, minute: _Minute) -> None:
        if any(self.followed.starts.values()):
            return  # what was deleted before we came may be what is missing
        sent = minute.highest if len(minute.lasts) <= 1 else minute.counts
        lost = max(0, minute.views - sent)
        if lost > minute.lost:
            where = f"{key[9:].decode(errors='replace')} at {_EPOCH + int.from_bytes(key[1:9]) * _MINUTE}"
            self.memory.report("lost", f"{where}: {minute.views} views were consumed, {sent} counted")
        self._totals.lost += lost - minute.lost
        minute.lost = lost
        self.memory.put(key, _encode(minute))

    def _judge_ill(self, cut: Cut) -> None:
        """Ill-formed views that were consumed before the cut have their dead letters before it, too."""
        for partition in range(self.followed.partitions.get("page-views", 0)):
            consumed = cut.committed.get(("page-views", partition), 0)
            places = self.memory.scan(_ill_key(partition, 0), _ill_key(partition, consumed))
            for key, came in [*islice(places, JUDGED_AT_ONCE)]:
                self.memory.put(key, None)
                if came == b"v" and not any(self.followed.starts.values()):
                    self._totals.lost += 1
                    where = f"page-views[{partition}]@{int.from_bytes(key[5:])}"
                    self.memory.report("lost", f"{where} is ill-formed, was consumed, and has no dead letter")

    def _forget(self) -> None:
        until = self._totals.newest_minute - _KEPT_MINUTES
        if until > self._totals.forgotten_minute:
            self.memory.drop(b"m", b"m" + until.to_bytes(8))
            self._totals.forgotten_minute = until

    def figures(self) -> Mapping[str, int | Mapping[str, int]]:
        """See `Follower.figures`."""
        totals = self._totals
        return {
            "views_total": totals.views,
            "counts_total": totals.counts,
            "set_aside": totals.set_aside,
            "lost": totals.lost,
            "repeated": totals.repeated,
            "latency_ms": self._latencies.figures(),
        }


def _minute_key(page: str, at: datetime) -> bytes:
    # Before 1970 all is one minute: those views are set aside as late, or counted in a window that nobody reads.
    return b"m" + max(0, (at - _EPOCH) // _MINUTE).to_bytes(8) + page.encode(errors="surrogatepass")


def _today() -> int:
    return int(time.time() // 86_400)


def _viewed(record: Observed) -> bytes | None:
    """Page and minute of a view; None: it is ill-formed, or under another key, and must be set aside."""
    view = read(_views, record.value)
    return _minute_key(view.page, view.at) if view is not None and record.key == view.page.encode() else None


def _letter_key(day: int, where: tuple[int, int]) -> bytes:
    return b"d" + max(0, day).to_bytes(8) + where[0].to_bytes(4) + where[1].to_bytes(8)


def _ill_key(partition: int, offset: int) -> bytes:
    return b"i" + partition.to_bytes(4) + offset.to_bytes(8)


_encode = msgspec.json.Encoder().encode
_views = msgspec.json.Decoder(PageView)
_counts = msgspec.json.Decoder(PageViewCount)
_minutes = msgspec.json.Decoder(_Minute)
_totals = msgspec.json.Decoder(_Totals)
