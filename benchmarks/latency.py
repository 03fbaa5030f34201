"""Latency of the bare app at a steady rate: one process writes the input and reads the output, by one clock.

A record's time runs from its `produce` to the moment when a read_committed consumer hands out its output. Records leave in
bursts of a few milliseconds, and wait for nobody: a worker that falls behind finds more and more of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import NamedTuple

from confluent_kafka import OFFSET_END, KafkaException

from benchmarks.entries import Entries
from benchmarks.figures import percentile
from benchmarks.run import Run
from streams_app.supervisor import WorkerProcess

_WARM_UP_S = 3.0
#: The reader waits that long for more outputs: long enough not to busy the CPU, shorter than anything worth measuring.
_TICK_S = 0.002
#: For outputs that are late, before they count as missing.
_LATE_S = 30.0
_ACCOUNTS = 10_000


class Latency(NamedTuple):
    """Of the outputs that were read; missing and repeated of all that were sent."""

    p50_ms: float
    p99_ms: float
    p999_ms: float
    sent: int
    missing: int
    repeated: int


def latency(
    run: Run,
    worker: WorkerProcess,
    *,
    rate: int,
    seconds: float,
    first: int = 0,
    meanwhile: Callable[[float], None] = lambda elapsed_s: None,
) -> Latency:
    """Send entries with ids from ``first`` on; outputs of lower ids do not count, nor those of the first moments.

    ``meanwhile`` is called at every tick with the time since the end of the warm-up, which is below zero before it.
    """
    records = list(Entries(int(rate * (_WARM_UP_S + seconds)), _ACCOUNTS, first).records())
    warm_up = int(rate * _WARM_UP_S)
    sent_s: list[float] = []
    took_s: dict[int, float] = {}
    repeated = 0
    producer = run.producer(**{"linger.ms": 0})
    producer.list_topics(timeout=10)
    consumer = run.reader("latency")
    try:
        outputs_from = run.partitions_of("outputs")
        for tp in outputs_from:
            tp.offset = OFFSET_END
        consumer.assign(outputs_from)
        consumer.poll(1.0)
        started_s = time.perf_counter()
        until_s = started_s + _WARM_UP_S + seconds + _LATE_S
        while len(took_s) < len(records) and time.perf_counter() < until_s:
            if not worker.alive:
                raise SystemExit(f"{worker.name} ended:\n{worker.last_lines()}")
            elapsed_s = time.perf_counter() - started_s
            meanwhile(elapsed_s - _WARM_UP_S)
            for key, value in records[len(sent_s) : int(elapsed_s * rate)]:
                sent_s.append(time.perf_counter())
                producer.produce(f"{run.prefix}entries", value, key)
            producer.poll(0)
            outputs = consumer.consume(1_000, _TICK_S)
            read_s = time.perf_counter()
            for message in outputs:
                if message.error():
                    raise KafkaException(message.error())
                number = json.loads(message.value() or b"")["id"] - first
                if number in took_s:
                    repeated += 1
                elif number >= 0:
                    took_s[number] = read_s - sent_s[number]
    finally:
        consumer.close()
        producer.purge()
    counted = sorted(took for number, took in took_s.items() if number >= warm_up)
    if not counted:
        raise SystemExit(f"{worker.name} gave no output in time:\n{worker.last_lines()}")
    p50_ms, p99_ms, p999_ms = (1000 * percentile(counted, share) for share in (0.5, 0.99, 0.999))
    return Latency(p50_ms, p99_ms, p999_ms, len(sent_s), len(sent_s) - len(took_s), repeated)
