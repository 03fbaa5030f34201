"""Restore: bringing a store from its checkpoint to the end of its changelog.

Reads committed records only, up to the *high watermark* at the start: behind an open transaction the reading waits until that
has ended, with a deadline on no progress. "Last record = end − 1" would never come true, as transaction markers take offsets
too: the reader is asked where it found the end for now. Only what was applied, never what was merely fetched, becomes a
checkpoint.

librdkafka fetches and decompresses in threads of its own, outside of Python's lock; what is done here is done for whole runs
of records of one partition.
"""

from __future__ import annotations

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
_CHUNK_RECORDS, _CHUNK_S = 20_000, 0.02
_NO_PROGRESS_S = 90.0
#: How changelogs are read.
READER = {
    "group.id": "streams-app-restore",  # the client wants one; nothing is ever committed for it
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
_topic, _partition = methodcaller("topic"), methodcaller("partition")
_key, _value, _timestamp = methodcaller("key"), methodcaller("value"), methodcaller("timestamp")


def restore(
    config: Mapping[str, Any],
    stores: Mapping[TP, Store],
    starts: Mapping[TP, int],
    ends: Mapping[TP, int],
    on_progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Read the changelogs ``starts[tp] … ends[tp]`` into their stores; blocks. ``config`` is librdkafka's.

    Returns early when ``cancelled()`` says so; what was applied by then is kept, with its checkpoint.

    Raises:
        KafkaUnreachable: no progress within the deadline.
        KafkaException: a partition cannot be read.
    """
    behind = {tp for tp in stores if starts[tp] < ends[tp]}
    if behind:
        reader = Consumer({**config, **READER})
        try:
            reader.assign([TopicPartition(*tp, starts[tp]) for tp in behind])
            _read(reader, stores, behind, ends, on_progress, cancelled)
        finally:
            discard(reader, "close")
    for store in stores.values():
        store.finish_restore()


def _read(
    reader: Consumer,
    stores: Mapping[TP, Store],
    behind: set[TP],
    ends: Mapping[TP, int],
    on_progress: Callable[[int], None],
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
            on_progress(len(run))
        for tp, end in map(ended, reports):
            if end >= ends[tp]:
                behind.discard(tp)
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
