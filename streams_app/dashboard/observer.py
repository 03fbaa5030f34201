"""The process behind the dashboard: it looks at Kafka and follows what is committed, so that the worker does not have to.

It is started when somebody opens the page, and ended when nobody has looked for a while (board.py). A process of its own,
because it judges every committed record in Python, at low priority, and because a client library that crashes must not take a
worker with it. One line of JSON about once a second on stdout, each a `Seen`; it ends when stdin does, that is with its
parent. It may be killed at any moment: what its followers remember is written in one piece (`streams_app.follow`).

Memory: that of the followers, some 150 MB in all with Python itself (docs/dashboard.md has what was measured).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import logging.config
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

import msgspec
from confluent_kafka import KafkaException

from streams_app.audit import AuditedApp, Log, guarantee_of
from streams_app.dashboard.cluster import Cluster, Group, Mark, Marks
from streams_app.dashboard.letters import LettersFollower, Newest, Shown
from streams_app.errors import ConfigurationError
from streams_app.follow import UNREACHABLE, Anomaly, Auditor, Status
from streams_app.kafka import KafkaAddress
from streams_app.logs import configuration, wants_json
from streams_app.registry import Follower
from streams_app.settings import Settings
from streams_app.slot import acquire

log = logging.getLogger(__name__)
_EVERY_S = 1.0
_NICENESS = 10
#: Name of the follower that counts dead letters; agents' names are those of Python, or have no dot.
LETTERS = "dead.letters"


class Task(NamedTuple):
    """What to look at; pickled, from the worker."""

    address: KafkaAddress
    settings: Settings
    apps: Sequence[AuditedApp]
    followers: Mapping[str, type[Follower]]
    app_id: str
    client_id: str


class Judged(msgspec.Struct):
    """What the followers say."""

    at_ms: int
    #: Follower to its figures, and to the guarantee that it judges (empty: of none).
    figures: dict[str, dict[str, int | dict[str, int]]]
    guarantees: dict[str, str]
    #: Age of what was judged last; None: a follower is not that far yet.
    behind_s: float | None
    records: int
    records_per_s: float
    remarks: list[str]
    anomalies: dict[str, dict[str, int]]
    recent: list[Anomaly]
    trouble: str


class Seen(msgspec.Struct):
    """All of it."""

    #: When Kafka was asked about the groups.
    at_ms: int
    groups: list[Group]
    marks: list[Mark]
    letters: list[Shown]
    judged: Judged | None
    trouble: str = ""


class Observer:
    """Two threads: this one asks and tells, the other one follows."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._guarantees = {name: _guarantee(cls, task) for name, cls in task.followers.items()}
        self._status: Status | None = None
        self._cluster: Cluster | None = None
        self._log: Log | None = None
        self._newest = Newest(task.address, task.settings)
        self._marks = Marks()
        self._seen = Seen(0, [], [], [], None)

    def follow(self) -> None:
        """Judge what is committed, for ever."""
        task = self._task
        folder = acquire(task.settings.datadir / "dashboard", task.app_id, None)
        settings = replace(task.settings, datadir=folder.folder)
        followers = {**task.followers, LETTERS: LettersFollower}
        auditor = Auditor(task.address, settings, task.apps, followers, task.app_id)
        while True:
            self._status = auditor.step(lambda name, anomaly: None)

    def look(self) -> Seen:
        """Once; what cannot be reached is said, and what was known before stays, with its time."""
        seen, task = self._seen, self._task
        try:
            if self._cluster is None:
                self._cluster = Cluster(task.address, task.apps, task.settings.kafka_prefix, task.client_id)
            if self._log is None:
                self._log = Log(task.address, request_timeout_s=5.0)
            groups = self._cluster.look()
            at_ms = now_ms()
            self._marks.note(groups, at_ms)
            self._newest.look(self._log)
            seen = Seen(at_ms, groups, [*self._marks.latest], self._newest.shown, None)
        except UNREACHABLE as error:
            seen.trouble = f"Kafka does not answer as it should: {_in_words(error)}"
            # An admin client that has seen its broker restart may get no answer for more than a minute.
            self._close()
        seen.judged = self._judged()
        self._seen = seen
        return seen

    def _close(self) -> None:
        for each in (self._cluster, self._log):
            if each is not None:
                each.close()
        self._cluster = self._log = None

    def _judged(self) -> Judged | None:
        status = self._status
        if status is None:
            return None
        lags = [each.cut_lag_s for each in status.followers.values()]
        ripe = [each for each in lags if each is not None]
        remarks = [f"{name} {each.remark}" for name, each in status.followers.items() if each.remark]
        recent = sorted((each for some in status.recent.values() for each in some), key=lambda each: -each.at_ms)
        return Judged(
            int(status.at_s * 1000),
            {name: each.figures for name, each in status.followers.items()},
            self._guarantees,
            max(ripe) if len(ripe) == len(lags) else None,
            sum(each.records for each in status.followers.values()),
            sum(each.records_per_s for each in status.followers.values()),
            remarks,
            status.anomalies,
            recent[:5],
            status.trouble,
        )


def _guarantee(cls: type[Follower], task: Task) -> str:
    return guarantee_of(cls, task.apps, task.settings.kafka_prefix)


def _in_words(error: Exception) -> str:
    what = error.args[0].str() if isinstance(error, KafkaException) else str(error)
    return what or type(error).__name__


def now_ms() -> int:
    """This moment, as records have it."""
    return int(time.time() * 1000)


def _ticks() -> Iterator[None]:
    next_s = time.monotonic()
    while True:
        yield
        next_s = max(next_s + _EVERY_S, time.monotonic() + _EVERY_S / 5)
        time.sleep(max(0.0, next_s - time.monotonic()))


def _end_with_parent() -> None:
    """Whoever started us holds the other end; nothing more comes from there."""
    sys.stdin.buffer.read()
    os._exit(0)


def _follow(observer: Observer) -> None:
    try:
        observer.follow()
    except ConfigurationError as error:
        log.error("nobody judges for the dashboard: %s", error)  # noqa: TRY400 - a sentence says it
    except BaseException:
        log.exception("the followers behind the dashboard failed")
    finally:
        os._exit(1)  # without it the figures would stand still, and nobody would know


def _set_up_log(settings: Settings) -> None:
    """As the worker's, whose stderr is ours: whoever reads it by machine reads each line."""
    if wants_json(settings.log_format):
        logging.config.dictConfig(configuration(logging.WARNING, None))
        sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    log.critical("the observer behind the dashboard failed", exc_info=(kind, error, traceback))


def main() -> None:
    """Observe until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, with which we end
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    task: Task = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started us
    _set_up_log(task.settings)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    observer = Observer(task)
    threading.Thread(target=_follow, args=(observer,), name="follow", daemon=True).start()
    # The parent may be gone before we hear of it.
    with contextlib.suppress(BrokenPipeError):
        for _ in _ticks():
            sys.stdout.buffer.write(msgspec.json.encode(observer.look()) + b"\n")
            sys.stdout.buffer.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
