"""Replicas: stores that follow the changelogs of partitions which somebody else writes.

One thing with two uses: the standby of a partition, which takes over without a restore; and the copy of a table that every
worker reads (`App.GlobalTable`, `App.follow`). Committed records only, so a replica is a store like any other: what is in it
is true, and its checkpoint says up to where.

::

    engine ── exchange(returned, owned, standbys) ──> its stores of what it owns now    blocks: between two looks
           ── follow() ──> what is left is followed from its checkpoints on             when its own tables are restored

A store has one writer. It changes hands as a whole, in `exchange`: before, only this module's thread writes it, and after,
only the engine's. What could break it, and what keeps it whole:

- records that were fetched before a store was given away arrive when it is back, behind what its owner wrote meanwhile: a
  record at or below the checkpoint is never applied, the reader begins anew at the checkpoints;
- the changelog was deleted and created anew: the reader, out of range, is set back to the beginning, which is the same;
- the process dies: what was not on disk yet is read again, as checkpoint and values go there together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from streams_app.deadlines import discard
from streams_app.errors import KafkaUnreachable, PartitionsLost, StoreCorrupted, StoreFailed
from streams_app.logs import about
from streams_app.offsets import TP, Offsets
from streams_app.restore import READER, apply, ended, runs
from streams_app.start import trusted_start
from streams_app.store import Store

if TYPE_CHECKING:
    from streams_app.application import App

log = logging.getLogger(__name__)

#: A look takes that many records, or those of that time: so old are the values of a copy, and so long waits an exchange.
_LOOK_RECORDS, _LOOK_S = 20_000, 0.1
_RETRY_S = 5.0
#: Whoever was cut off from the brokers, or asleep, for longer than tombstones are kept has missed deletions: so often the
#: checkpoints are tried anew, and those at the end of their changelog confirmed.
_REOPENED_EVERY_S = 3600.0
_NO_PROGRESS_S = 90.0


def hide(app: App, tp: TP) -> None:
    """Let no table of the app be read from the store of a changelog partition, whether it counts as its own or as a copy."""
    for table in app.transactional_tables():
        if table.changelog_topic_name == tp[0]:
            table.data.hide(tp[1])


class _WentBack(Exception):
    """A record came that lies at or below the checkpoint."""


class Replicas:
    """The replicas of one app in this process; see the module."""

    def __init__(self, app: App) -> None:
        self._app = app
        tell = partial(about, guarantee=app.guarantee)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replicas", initializer=tell)
        self._stores: dict[TP, Store] = {}
        self._standbys: frozenset[TP] = frozenset()
        self._owned: frozenset[TP] = frozenset()
        #: What is followed; None: not known since the last exchange. While a reader is opened anew, that is not forgotten:
        #: the copies go on answering, as of when they were read last.
        self._followed: frozenset[TP] | None = None
        #: Those that were at the end of their changelog once.
        self._current: set[TP] = set()
        self._reader: Consumer | None = None
        self._opened_s = 0.0
        self._reopened_every_s = _REOPENED_EVERY_S
        self._retry_at_s = 0.0
        #: When they were read last.
        self._read_s = 0.0
        self._paused, self._turning, self._closed = True, False, False
        #: Records applied, for whoever waits for progress.
        self.records = 0
        #: Of the changelogs that are copied.
        self.partition_counts: Mapping[str, int] = {}

    # -- Called by others.

    @property
    def is_current(self) -> bool:
        """Whether all that is followed was at the end of its changelog."""
        return self._followed is not None and self._current.issuperset(self._followed)

    @property
    def stores(self) -> Mapping[TP, Store]:
        """By changelog partition; for whoever wants to know how large they are."""
        return dict(self._stores)  # in one step: the thread opens and closes them

    def exchange(
        self, returned: Mapping[TP, Store], owned: Collection[TP], standbys: Collection[TP]
    ) -> dict[TP, Store]:
        """Take over the stores that the engine has ``returned``, and give it those of what it owns now; blocks."""
        return self._thread.submit(self._exchange, returned, frozenset(owned), frozenset(standbys)).result()

    def follow(self) -> None:
        """Go on, from the checkpoints, with what there is to follow by now."""
        self._submit(self._follow)

    def wait_for_copies(self, cancelled: Callable[[], bool]) -> None:
        """Wait until every copy that agents read was at the end of its changelog.

        Raises:
            PartitionsLost: ``cancelled()`` says that nobody waits for it any more.
            KafkaUnreachable: no progress for too long.
        """
        topics = {table.changelog_topic_name for table in self._app.transactional_tables() if table.is_everywhere}
        seen, deadline_s = self.records, time.monotonic() + _NO_PROGRESS_S
        while topics and not self._are_current(topics):
            if cancelled():
                raise PartitionsLost("the assignment ended while global tables were being read")
            if self.records != seen:
                seen, deadline_s = self.records, time.monotonic() + _NO_PROGRESS_S
            if time.monotonic() > deadline_s:
                raise KafkaUnreachable(f"the changelogs {sorted(topics)} could not be read for {_NO_PROGRESS_S:g} s")
            time.sleep(_LOOK_S / 4)

    def close(self) -> None:
        """Stop following, and give the files back; blocks."""
        if not self._closed:
            self._thread.submit(self._close).result()
            self._thread.shutdown()

    # -- In the thread.

    def _submit(self, function: Callable[[], None]) -> None:
        self._thread.submit(function).add_done_callback(self._check)

    def _check(self, done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            log.error("following changelogs failed", exc_info=error)
            asyncio.run_coroutine_threadsafe(self._app.crash(error), self._app.loop)

    def _exchange(self, returned: Mapping[TP, Store], owned: frozenset[TP], standbys: frozenset[TP]) -> dict[TP, Store]:
        self._end_reader()
        self._followed = None
        self._paused, self._owned, self._standbys = True, owned, standbys
        # Not current yet, as their start may have been broken off amid the restore: only when their end was seen.
        self._stores.update(returned)
        self._show()
        given = {tp: self._stores.pop(tp) for tp in self._stores.keys() & owned}
        copied = self._copied_topics()
        for tp in [tp for tp in self._stores if tp not in standbys and tp[0] not in copied]:
            self._stores.pop(tp).close()
        self._current &= self._stores.keys()
        return given

    def _follow(self) -> None:
        self._end_reader()
        self._followed = None
        self._retry_at_s = 0.0
        self._paused = False
        if not self._turning:
            self._turning = True
            self._turn()

    def _turn(self) -> None:
        """One look at the changelogs, and ask for the next one: whoever exchanges stores comes between two of them."""
        self._turning = not (self._closed or self._paused) and self._looked()
        if self._turning:
            self._submit(self._turn)

    def _looked(self) -> bool:
        """False: there is nothing to follow."""
        if time.monotonic() < self._retry_at_s:
            time.sleep(_LOOK_S)
            return True
        try:
            if self._reader is None:
                self._reader = self._opened()
            if self._reader is not None:
                self._look(self._reader)
                self._read_s = time.monotonic()
        except (KafkaException, KafkaUnreachable, StoreCorrupted, StoreFailed, _WentBack) as error:
            log.warning("%s: replicas begin anew in %g s, after: %s", self._app.conf.id, _RETRY_S, error)
            self._end_reader()
            unreachable = isinstance(error, (KafkaException, KafkaUnreachable))
            if not unreachable or time.monotonic() - self._read_s > _NO_PROGRESS_S:
                self._followed = None  # it is about a copy, or copies have stood still for too long
            self._retry_at_s = time.monotonic() + _RETRY_S
            return True
        return self._followed is None or bool(self._followed)

    def _look(self, reader: Consumer) -> None:
        records: list[Message] = []
        reports: list[Message] = []
        for message in reader.consume(_LOOK_RECORDS, _LOOK_S):
            (records if message.error() is None else reports).append(message)
        if time.time() - self._opened_s > self._reopened_every_s:
            self._end_reader()
            return
        for tp, run in runs(records):
            self._apply(tp, run)
        at_end = {tp for tp, _ in map(ended, reports)}
        for tp in at_end:
            self._stores[tp].confirm()
        if at_end - self._current:
            self._current |= at_end
            self._show()
            if self._current.issuperset(self._followed or ()):
                log.info(
                    "%s: %d partitions of others are followed to their ends", self._app.conf.id, len(self._current)
                )

    def _apply(self, tp: TP, run: list[Message]) -> None:
        store, first = self._stores[tp], run[0].offset()
        assert first is not None
        if store.checkpoint is not None and first <= store.checkpoint.offset:
            raise _WentBack(
                f"{tp[0]}-{tp[1]} gave the record {first}, its replica has {store.checkpoint.offset} already"
            )
        apply(store, run)
        self.records += len(run)

    def _opened(self) -> Consumer | None:
        """A reader, from the checkpoints on, of all that is to be followed; None: there is nothing."""
        app = self._app
        with contextlib.closing(Offsets(app.kafka.librdkafka(), app.conf.id)) as offsets:
            copied = offsets.partitions(self._copied_topics())
            self.partition_counts = Counter(topic for topic, _ in copied)
            followed = self._standbys | (copied - self._owned)
            topics = {topic for topic, _ in followed}
            topic_ids = offsets.topic_ids(topics)
            kept_ms = offsets.tombstones_kept_ms(topics)
            ends = offsets.high_watermarks(followed)
        for tp in followed - self._stores.keys():
            self._stores[tp] = app.open_store(tp, topic_ids[tp[0]])
        starts = []
        for tp in followed:
            self._stores[tp].topic_id = topic_ids[tp[0]]
            start = trusted_start(self._stores[tp], ends[tp], kept_ms[tp[0]], partial(self._hide, tp))
            starts.append(TopicPartition(*tp, start))
        self._show()
        self._followed = frozenset(followed)
        if not starts:
            return None
        # Well within the time for which a checkpoint is believed; where nobody knows it, all is read again each time.
        known_s = [kept / 4_000 for kept in kept_ms.values() if kept]
        self._reopened_every_s = max(_RETRY_S, min([_REOPENED_EVERY_S, *known_s]))
        self._opened_s = time.time()
        reader = Consumer({**app.kafka.librdkafka(), **READER, "group.id": app.conf.id})
        reader.assign(starts)
        return reader

    def _hide(self, tp: TP) -> None:
        self._current.discard(tp)
        hide(self._app, tp)

    def _show(self) -> None:
        """Let tables be read from the copies that are current. What the engine was given, it shows itself in its time."""
        for table in self._app.transactional_tables():
            if table.is_followed:
                topic = table.changelog_topic_name
                table.data.show(copies={tp[1]: self._stores[tp] for tp in sorted(self._current) if tp[0] == topic})

    def _are_current(self, topics: Collection[str]) -> bool:
        """Whether all copies of the changelogs are; asked from outside of the thread."""
        followed = self._followed
        return followed is not None and all(tp in self._current for tp in followed if tp[0] in topics)

    def _copied_topics(self) -> set[str]:
        return {table.changelog_topic_name for table in self._app.transactional_tables() if table.is_followed}

    def _end_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            discard(reader, "close")

    def _close(self) -> None:
        self._closed = True
        self._end_reader()
        for store in self._stores.values():
            store.close()
        self._stores.clear()
