"""Whether every page view was counted at least once, judged from the committed records alone.

Independent of the agent on purpose: no rule is imported from it. From the views as they lie in Kafka this works out how
many there are of each page in each minute, and which must be set aside. What does not fit is named:

=========================== ===========================================================================================
lost view                   a minute whose row, or whose highest count that was sent, is below the number of its views
lost dead letter            of a view that must be set aside
gap                         a count that skips a number: the one in between was never sent
phantom count, row          of a page and minute without a view; ``phantom dead letter`` likewise
wrong dead letter           with another code than the view deserves
misplaced                   a count or a row in a partition, or a count under a key, that is not its page's
set aside                   a view that counts among the dead letters
=========================== ===========================================================================================

Repetitions are permitted: those of counts and dead letters are a figure, as are views that the table counts twice.

Views of the future are told from the records' own times, late ones from the newest view in front of them in their
partition. One point the records leave open: a view moves the newest time no further than the clock of the worker that
counts it, which may be a little behind. Whether a view is late by the difference, its dead letter decides.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import msgspec

from streams_app.evidence import letter_from, read, read_input
from streams_app.partitioning import partition_of
from streams_app.registry import Check, Facts, Observed, check
from streams_app.windows import CLOCK_ROW, split_window_key
from tables.analytics import PageView, PageViewCount

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US = timedelta(microseconds=1)
_MINUTE_US, _HOUR_US = 60 * 10**6, 3_600 * 10**6
#: What a batch has in hand is less.
_MOST_MISSING = 100_000
#: By how much the clock of a worker may be behind that of whoever wrote the views.
_CLOCKS_US = 10 * 10**6


class _Minute(msgspec.Struct, gc=False):
    """One page in one minute; slim, as there may be millions."""

    #: Those that count.
    views: int = 0
    #: Counts that were sent, and the highest of them.
    counts: int = 0
    highest: int = 0
    #: Those below the highest that were not sent so far.
    missing: set[int] | None = None
    #: What the table says.
    row: int = 0


class _Page:
    """What is known about one page."""

    __slots__ = ("minutes", "places")

    def __init__(self) -> None:
        #: Number of the minute since 1970 to what is known of it.
        self.minutes: defaultdict[int, _Minute] = defaultdict(_Minute)
        #: Partitions in which its views lie, one bit each. Each of several partitions counts for itself.
        self.places = 0

    @property
    def is_whole(self) -> bool:
        return self.places.bit_count() <= 1


class _Newest:
    """The newest time that was counted in a partition, in µs since 1970; the least and the most that it can be."""

    __slots__ = ("least_us", "most_us")

    def __init__(self) -> None:
        # 0 means that there is none: times before 1970 never move it.
        self.least_us = self.most_us = 0

    def is_late(self, at_us: int) -> bool:
        """Whether a view comes too late, for certain."""
        return self.least_us > 0 and self.least_us - at_us > _HOUR_US

    def may_be_late(self, at_us: int) -> bool:
        """Whether it comes too late if the newest time is the most that it can be."""
        return self.most_us > 0 and self.most_us - at_us > _HOUR_US

    def move(self, at_us: int, sent_us: int) -> None:
        """Take note of a view that was counted; times are kept in whole milliseconds."""
        self.least_us = max(self.least_us, min(at_us, sent_us - _CLOCKS_US) // 1_000 * 1_000)
        self.most_us = max(self.most_us, at_us // 1_000 * 1_000)


@check("page-views")
class PageViewsCheck(Check):
    """See the module."""

    # The views first: the others are judged by them.
    topics = ("page-views", "page-view-counts", "dead-letters")
    tables = ("views",)

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._pages: defaultdict[str, _Page] = defaultdict(_Page)
        self._newest: defaultdict[int, _Newest] = defaultdict(_Newest)
        #: Partition and offset of each view that must be set aside to the code that it deserves.
        self._refused: dict[tuple[int, int], str] = {}
        #: Views that may be late, or not: each to its minute.
        self._open: dict[tuple[int, int], _Minute] = {}
        self._letters: set[tuple[int, int]] = set()
        self._repeated_letters = 0
        self._inputs = 0

    def observe(self, record: Observed) -> None:
        """Take note of a record; see `topics` for the order."""
        match record.topic:
            case "page-views":
                self._observe_view(record)
            case "page-view-counts":
                self._observe_count(record)
            case "dead-letters":
                self._observe_dead_letter(record)

    # -- views

    def _observe_view(self, record: Observed) -> None:
        self._inputs += 1
        where = record.partition, record.offset
        view, code = read_input(_views, record.value)
        if view is None:
            self._refused[where] = code
            return
        at_us, sent_us, newest = _microseconds(view.at), record.timestamp_ms * 1_000, self._newest[record.partition]
        if record.key != view.page.encode():
            self._refused[where] = "wrong_key"
        elif at_us - sent_us > _HOUR_US:
            self._refused[where] = "future"
        elif newest.is_late(at_us):
            self._refused[where] = "late"
        else:
            page = self._pages[view.page]
            page.places |= 1 << record.partition
            minute = page.minutes[at_us // _MINUTE_US]
            minute.views += 1
            if newest.may_be_late(at_us):
                self._open[where] = minute
            else:
                newest.move(at_us, sent_us)

    # -- counts

    def _observe_count(self, record: Observed) -> None:
        count = read(_counts, record.value)
        start_us = _microseconds(count.window_start) if count else 0
        if count is None or start_us % _MINUTE_US or count.views < 1:
            self.findings.add("phantom count", f"{record} is not of the form that we write")
            return
        key = count.page.encode()
        belongs = partition_of(key, self.facts.partitions.get(record.topic, 1))
        if record.key != key or record.partition != belongs:
            self.findings.add("misplaced", f"{record}: of {count.page}, key {record.key!r}, not in {belongs}")
        page = self._pages[count.page]
        minute = page.minutes[start_us // _MINUTE_US]
        minute.counts += 1
        # After a crash counts go back a little. A zombie that wakes up may send what it had in hand in part, before its
        # successor sends all of it.
        if page.is_whole and count.views > minute.highest + _MOST_MISSING:
            text = f"{record}: {count.page} at {count.window_start} goes from {minute.highest} to {count.views}"
            self.findings.add("gap", text, count.views - minute.highest - 1)
        elif page.is_whole and count.views > minute.highest + 1:
            minute.missing = minute.missing or set()
            minute.missing.update(range(minute.highest + 1, count.views))
        elif minute.missing:
            minute.missing.discard(count.views)
        minute.highest = max(minute.highest, count.views)

    # -- dead letters

    def _observe_dead_letter(self, record: Observed) -> None:
        letter = letter_from(self.facts.settings.kafka_prefix + "page-views", record)
        if letter is None:
            return
        where, code, text = letter
        if where in self._letters:
            self._repeated_letters += 1
            return
        self._letters.add(where)
        deserved = self._refused.get(where)
        if deserved is None:
            self._observe_other_letter(record, where, code, text)
        elif code != deserved:
            self.findings.add("wrong dead letter", f"{text}, not as {deserved}")

    def _observe_other_letter(self, record: Observed, where: tuple[int, int], code: str, letter: str) -> None:
        """A dead letter of a view that counts, as far as its record tells."""
        if where in self._open and code == "late":
            self._open[where].views -= 1
            return
        view = read(_views, record.value)
        page = self._pages.get(view.page) if view else None
        minute = page.minutes.get(_microseconds(view.at) // _MINUTE_US) if view and page else None
        if minute is None or not minute.views:
            self.findings.add("phantom dead letter", letter)
            return
        minute.views -= 1
        self.findings.add("set aside", letter)

    # -- the table

    def row(self, table: str, partition: int, key: bytes, value: bytes) -> None:
        """Take note of a row of the table."""
        if key == CLOCK_ROW:
            return
        name, start_s = split_window_key(key)
        page = self._pages[name.decode()]
        page.minutes[int(start_s) // 60].row += int(value)
        if page.places and not page.places & 1 << partition:
            self.findings.add("misplaced", f"{table}[{partition}]: {name.decode()} is viewed in other partitions")

    # -- conclusions

    def finish(self) -> None:
        """Look for what is missing, and sum up."""
        lost = repeated = counted_twice = 0
        for name, page in self._pages.items():
            closed = self._closed(page)
            for number, minute in page.minutes.items():
                where = f"{name} at {_EPOCH + number * timedelta(minutes=1)}"
                self._find_phantoms(minute, where)
                lost += self._find_lost(page, minute, where, is_closed=number < closed)
                repeated += max(0, minute.counts - minute.views)
                counted_twice += max(0, minute.row - minute.views)
        lost += self._find_lost_letters()
        codes = Counter(self._refused.values())
        self.figures = {
            "inputs": self._inputs,
            "views": sum(minute.views for page in self._pages.values() for minute in page.minutes.values()),
            "counts": sum(minute.counts for page in self._pages.values() for minute in page.minutes.values()),
            "pages": len(self._pages),
            "set_aside": len(self._letters),
            "late": codes["late"],
            "future": codes["future"],
            "ill-formed": codes.total() - codes["late"] - codes["future"],
            "lost": lost,
            "repeated": repeated + self._repeated_letters,
            "counted_twice": counted_twice,
        }

    def _closed(self, page: _Page) -> int:
        """The first minute that may still be open; the rows of those before it may be gone."""
        newest_us = max((self._newest[each].most_us for each in _bits(page.places)), default=0)
        return (newest_us - _HOUR_US) // _MINUTE_US

    def _find_phantoms(self, minute: _Minute, where: str) -> None:
        if minute.views:
            return
        if minute.counts:
            self.findings.add("phantom count", f"{where}: {minute.counts} counts, no view", minute.counts)
        if minute.row:
            self.findings.add("phantom row", f"{where}: {minute.row} in the table, no view")

    def _find_lost(self, page: _Page, minute: _Minute, where: str, *, is_closed: bool) -> int:
        # Not lost as long as they may yet be consumed; that they are not is the audit's own finding.
        if not self.facts.at_rest:
            return 0
        sent = minute.highest if page.is_whole else minute.counts
        kept = minute.views if is_closed and not minute.row else minute.row
        if minute.missing:
            self.findings.add("gap", f"{where}: {min(minute.missing)} was never sent", len(minute.missing))
        lost = max(0, minute.views - min(sent, kept))
        if lost:
            text = f"{where}: {minute.views} views, {minute.row} in the table, {sent} in the counts that were sent"
            self.findings.add("lost view", text, lost)
        return lost

    def _find_lost_letters(self) -> int:
        lost = sorted(self._refused.keys() - self._letters) if self.facts.at_rest else []
        for partition, offset in lost:
            text = f"page-views[{partition}]@{offset} is {self._refused[partition, offset]}"
            self.findings.add("lost dead letter", text)
        return len(lost)


def _microseconds(moment: datetime) -> int:
    """Since 1970; exact, as seconds in a float would not be."""
    return (moment - _EPOCH) // _US


def _bits(number: int) -> list[int]:
    return [bit for bit in range(number.bit_length()) if number >> bit & 1]


_views = msgspec.json.Decoder(PageView)
_counts = msgspec.json.Decoder(PageViewCount)
