"""Analytics: what counts as a page view, in which minute, what browsers send, and what the audit says of it all."""

from __future__ import annotations

import asyncio
import json
import struct
from collections import Counter, defaultdict
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from itertools import islice
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

import agents.analytics as module
from agents.analytics import refusal
from agents.analytics_check import PageViewsCheck
from agents.analytics_input import ILL_FORMED, page_views
from streams_app.codecs import UndecodableError, struct_codec
from streams_app.partitioning import partition_of
from streams_app.registry import Facts, Observed, Record
from streams_app.settings import Settings
from streams_app.windows import CLOCK_ROW
from tables.analytics import OPEN, PageView, minute_of
from tests.ledger_world import PARTITIONS, FakeStream, FakeTopic, World

COUNT = 20_000
NOON = datetime(2024, 5, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MINUTE = 60 * SECOND
decode = struct_codec(PageView).decode


def fields(**changes: Any) -> dict[str, Any]:
    return {"id": "v1", "user": "alice", "page": "/", "at": NOON.isoformat(), **changes}


def as_json(**changes: Any) -> bytes:
    return json.dumps(fields(**changes)).encode()


def view(**changes: Any) -> PageView:
    return msgspec.convert(fields(**changes), PageView)


class FakeWindows:
    """A table of tumbling minutes that sees the partition of the event in hand."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[int, Counter[tuple[str, datetime]]] = defaultdict(Counter)
        self.times: dict[int, datetime] = {}

    def newest(self) -> datetime | None:
        return self.times.get(self.world.event.message.partition)

    def __getitem__(self, page: str) -> FakeWindow:
        return FakeWindow(self, page)

    def __setitem__(self, page: str, window: FakeWindow) -> None:
        pass


class FakeWindow:
    """One page's windows."""

    def __init__(self, windows: FakeWindows, page: str) -> None:
        event = windows.world.event
        self.windows, self.at, self.partition = windows, event.value.at, event.message.partition
        self.row = page, minute_of(self.at)

    def value(self) -> int:
        return self.windows.rows[self.partition][self.row]

    def __iadd__(self, number: int) -> FakeWindow:
        self.windows.rows[self.partition][self.row] += number
        before = self.windows.times.get(self.partition, self.at)
        # As the clock of a worker does it: no further than now.
        sent = datetime.fromtimestamp(self.windows.world.event.message.timestamp, UTC)
        self.windows.times[self.partition] = max(before, min(self.at, sent))
        return self


class Analytics(World):
    """Analytics without Kafka: the agent's own code on topics and a table in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.views = FakeWindows(self)

    def write(self, records: Any, sent: datetime = NOON) -> None:
        for record in records:
            self.append("page-views", record.key, record.value, timestamp_ms=int(sent.timestamp() * 1000))

    def view(self, at: datetime = NOON, *, sent: datetime | None = None, page: str = "/") -> Observed:
        timestamp_ms = int((sent or at).timestamp() * 1000)
        value = as_json(page=page, at=at.isoformat())
        return self.append("page-views", page.encode(), value, timestamp_ms=timestamp_ms)

    def run(self, random: Random | None = None) -> None:
        with ExitStack() as stack:
            stack.enter_context(patch.object(module, "counts", FakeTopic(self, "page-view-counts")))
            stack.enter_context(patch.object(module, "views", self.views))
            stack.enter_context(patch.object(module, "set_aside", self._set_aside))
            asyncio.run(self._run(random))

    async def _run(self, random: Random | None) -> None:
        for partition, log in enumerate(self.topics["page-views"]):
            for record in log[self.consumed["page-views", partition] :]:
                self.consumed["page-views", partition] += 1
                await self._handle(record)

    async def _handle(self, record: Observed) -> None:
        message = SimpleNamespace(**record._asdict(), timestamp=record.timestamp_ms / 1000)
        self.event = SimpleNamespace(value=None, message=message)
        try:
            self.event.value = decode(record.value or b"")
        except UndecodableError as error:
            await self._set_aside(error.code, str(error))
        else:
            await module.count.fun(FakeStream(self.event))

    def judge(self, *, at_rest: bool = True, settings: Settings | None = None) -> PageViewsCheck:
        partitions = dict.fromkeys(PageViewsCheck.topics, PARTITIONS)
        check = PageViewsCheck(Facts(settings or Settings(), partitions, at_rest))
        for topic in check.topics:
            for record in self.all(topic):
                check.observe(record)
        for partition, rows in self.views.rows.items():
            check.row("views", partition, CLOCK_ROW, CLOCK_ROW)
            for (page, start), row in rows.items():
                start_ms = int(start.timestamp()) * 1000
                check.row(
                    "views", partition, page.encode() + struct.pack(">qq", start_ms, start_ms + 60_000), b"%d" % row
                )
        check.finish()
        return check

    def remove(self, record: Observed) -> None:
        self.topics[record.topic][record.partition].remove(record)

    def codes(self) -> list[str]:
        return [record.headers["dlq.error"].decode() for record in self.all("dead-letters")]

    def counted(self, **which: Any) -> list[int]:
        return [each["views"] for each in self.decoded("page-view-counts", **which)]


class TestForm:
    """What is not of the contract's form must not be counted."""

    @pytest.mark.parametrize("kind", sorted(ILL_FORMED))
    def test_each_kind_of_ill_formed_input_becomes_one_dead_letter_and_nothing_else(self, kind: str) -> None:
        """Nonsense would be counted, or be lost without a trace."""
        world = Analytics()
        world.write([ILL_FORMED[kind](fields())])
        world.run()
        assert len(world.all("dead-letters")) == 1
        assert not world.all("page-view-counts")
        assert not world.judge().findings.list()

    @pytest.mark.parametrize("value", [b'{"id":"1","page":"/","at":"2024-05-01T12:00:00Z"}', as_json(page="")])
    def test_a_missing_user_and_an_empty_page_are_invalid(self, value: bytes) -> None:
        """Nobody's views, and views of nothing, would be counted."""
        with pytest.raises(UndecodableError) as caught:
            decode(value)
        assert caught.value.code == "invalid"

    @pytest.mark.parametrize(
        "changes",
        [
            {"page": "p" * 200},
            {"page": "/\u00e4" * 100},
            {"user": "u" * 64},
            {"id": "i" * 64},
            {"at": "2024-05-01T12:00:00.5+02:00"},
            {"at": "0002-01-01T00:00:00+23:59"},
            {"unknown": [1]},
        ],
    )
    def test_the_limits_of_the_contract_are_accepted(self, changes: dict[str, Any]) -> None:
        """Browsers that keep to the contract would be turned away."""
        world = Analytics()
        world.append(
            "page-views", fields(**changes)["page"].encode(), as_json(**changes), timestamp_ms=1_714_564_800_000
        )
        world.run()
        assert len(world.all("page-view-counts")) == 1
        assert not world.judge().findings.list()


class TestRefusal:
    """Which views are set aside although they are well-formed."""

    @pytest.mark.parametrize(("behind", "code"), [(OPEN, None), (OPEN + timedelta(milliseconds=1), "late")])
    def test_a_view_is_late_when_it_is_more_than_an_hour_behind_the_newest(
        self, behind: timedelta, code: str | None
    ) -> None:
        """Its minute would begin again at one, or stay open for ever."""
        refused = refusal(view(at=(NOON - behind).isoformat()), b"/", NOON, NOON)
        assert (refused[0] if refused else None) == code

    @pytest.mark.parametrize(("ahead", "code"), [(OPEN, None), (OPEN + timedelta(milliseconds=1), "future")])
    def test_a_view_is_of_the_future_when_it_is_more_than_an_hour_ahead_of_its_record(
        self, ahead: timedelta, code: str | None
    ) -> None:
        """A wrong clock would close the minutes of all others."""
        refused = refusal(view(at=(NOON + ahead).isoformat()), b"/", NOON, None)
        assert (refused[0] if refused else None) == code

    def test_without_a_newest_time_nothing_is_late(self) -> None:
        """A partition could never begin."""
        assert refusal(view(at="1970-01-01T00:00:00Z"), b"/", NOON, None) is None

    @pytest.mark.parametrize("key", [None, b"", b"/other", b"\xff"])
    def test_a_key_that_is_not_the_page_is_named(self, key: bytes | None) -> None:
        """A page would be counted in two partitions, and each would tell a part of it."""
        code, _ = refusal(view(), key, NOON, NOON) or ("", "")
        assert code == "wrong_key"

    def test_times_at_the_ends_of_the_calendar_are_compared_without_an_error(self) -> None:
        """One such view would stop its partition for ever."""
        first, last = (NOON.replace(year=year) for year in (2, 9998))
        assert refusal(view(), b"/", NOON, first) is None
        for at, newest, expected in ((first, last, "late"), (last, first, "future"), (first, None, None)):
            refused = refusal(view(at=at.isoformat()), b"/", NOON, newest)
            assert (refused[0] if refused else None) == expected


class TestCounting:
    """A view counts in the minute of its own time."""

    def test_each_view_sends_the_count_of_its_minute(self) -> None:
        """Charts would show views where none were."""
        world = Analytics()
        for seconds in (0, 59, 60, 30, 119):
            world.view(NOON + seconds * SECOND, sent=NOON + 2 * MINUTE)
        world.run()
        assert world.counted(window_start="2024-05-01T12:00:00Z") == [1, 2, 3]
        assert world.counted(window_start="2024-05-01T12:01:00Z") == [1, 2]
        assert not world.judge().findings.list()

    def test_a_minute_is_the_same_in_every_time_zone(self) -> None:
        """Travellers would be counted in minutes of their own."""
        world = Analytics()
        for at in ("2024-05-01T12:00:10Z", "2024-05-01T14:00:20+02:00", "2024-05-01T06:30:30-05:30"):
            value = as_json(at=at)
            world.append("page-views", b"/", value, timestamp_ms=int(NOON.timestamp() * 1000))
        world.run()
        assert world.counted(window_start="2024-05-01T12:00:00Z") == [1, 2, 3]

    def test_late_and_future_views_are_set_aside_and_do_not_move_the_newest_time(self) -> None:
        """One wrong clock would make all others late."""
        world = Analytics()
        for minutes in (0, -61, 62, -59, 0):
            world.view(NOON + minutes * MINUTE, sent=NOON)
        world.run()
        assert world.codes() == ["late", "future"]
        assert len(world.counted()) == 3
        assert not world.judge().findings.list()


def records_of(seed: int, count: int, **shares: Any) -> list[Record]:
    """Records by a clock of one tick per record."""
    ticks = iter(range(10**9))
    return list(
        islice(page_views(Random(seed), 200, clock=lambda: NOON.timestamp() + next(ticks) / 1000, **shares), count)
    )


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return records_of(7, COUNT)


def well_formed(records: list[Record]) -> list[PageView]:
    found = []
    for record in records:
        try:
            each = decode(record.value)
        except UndecodableError:
            continue
        if record.key == each.page.encode():
            found.append(each)
    return found


class TestInput:
    """What the demo, the lab and newcomers feed analytics with."""

    def test_the_same_seed_and_clock_give_the_same_records_and_another_seed_other_ids(
        self, records: list[Record]
    ) -> None:
        """A failure could not be repeated; two runs on a topic could not be told apart."""
        assert records_of(7, COUNT) == records
        good = well_formed(records)
        assert len({each.id for each in good}) == len(good)
        assert not {each.id for each in well_formed(records_of(8, 1_000))} & {each.id for each in good}

    def test_the_shares_are_as_said(self, records: list[Record]) -> None:
        """The rare cases would not be rare, or not there at all."""
        good = well_formed(records)
        old = [NOON - each.at for each in good]
        assert (COUNT - len(good)) / COUNT == pytest.approx(0.005, abs=0.002)
        assert sum(age > OPEN + 4 * MINUTE for age in old) / COUNT == pytest.approx(0.003, abs=0.0015)
        assert sum(-age > OPEN + 4 * MINUTE for age in old) / COUNT == pytest.approx(0.003, abs=0.0015)
        assert sum(MINUTE < age < OPEN for age in old) / COUNT == pytest.approx(0.02, abs=0.004)
        assert not any(OPEN - 9 * MINUTE < abs(age) < OPEN + 4 * MINUTE for age in old)

    def test_the_times_follow_the_clock(self) -> None:
        """All views would be late, or of the future, and nothing would be counted."""
        before = datetime.now(UTC)
        good = well_formed(list(islice(page_views(Random(1), 5, offline=0.0, late=0.0, future=0.0), 100)))
        assert all(before - 6 * SECOND <= each.at <= datetime.now(UTC) for each in good)

    def test_every_kind_of_ill_formed_record_comes(self) -> None:
        """A kind that never comes is never seen to be handled."""
        with patch.dict(ILL_FORMED, {kind: _called(kind) for kind in ILL_FORMED}):
            kinds = Counter(record.value for record in islice(page_views(Random(1), 5, ill_formed=1.0), 1_000))
        assert set(kinds) == {kind.encode() for kind in ILL_FORMED}

    def test_some_pages_are_popular_and_users_view_several(self, records: list[Record]) -> None:
        """Without hot pages and visits there is nothing to count but ones."""
        good = well_formed(records)
        pages = Counter(each.page for each in good)
        assert sum(views for _, views in pages.most_common(30)) > 0.45 * len(good)
        assert 150 < len(pages) <= 200
        users = Counter(each.user for each in good[:2_000])
        assert 2 < 2_000 / len(users) < 10


def _called(kind: str) -> Any:
    return lambda fields: Record(None, kind.encode())


@pytest.fixture
def world(records: list[Record]) -> Analytics:
    """All that was generated, handled faithfully."""
    world = Analytics()
    world.write(records[:3_000], NOON + 10 * SECOND)
    world.run()
    return world


def anomalies(check: PageViewsCheck) -> dict[str, int]:
    return {finding.anomaly: finding.count for finding in check.findings.list()}


def views_of(count: int) -> Analytics:
    """So many views of one page in one minute, handled faithfully."""
    world = Analytics()
    for _ in range(count):
        world.view()
    world.run()
    return world


PLACE = partition_of(b"/", PARTITIONS)
ROW = ("/", NOON)


class TestCheck:
    """A check that never finds anything proves nothing."""

    def test_a_faithful_world_passes(self, world: Analytics) -> None:
        """The audit would cry wolf."""
        check = world.judge()
        assert anomalies(check) == {}
        figures = check.figures
        assert (figures["inputs"], figures["lost"], figures["repeated"], figures["counted_twice"]) == (3_000, 0, 0, 0)
        assert figures["views"] == figures["counts"] == 3_000 - figures["set_aside"]
        assert figures["late"] > 0
        assert figures["future"] > 0
        assert figures["set_aside"] == figures["late"] + figures["future"] + figures["ill-formed"]

    def test_repetitions_are_permitted_and_counted(self) -> None:
        """At least once would be judged by a promise that it does not make."""
        world = views_of(6)
        counts = list(world.topics["page-view-counts"][PLACE])
        world.topics["page-view-counts"][PLACE] = [*counts[:4], *counts[2:]]
        check = world.judge()
        assert anomalies(check) == {}
        assert check.figures["repeated"] == 2
        world = Analytics()
        world.write([ILL_FORMED["user_missing"](fields())])
        world.run()
        world.topics["dead-letters"][PLACE] *= 2
        check = world.judge()
        assert anomalies(check) == {}
        assert check.figures["repeated"] == 1

    def test_a_view_missing_from_the_table_is_found(self) -> None:
        """The one promise of at least once would not be looked at."""
        world = views_of(6)
        world.views.rows[PLACE][ROW] = 5
        assert anomalies(world.judge()) == {"lost view": 1}
        assert anomalies(world.judge(at_rest=False)) == {}
        del world.views.rows[PLACE][ROW]
        check = world.judge()
        assert anomalies(check) == {"lost view": 6}
        assert check.figures["lost"] == 6

    def test_a_view_that_the_table_counts_twice_is_counted(self) -> None:
        """Whoever asks how often it happens would not learn it."""
        world = views_of(6)
        world.views.rows[PLACE][ROW] = 8
        check = world.judge()
        assert anomalies(check) == {}
        assert check.figures["counted_twice"] == 2

    def test_a_count_that_was_never_sent_is_found(self) -> None:
        """Readers of the counts would miss a view that the table has."""
        for missing, anomaly in ((2, "gap"), (5, "lost view"), (0, "gap")):
            world = views_of(6)
            del world.topics["page-view-counts"][PLACE][missing]
            assert anomalies(world.judge()) == {anomaly: 1}

    def test_a_count_that_goes_back_and_then_skips_one_is_found(self) -> None:
        """A repetition could hide a loss."""
        world = views_of(6)
        counts = world.topics["page-view-counts"][PLACE]
        world.topics["page-view-counts"][PLACE] = [*counts[:4], *counts[1:4], counts[5]]
        assert anomalies(world.judge()) == {"gap": 1}

    def test_a_count_that_is_sent_behind_its_successor_is_no_gap(self) -> None:
        """A zombie's last words: some of its outputs have timed out, others leave, and then its successor sends them all."""
        world = views_of(6)
        counts = world.topics["page-view-counts"][PLACE]
        world.topics["page-view-counts"][PLACE] = [*counts[:2], *counts[4:5], *counts[2:]]
        check = world.judge()
        assert anomalies(check) == {}
        assert check.figures["repeated"] == 1

    def test_counts_and_rows_from_nowhere_are_found(self, world: Analytics) -> None:
        """Views could be made up."""
        count = {"page": "/nowhere", "window_start": NOON.isoformat(), "views": 1}
        world.append("page-view-counts", b"/nowhere", msgspec.json.encode(count))
        assert anomalies(world.judge()) == {"phantom count": 1}
        world.views.rows[0]["/", NOON - 600 * MINUTE] = 3
        assert anomalies(world.judge()).keys() >= {"phantom count", "phantom row"}

    @pytest.mark.parametrize("changes", [{"window_start": "2024-05-01T12:00:01Z"}, {"views": 0}, {"page": ""}])
    def test_a_count_that_is_not_of_our_form_is_found(self, changes: dict[str, Any]) -> None:
        """Its readers would stumble over it."""
        world = views_of(1)
        count = {"page": "/", "window_start": NOON.isoformat(), "views": 1, **changes}
        world.append("page-view-counts", b"/", msgspec.json.encode(count))
        assert anomalies(world.judge()) == {"phantom count": 1}

    def test_a_count_and_a_row_in_another_partition_are_found(self) -> None:
        """Readers of one partition would miss a part of a page."""
        world = views_of(1)
        [count] = world.all("page-view-counts")
        world.remove(count)
        world.append(count.topic, count.key, count.value, (PLACE + 1) % PARTITIONS)
        assert anomalies(world.judge()) == {"misplaced": 1}
        world = views_of(1)
        world.views.rows[(PLACE + 1) % PARTITIONS] = world.views.rows.pop(PLACE)
        assert anomalies(world.judge()) == {"misplaced": 1}

    @pytest.mark.parametrize("minutes", [-61, 61])
    def test_a_late_or_future_view_that_was_counted_is_found(self, minutes: int) -> None:
        """Closed minutes would be counted again from one."""
        world = Analytics()
        world.view(NOON, sent=NOON + MINUTE)
        world.view(NOON + minutes * MINUTE, sent=NOON)
        with patch.object(module, "refusal", lambda *_: None):
            world.run()
        assert anomalies(world.judge()) == {"phantom count": 1, "phantom row": 1, "lost dead letter": 1}

    def test_a_view_in_time_that_was_set_aside_is_found(self) -> None:
        """Views could be refused for no reason, and nobody would miss them."""
        world = Analytics()
        world.view()
        world.view(NOON - 59 * MINUTE, sent=NOON)
        real = refusal
        with patch.object(module, "refusal", lambda *it: ("late", "") if it[0].at < NOON else real(*it)):
            world.run()
        assert anomalies(world.judge()) == {"set aside": 1}

    def test_a_lost_dead_letter_and_a_wrong_code_are_found(self, world: Analytics) -> None:
        """What was sent would vanish without a trace, or be repaired for the wrong fault."""
        first, second, *_ = world.all("dead-letters")
        log = world.topics["dead-letters"][second.partition]
        log[log.index(second)] = second._replace(headers={**second.headers, "dlq.error": b"other"})
        world.remove(first)
        assert anomalies(world.judge()) == {"lost dead letter": 1, "wrong dead letter": 1}

    def test_dead_letters_of_other_topics_are_not_looked_at(self, world: Analytics) -> None:
        """The ledger's would be phantoms here."""
        headers = {"dlq.topic": b"transfers", "dlq.partition": b"0", "dlq.offset": b"0", "dlq.error": b"invalid"}
        world.append("dead-letters", b"k", b"v", headers=headers)
        assert anomalies(world.judge()) == {}
        headers = {**headers, "dlq.topic": b"page-views", "dlq.offset": b"1"}
        world.append("dead-letters", b"k", b"v", headers=headers)
        assert anomalies(world.judge()) == {"phantom dead letter": 1}

    def test_the_rows_of_closed_minutes_may_be_gone(self) -> None:
        """Every audit of a run that lasts longer than an hour would cry wolf."""
        world = Analytics()
        for minutes in (0, 61, 62):
            world.view(NOON + minutes * MINUTE, sent=NOON + 70 * MINUTE)
        world.run()
        del world.views.rows[PLACE][ROW]
        assert anomalies(world.judge()) == {}
        del world.views.rows[PLACE]["/", NOON + 61 * MINUTE]
        assert anomalies(world.judge()) == {"lost view": 1}

    @pytest.mark.parametrize("counted", [True, False])
    def test_where_the_newest_time_is_not_known_the_dead_letter_decides(self, counted: bool) -> None:
        """A view from a little ahead moves it as far as the worker's clock, which no record tells."""
        world = Analytics()
        world.view(NOON + 30 * MINUTE, sent=NOON)
        world.view(NOON - 40 * MINUTE, sent=NOON)
        real = refusal
        with patch.object(module, "refusal", lambda *it: real(*it[:3], None if counted else NOON + 25 * MINUTE)):
            world.run()
        assert world.codes() == ([] if counted else ["late"])
        assert anomalies(world.judge()) == {}

    def test_a_page_in_two_partitions_is_judged_by_the_number_of_its_counts(self) -> None:
        """A producer with another partitioner would make gaps of counts that are all there."""
        world = Analytics()
        for partition in (0, 1, 0):
            world.append("page-views", b"/", as_json(), partition, timestamp_ms=int(NOON.timestamp() * 1000))
        world.run()
        assert anomalies(world.judge()) == {}
        world.remove(world.all("page-view-counts")[0])
        assert anomalies(world.judge()) == {"lost view": 1}
