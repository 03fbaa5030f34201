"""What the page is told, once a second: the observer's latest words, this process's own figures, and the minutes before.

::

    observer (a process) ──line a second──> Board ──the same bytes──> every open page (server-sent events)

The observer runs while somebody looks and `_LINGER_S` longer. One that ends is started again, a little later each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from mode import Service

from streams_app.audit import audited_family
from streams_app.dashboard.observer import LETTERS, Judged, Seen, Task, now_ms
from streams_app.figures import Figures
from streams_app.registry import followers, panels

if TYPE_CHECKING:
    from streams_app.application import App

_EVERY_S = 1.0
_LINGER_S = 60.0
#: Of the charts: one sample a second of at most so many seconds.
_HISTORY = 600
_RETRY_S, _LONGEST_RETRY_S = 1.0, 30.0
_END_TIMEOUT_S = 5.0
#: A line holds every partition.
_LINE_LIMIT_BYTES = 16 * 1024 * 1024
#: Figures of an engine; the page has words for each.
_COUNTS = ("events", "batches", "rebalances", "dead_letters", "given_up", "dropped_batches")
_COMMAND = "from streams_app.dashboard.observer import main; main()"

#: Time in ms, and by guarantee: records per second, waiting ones, p50 and p99 of the latency in ms; None: nobody knows.
Sample: TypeAlias = tuple[int, dict[str, tuple[float | None, int | None, int | None, int | None]]]


class Board(Service):
    """See the module."""

    def __init__(self, app: App, *, started_ms: int, **kwargs: Any) -> None:
        """``started_ms``: since when the engines count."""
        super().__init__(**kwargs)
        self.app = app
        self.viewers = 0
        self._started_ms = started_ms
        self._seen: Seen | None = None
        self._history: deque[Sample] = deque(maxlen=_HISTORY)
        self._process: Process | None = None
        #: For people: why there is nothing new.
        self._remark = "starting to look"
        self._wanted = asyncio.Event()
        self._left_s = 0.0
        self._message = b""
        self._told = asyncio.Condition()

    # -- pages

    async def messages(self) -> AsyncGenerator[bytes]:
        """All of it first, then what is new, once a second, until the service ends."""
        with self._viewer():
            yield _event("history", [*self._history])
            yield _event("state", self.document())
            while not self.should_stop:
                async with self._told:
                    await self._told.wait()
                    message = self._message
                if not self.should_stop:
                    yield message

    @contextlib.contextmanager
    def _viewer(self) -> Iterator[None]:
        self.viewers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self.viewers -= 1
            self._left_s = time.monotonic()

    def document(self) -> dict[str, Any]:
        """How everything stands."""
        seen = self._seen
        return {
            "now_ms": now_ms(),
            "seen_ms": seen.at_ms if seen else 0,
            "remark": self._remark,
            "trouble": seen.trouble if seen else "",
            "process": self._own(),
            "guarantees": [self._guarantee(app, seen) for app in self.app.family if app.agents],
            "marks": seen.marks if seen else [],
            "letters": seen.letters if seen else [],
            "reasons": _reasons(seen.judged if seen else None),
            "judged": seen.judged and _summary(seen.judged) if seen else None,
        }

    def _own(self) -> dict[str, Any]:
        """What only this process knows: what its engines did since it started."""
        running = [app for app in self.app.family if app.runs_here]
        slot = next((app.slot.name for app in running if "slot" in app.__dict__), "")
        return {
            "worker": slot,
            "pid": os.getpid(),
            "started_ms": self._started_ms,
            "engines": {app.guarantee: _engine(app.engine.figures) for app in running},
        }

    def _guarantee(self, app: App, seen: Seen | None) -> dict[str, Any]:
        """One card."""
        prefix = app.settings.kafka_prefix
        inputs = {
            topic.removeprefix(prefix)
            for each in audited_family(app)
            if each.app_id == app.conf.id
            for topic in each.inputs
        }
        own = [panel for topic, panel in panels().items() if topic in inputs]
        figures = _figures_of(app.guarantee, seen.judged if seen else None)
        group = next((each for each in seen.groups if each.app_id == app.conf.id), None) if seen else None
        counted = [panel.topic for panel in own] or sorted(inputs)
        return {
            "guarantee": app.guarantee,
            "app_id": app.conf.id,
            "title": " and ".join(panel.title for panel in own),
            "unit": own[0].unit if len(own) == 1 else "events",
            "promise": " ".join(panel.promise for panel in own),
            "rate": None
            if group is None or group.rates is None
            else sum(group.rates.get(topic, 0.0) for topic in counted),
            "lag": None if group is None else sum(each.lag for each in group.partitions),
            "state": "" if group is None else group.state,
            "members": [] if group is None else group.members,
            "partitions": [] if group is None else group.partitions,
            "reported": None if group is None else group.reported,
            "in_hand": 0 if group is None else group.in_hand,
            **{name: _total(figures, name) for name in ("lost", "repeated", "set_aside")},
            "latency": next((found for each in figures if isinstance(found := each.get("latency_ms"), dict)), {}),
            "figures": [
                {"name": words, "value": _as_text(value), "zero": name in panel.zero}
                for panel in own
                for name, words in panel.figures.items()
                if (value := _named(seen.judged if seen else None, name)) is not None
            ],
        }

    # -- the observer

    @Service.task
    async def _look(self) -> None:
        retry_s = _RETRY_S
        while not self.should_stop:
            self._wanted.clear()
            if self.viewers:
                began_s = time.monotonic()
                try:
                    await self._observe()
                except Exception as error:  # noqa: BLE001 - no page is worth a worker
                    self.log.warning("the observer behind the dashboard is ended, after %r", error)
                retry_s = (
                    _RETRY_S if time.monotonic() - began_s > _LONGEST_RETRY_S else min(2 * retry_s, _LONGEST_RETRY_S)
                )
                if self.viewers:
                    self._remark = (
                        f"whoever looks at Kafka for this page ended, and is started again within {retry_s:g} s"
                    )
                    await self.sleep(retry_s)
            else:
                await self.wait_first(self._wanted.wait())

    async def _observe(self) -> None:
        """Start the observer and listen to it, as long as somebody wants to know."""
        app = self.app
        task = Task(app.kafka, app.settings, audited_family(app), followers(), app.conf.id, app.conf.broker_client_id)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _COMMAND, stdin=PIPE, stdout=PIPE, limit=_LINE_LIMIT_BYTES
        )
        self._process = process
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(pickle.dumps(task))
            while not self._is_unwanted():
                try:
                    line = await asyncio.wait_for(process.stdout.readline(), _EVERY_S)
                except TimeoutError:
                    continue
                if not line:
                    return
                self._hear(msgspec.json.decode(line, type=Seen))
        finally:
            await self._end(process)

    def _is_unwanted(self) -> bool:
        return self.should_stop or (not self.viewers and time.monotonic() - self._left_s > _LINGER_S)

    async def _end(self, process: Process) -> None:
        self._process = None
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), _END_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()

    def _hear(self, seen: Seen) -> None:
        is_new = self._seen is None or seen.at_ms > self._seen.at_ms
        self._seen, self._remark = seen, ""
        if is_new and seen.at_ms:
            cards = self.document()["guarantees"]
            self._history.append((seen.at_ms, {each["guarantee"]: _sampled(each) for each in cards}))

    @Service.task
    async def _tell(self) -> None:
        while not self.should_stop:
            await self.sleep(_EVERY_S)
            if self.viewers:
                await self._tell_all(_event("state", self.document()))

    async def _tell_all(self, message: bytes) -> None:
        async with self._told:
            self._message = message
            self._told.notify_all()

    async def on_stop(self) -> None:
        """Let the pages go; the observer ends with our tasks."""
        await self._tell_all(b"")

    async def on_shutdown(self) -> None:
        """Leave no process behind, whoever was cancelled."""
        if self._process is not None:
            await self._end(self._process)


def _engine(figures: Figures) -> dict[str, Any]:
    """What is shown of an engine: counts, and the reasons of what failed."""
    return {
        "counts": {name: figures[name] for name in _COUNTS},
        "dropped": dict(figures.dropped),
        "troubles": dict(figures.troubles),
    }


def _sampled(card: dict[str, Any]) -> tuple[float | None, int | None, int | None, int | None]:
    latency, rate = card["latency"], card["rate"]
    return rate and round(rate, 1), card["lag"], latency.get("p50"), latency.get("p99")


def _figures_of(guarantee: str, judged: Judged | None) -> list[dict[str, Any]]:
    if judged is None:
        return []
    return [figures for name, figures in judged.figures.items() if judged.guarantees.get(name) == guarantee]


def _named(judged: Judged | None, name: str) -> Any:
    follower, _, figure = name.rpartition(".")
    return judged.figures.get(follower, {}).get(figure) if judged else None


def _as_text(value: Any) -> Any:
    """Amounts pass what JavaScript's numbers hold."""
    return {label: str(number) for label, number in value.items()} if isinstance(value, dict) else str(value)


def _total(figures: list[dict[str, Any]], name: str) -> int | None:
    """Sum of the figures of that name; None: there is none, so nobody knows."""
    found = [number for each in figures if isinstance(number := each.get(name), int)]
    return sum(found) if found else None


def _reasons(judged: Judged | None) -> list[tuple[str, str, int]]:
    """Topic, reason and number of dead letters."""
    by_reason = judged.figures.get(LETTERS, {}).get("by_reason", {}) if judged else {}
    counted = by_reason.items() if isinstance(by_reason, dict) else ()
    split = ((*name.partition(" ")[::2], count) for name, count in counted)
    return sorted(split, key=lambda each: -each[2])


def _summary(judged: Judged) -> dict[str, Any]:
    return {
        "at_ms": judged.at_ms,
        "behind_s": judged.behind_s,
        "records": judged.records,
        "records_per_s": judged.records_per_s,
        "remarks": judged.remarks,
        "anomalies": judged.anomalies,
        "recent": judged.recent,
        "trouble": judged.trouble,
    }


def _event(name: str, data: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(data))
