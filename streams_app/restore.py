"""Restore: bringing a store from its checkpoint to the end of its changelog.

Runs in a thread and an event loop of its own, so that heartbeats go on. Reads committed records only, up to the *high
watermark* at the start: behind an open transaction the reading waits until that has ended, with a deadline on no progress.
"Last record = end − 1" would never come true, as transaction markers take offsets too: positions are compared, and only
what was applied, never what was merely fetched, becomes a checkpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from streams_app.errors import KafkaUnreachable
from streams_app.faust_adapter import end_consumer
from streams_app.store import Restored, Store

TP = tuple[str, int]

_CHUNK_RECORDS = 20_000
_NO_PROGRESS_S = 90.0
_POLL_MS = 200


def restore(
    config: Mapping[str, Any],
    stores: Mapping[TP, Store],
    starts: Mapping[TP, int],
    ends: Mapping[TP, int],
    on_progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> None:
    """Read the changelogs ``starts[tp] … ends[tp]`` into their stores; blocks. ``config`` is aiokafka's.

    Returns early when ``cancelled()`` says so; what was applied by then is kept, with its checkpoint.

    Raises:
        KafkaUnreachable: no progress within the deadline.
    """
    behind = {tp for tp in stores if starts[tp] < ends[tp]}
    if behind:
        asyncio.run(_restore(config, stores, {tp: starts[tp] for tp in behind}, ends, on_progress, cancelled))
    for store in stores.values():
        store.finish_restore()


async def _restore(
    config: Mapping[str, Any],
    stores: Mapping[TP, Store],
    starts: Mapping[TP, int],
    ends: Mapping[TP, int],
    on_progress: Callable[[int], None],
    cancelled: Callable[[], bool],
) -> None:
    partitions = {TopicPartition(*tp): tp for tp in starts}
    consumer = AIOKafkaConsumer(
        **config,
        group_id=None,
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        consumer.assign(list(partitions))
        for partition, tp in partitions.items():
            consumer.seek(partition, starts[tp])
        deadline_s = time.monotonic() + _NO_PROGRESS_S
        while partitions and not cancelled():
            records = await consumer.getmany(*partitions, timeout_ms=_POLL_MS, max_records=_CHUNK_RECORDS)
            for partition, chunk in records.items():
                _apply(stores[partitions[partition]], chunk)
                on_progress(len(chunk))
            finished = []
            for partition, tp in partitions.items():
                if await consumer.position(partition) >= ends[tp]:
                    finished.append(partition)
            if records or finished:
                deadline_s = time.monotonic() + _NO_PROGRESS_S
            for partition in finished:
                # Pausing keeps the fetcher from reading what is written behind the end in the meantime.
                consumer.pause(partition)
                del partitions[partition]
            if time.monotonic() > deadline_s:
                raise KafkaUnreachable(
                    f"restore of {sorted(partitions.values())} made no progress for {_NO_PROGRESS_S:g} s"
                )
    finally:
        await end_consumer(consumer)


def _apply(store: Store, chunk: Sequence[ConsumerRecord]) -> None:
    store.restore([Restored(record.key, record.value, record.timestamp) for record in chunk], chunk[-1].offset)
