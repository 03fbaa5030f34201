"""Restore: bringing a store from its checkpoint to the end of its changelog.

Reads committed records only, up to the *high watermark* at the start: behind an open transaction the reading waits until that
has ended, with a deadline on no progress. "Last record = end − 1" would never come true, as transaction markers take offsets
too: the reader is asked where it found the end for now. Only what was applied, never what was merely fetched, becomes a
checkpoint.

librdkafka fetches and decompresses in threads of its own, outside of Python's lock; what is done here is done for whole runs
of records of one partition.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import methodcaller
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from streams_app.deadlines import discard
from streams_app.errors import KafkaUnreachable
from streams_app.store import Store

TP = tuple[str, int]

#: So many at most, or what came within that time.
_CHUNK_RECORDS, _CHUNK_S = 2_000, 0.02
_NO_PROGRESS_S = 90.0
#: How changelogs are read, with the app's own ``group.id``: the client wants one, and an ACL permits no other. It is not
#: joined, and nothing is committed for it.
READER = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "isolation.level": "read_committed",
    "auto.offset.reset": "earliest",
    # The end of a partition is told when the broker has waited that long for more.
    "fetch.wait.max.ms": 10,
    # Bounded, and filled up again as soon as there is room: by default only a second later.
    "queued.max.messages.kbytes": 32_768,
    "fetch.queue.backoff.ms": 10,
}
#: So often the log says how far it is.
_TOLD_EVERY_S = 5.0
#: What was measured in less says little of what is to come.
_LEAST_MEASURED_S = 0.5
log = logging.getLogger(__name__)
_topic, _partition = methodcaller("topic"), methodcaller("partition")
_key, _value, _timestamp = methodcaller("key"), methodcaller("value"), methodcaller("timestamp")


class Restoring:
    """How far the restore is, and how long still. Written by its thread, read by any; the numbers are of one another's look.

    Counted in offsets, as where the end is known by: compaction leaves fewer records than offsets.
    """

    def __init__(self) -> None:
        #: Offsets to go through, of all partitions; 0: there is nothing to restore.
        self.total = 0
        self.done = 0
        #: Records that were in there.
        self.records = 0
        #: By the monotonic clock; None: no restore is under way.
        self.began_s: float | None = None
        self._told_s = 0.0

    @property
    def remaining_s(self) -> float | None:
        """How long still, going on as up to now; None: not known yet, or no restore is under way."""
        began_s, done = self.began_s, self.done
        took_s = 0.0 if began_s is None else time.monotonic() - began_s
        if not done or took_s < _LEAST_MEASURED_S:
            return None
        return max(0, self.total - done) * took_s / done

    @property
    def text(self) -> str:
        """For people."""
        percent = 100 * self.done // self.total if self.total else 100
        remaining_s = self.remaining_s
        still = "" if remaining_s is None else f", about {remaining_s:.0f} s to go"
        return f"{self.done:,} of {self.total:,} changelog offsets restored ({percent} %){still}"

    def begin(self, starts: Mapping[TP, int], ends: Mapping[TP, int]) -> None:
        """From ``starts`` to ``ends``."""
        behind = [ends[tp] - start for tp, start in starts.items() if start < ends[tp]]
        self.total, self.done, self.records = sum(behind), 0, 0
        self._told_s = time.monotonic()
        self.began_s = self._told_s if behind else None
        if behind:
            log.info("restoring %d partitions of tables: %s changelog offsets", len(behind), f"{self.total:,}")

    def applied(self, records: int, offsets: int) -> None:
        """So many more."""
        self.records += records
        self.done += offsets
        now_s = time.monotonic()
        if now_s - self._told_s > _TOLD_EVERY_S:
            self._told_s = now_s
            log.info("%s", self.text)

    def end(self) -> None:
        """It is over, one way or another."""
        if self.began_s is not None:
            log.info("%s records restored in %.2f s", f"{self.records:,}", time.monotonic() - self.began_s)
        self.began_s = None


def restore(
    config: Mapping[str, Any],
    stores: Mapping[TP, Store],
    starts: Mapping[TP, int],
    ends: Mapping[TP, int],
    progress: Restoring,
    cancelled: Callable[[], bool],
) -> None:
    """Read the changelogs ``starts[tp] … ends[tp]`` into their stores; blocks. ``config`` is librdkafka's, with a group.

    Returns early when ``cancelled()`` says so; what was applied by then is kept, with its checkpoint.

    Raises:
        KafkaUnreachable: no progress within the deadline.
        KafkaException: a partition cannot be read.
    """
    behind = {tp for tp in stores if starts[tp] < ends[tp]}
    progress.begin(starts, ends)
    try:
        if behind:
            reader = Consumer({**config, **READER})
            try:
                reader.assign([TopicPartition(*tp, starts[tp]) for tp in behind])
                _read(reader, stores, {tp: starts[tp] for tp in behind}, ends, progress, cancelled)
            finally:
                discard(reader, "close")
        for store in stores.values():
            store.finish_restore()
    finally:
        progress.end()


def _read(
    reader: Consumer,
    stores: Mapping[TP, Store],
    behind: dict[TP, int],
    ends: Mapping[TP, int],
    progress: Restoring,
    cancelled: Callable[[], bool],
) -> None:
    deadline_s = time.monotonic() + _NO_PROGRESS_S
    while behind and not cancelled():
        messages = reader.consume(_CHUNK_RECORDS, _CHUNK_S)
        records: list[Message] = []
        reports: list[Message] = []
        for message in messages:
            (records if message.error() is None else reports).append(message)
        for tp, run in runs(records):
            apply(stores[tp], run)
            if tp in behind:
                at = (run[-1].offset() or 0) + 1
                progress.applied(len(run), min(at, ends[tp]) - min(behind[tp], ends[tp]))
                behind[tp] = at
        for tp, end in map(ended, reports):
            if end >= ends[tp]:
                at = behind.pop(tp, ends[tp])
                progress.applied(0, ends[tp] - min(at, ends[tp]))
        if messages:
            deadline_s = time.monotonic() + _NO_PROGRESS_S
        elif time.monotonic() > deadline_s:
            raise KafkaUnreachable(f"restore of {sorted(behind)} made no progress for {_NO_PROGRESS_S:g} s")


def runs(records: Sequence[Message]) -> Iterator[tuple[TP, list[Message]]]:
    """Records that came one behind the other from one partition."""
    for partition, of_partitions in groupby(records, _partition):
        for topic, of_topic in groupby(of_partitions, _topic):
            yield (topic, partition), list(of_topic)


def ended(report: Message) -> tuple[TP, int]:
    """The partition of which there is no more for now, and where it ends."""
    error, topic, partition, offset = report.error(), report.topic(), report.partition(), report.offset()
    is_end = error is not None and error.code() == KafkaError._PARTITION_EOF
    if not is_end or topic is None or partition is None or offset is None:
        raise KafkaException(error)
    return (topic, partition), offset


def apply(store: Store, records: Sequence[Message]) -> None:
    """Bring records of its changelog, one behind the other, into a store."""
    timestamps_ms = (
        [timestamp_ms for _, timestamp_ms in map(_timestamp, records)] if store.expires_ms is not None else ()
    )
    offset = records[-1].offset()
    assert offset is not None
    store.restore(map(_key, records), map(_value, records), timestamps_ms, offset)
