"""Input for analytics, as browsers send it: visits of a few pages each, mostly in time, some late, some from wrong clocks.

Page 1 is popular, the last one hardly known. The same seed gives the same visits, and another seed other ids: runs can
follow each other on one topic. The times follow the clock, as they must be near those of Kafka's records.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from random import Random
from typing import Any, TypeAlias

import msgspec

from streams_app.registry import Record, generator

Fields: TypeAlias = dict[str, Any]

#: Visits that go on at the same time, pages in each on average, and seconds on a page on average.
_VISITS, _PAGES, _THINK_S = 200, 5, 30.0
_RETURNING_USERS = 5_000
_SECTIONS = ("products", "articles", "help", "account")
#: How old a view is when it is sent: a browser collects a few seconds of them. And some phones were offline meanwhile.
_BROWSER_S, _OFFLINE_S = 5.0, 50 * 60.0
#: Clearly behind the hour for which minutes stay open, and up to a day.
_OUTSIDE_S = (65 * 60.0, 24 * 60 * 60.0)


@generator("page-views", topic="page-views")
def page_views(
    random: Random,
    keys: int,
    *,
    offline: float = 0.02,
    late: float = 0.003,
    future: float = 0.003,
    ill_formed: float = 0.005,
    clock: Callable[[], float] = time.time,
) -> Iterator[Record]:
    """Views of ``keys`` pages; the shares are of all records. ``clock`` gives the time in seconds since 1970."""
    source = _Source(random, keys, clock)
    while True:
        dice = random.random()
        if dice < ill_formed:
            yield source.ill_formed()
        elif dice < ill_formed + late:
            yield _record(source.view(-random.uniform(*_OUTSIDE_S)))
        elif dice < ill_formed + late + future:
            yield _record(source.view(random.uniform(*_OUTSIDE_S)))
        elif dice < ill_formed + late + future + offline:
            yield _record(source.view(-random.uniform(0.0, _OFFLINE_S)))
        else:
            yield _record(source.view(-random.uniform(0.0, _BROWSER_S)))


class _Source:
    """The state behind the records."""

    def __init__(self, random: Random, keys: int, clock: Callable[[], float]) -> None:
        self._random = random
        self._keys = keys
        self._clock = clock
        self._prefix = f"{random.getrandbits(48):012x}"
        self._count = 0
        #: Who views a page next: when, in seconds of the visits' own time, which only orders them; and who it is.
        self._visits = [(random.expovariate(1 / _THINK_S), self._user()) for _ in range(_VISITS)]
        heapq.heapify(self._visits)

    def view(self, offset_s: float) -> Fields:
        """The next view of some visit, ``offset_s`` from now."""
        self._count += 1
        at = datetime.fromtimestamp(round(self._clock() + offset_s, 3), UTC)
        user, page = self._next_user(), self._page()
        return {"id": f"{self._prefix}-{self._count}", "user": user, "page": page, "at": at.isoformat()}

    def ill_formed(self) -> Record:
        """A record that must become a dead letter, of one of the kinds in `ILL_FORMED`."""
        kind = self._random.choice(sorted(ILL_FORMED))
        return ILL_FORMED[kind](self.view(-self._random.uniform(0.0, _BROWSER_S)))

    def _next_user(self) -> str:
        now_s, user = self._visits[0]
        # One visit ends as another begins, so that there are always as many.
        following = self._user() if self._random.random() < 1 / _PAGES else user
        heapq.heapreplace(self._visits, (now_s + self._random.expovariate(1 / _THINK_S), following))
        return user

    def _user(self) -> str:
        return f"user-{1 + int(_RETURNING_USERS * self._random.random()):05d}"

    def _page(self) -> str:
        # The cube pulls towards the low numbers: of 100 pages the first 13 get half of all views.
        number = int(self._keys * self._random.random() ** 3)
        return "/" if number == 0 else f"/{_SECTIONS[number % len(_SECTIONS)]}/{number}"


def _record(fields: Fields) -> Record:
    return Record(fields["page"].encode(), msgspec.json.encode(fields))


def _with(**changes: Any) -> Callable[[Fields], Record]:
    return lambda fields: Record(fields["page"].encode(), msgspec.json.encode({**fields, **changes}))


def _without(name: str) -> Callable[[Fields], Record]:
    return lambda fields: Record(
        fields["page"].encode(), msgspec.json.encode({key: value for key, value in fields.items() if key != name})
    )


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Fields], Record]:
    return lambda fields: Record(fields["page"].encode(), change(msgspec.json.encode(fields)))


#: Every way in which a page view can be ill-formed, by name.
ILL_FORMED: dict[str, Callable[[Fields], Record]] = {
    "json_cut_off": _raw(lambda value: value[:-1]),
    "json_empty": _raw(lambda value: b""),
    "json_not_an_object": _raw(lambda value: b"[" + value + b"]"),
    "json_not_utf8": _raw(lambda value: value.replace(b'"user":"', b'"user":"\xff', 1)),
    "id_empty": _with(id=""),
    "id_oversized": lambda fields: _with(id=fields["id"].ljust(65, "x"))(fields),
    "id_number": _with(id=1),
    "id_missing": _without("id"),
    "user_empty": _with(user=""),
    "user_oversized": _with(user="u" * 65),
    "user_null": _with(user=None),
    "user_missing": _without("user"),
    "page_empty": lambda fields: _record({**fields, "page": ""}),
    "page_oversized": lambda fields: _record({**fields, "page": fields["page"].ljust(201, "x")}),
    "page_list": lambda fields: _with(page=[fields["page"]])(fields),
    "page_missing": _without("page"),
    "at_not_a_time": _with(at="yesterday"),
    "at_without_zone": lambda fields: _with(at=fields["at"].removesuffix("+00:00"))(fields),
    "at_number": _with(at=1_704_067_200),
    "at_end_of_calendar": _with(at="9999-12-31T23:59:59-12:00"),
    "at_missing": _without("at"),
    "key_missing": lambda fields: Record(None, msgspec.json.encode(fields)),
    "key_of_another": lambda fields: Record(fields["page"].encode() + b"?", msgspec.json.encode(fields)),
    "key_not_utf8": lambda fields: Record(b"\xff" + fields["page"].encode(), msgspec.json.encode(fields)),
}
