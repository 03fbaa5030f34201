"""How far a run is, and what it takes: the clock of all figures of throughput, the same for every engine.

Input lies ready, or is written faster than it is read. Every 25 ms the *committed ends* of the output topics are asked for
(the last stable offsets: what a read_committed reader could read). That needs nothing of the engine, depends on nobody's
word that it is ready, counts nothing that is not committed, and costs one request, where a reader would take a part of the
same two cores. The first fifth of the outputs is warm-up: start-up, the first fetches, the compiler of a Java engine. The
rate is that of the rest: the outputs between two moments at which they were seen to be committed, by the time between.
(Timestamps that the broker gives at the append would not do: who writes early and commits late would begin early.)

Transactions put a marker into each partition, so offsets are a little more than records: a share of the offsets is taken for
the same share of the records. It is over when the engine has committed the last offset of its input and the ends stand still.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple

import psutil
from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec

from benchmarks.run import Run
from streams_app.supervisor import WorkerProcess

#: Share of the outputs that comes before the time counts.
WARM_UP = 0.2
_LOOK_S = 0.025
#: After a commit interval and a commit without one, nothing is in hand, or an engine is stuck.
_STILL_S = 0.5
_ANSWER_S = 30.0
#: Without any progress; a start, with a restore, takes a few seconds.
_NO_PROGRESS_S = 120.0


class Look(NamedTuple):
    """What was seen at a moment."""

    at_s: float
    #: Sum of the outputs' committed ends.
    ends: int
    #: Processor time so far, of all workers and of the broker.
    worker_cpu_s: float
    broker_cpu_s: float
    #: Of all workers, resident.
    rss_bytes: int


class Drained(NamedTuple):
    """What it took to work through an input, without its first fifth."""

    events: float
    seconds: float
    worker_cpu_s: float
    broker_cpu_s: float
    #: The most that was seen.
    rss_bytes: int

    @property
    def figures(self) -> dict[str, float]:
        """By event, with units."""
        return {
            "events_per_s": self.events / self.seconds,
            "worker_us": 1e6 * self.worker_cpu_s / self.events,
            "broker_us": 1e6 * self.broker_cpu_s / self.events,
            "rss_mb": self.rss_bytes / 1e6,
        }


class Progress:
    """Of the workers of one run that read ``inputs`` as ``group`` and write ``outputs``; names without prefix."""

    def __init__(
        self, run: Run, workers: Sequence[WorkerProcess], group: str, inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        self._run = run
        self._workers = workers
        self._group = group
        self._inputs = run.partitions_of(*inputs)
        self._outputs = run.partitions_of(*outputs)
        self._processes: list[psutil.Process] = []

    def ends(self) -> dict[tuple[str, int], int]:
        """The committed end of every partition of the outputs."""
        return _ends(self._run, self._outputs)

    def settle(self) -> None:
        """Wait until the group has committed all that lies in its input."""
        with closing(self._run.reader(self._group)) as reader:
            wait_until(lambda: self._input_is_done(reader), self._workers[0])

    def drain(self, events: int, before: int = 0) -> Drained:
        """Wait until ``events`` more outputs are committed than when the ends summed up to ``before``."""
        self._processes = [psutil.Process(worker.pid) for worker in self._workers]
        looks = [self._look()]
        with closing(self._run.reader(self._group)) as reader:
            while True:
                self._watch(looks, lambda now: now.ends - before >= events and now.at_s - looks[-1].at_s >= _STILL_S)
                # Asked only now: an engine's offsets, while it commits them, would keep us from looking.
                if self._input_is_done(reader) and self._look().ends == looks[-1].ends:
                    return summary(looks, events, before)

    def _watch(self, looks: list[Look], done: Callable[[Look], bool]) -> None:
        """Look until ``done``; of looks at which nothing had moved, the first one is kept."""
        while True:
            time.sleep(_LOOK_S)
            ended = [worker for worker in self._workers if not worker.alive]
            if ended or time.monotonic() - looks[-1].at_s > _NO_PROGRESS_S:
                worker = (ended or self._workers)[0]
                raise SystemExit(f"{worker.name} did not finish (exit code {worker.exit_code}):\n{worker.last_lines()}")
            look = self._look()
            if look.ends != looks[-1].ends:
                looks.append(look)
            elif look.rss_bytes > looks[-1].rss_bytes:
                looks[-1] = looks[-1]._replace(rss_bytes=look.rss_bytes)
            if done(look):
                return

    def _look(self) -> Look:
        ends = sum(self.ends().values())
        broker = psutil.Process(self._run.kafka.brokers[0].pid)
        return Look(
            time.monotonic(),
            ends,
            sum(_cpu_s(process) for process in self._processes),
            _cpu_s(broker),
            sum(process.memory_info().rss for process in self._processes),
        )

    def _input_is_done(self, reader: Consumer) -> bool:
        """Whether the group has committed all that lies in its input."""
        return _committed(reader, self._inputs) >= sum(_ends(self._run, self._inputs).values())


def summary(looks: Sequence[Look], events: int, before: int) -> Drained:
    """Of the looks from the last one within the warm-up to the first one that saw everything.

    Where there was no look between (few events, all committed at once) the time runs from the first look on. Where input is
    written to workers that run already, the first look is at its end, whatever they have done by then.
    """
    last = looks[-1].ends
    end = next(look for look in looks if look.ends == last)
    begin = next(look for look in looks if look.ends - before >= WARM_UP * (last - before))
    if begin is end:
        begin = looks[0]
    if begin is end:
        raise SystemExit(f"{events:,} events were through before anybody looked: take more")
    return Drained(
        events * (end.ends - begin.ends) / (last - before),
        end.at_s - begin.at_s,
        end.worker_cpu_s - begin.worker_cpu_s,
        end.broker_cpu_s - begin.broker_cpu_s,
        max(look.rss_bytes for look in looks),
    )


def _ends(run: Run, partitions: Sequence[TopicPartition]) -> dict[tuple[str, int], int]:
    """Committed ends by topic and partition; a topic that is being made has no leader for a moment."""
    deadline_s = time.monotonic() + _ANSWER_S
    while True:
        found = run.admin.list_offsets(
            {tp: OffsetSpec.latest() for tp in partitions},
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=10,
        )
        try:
            return {(tp.topic, tp.partition): future.result(15).offset for tp, future in found.items()}
        except KafkaException as error:
            if not _may_pass(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(_LOOK_S)


def _committed(group: Consumer, partitions: list[TopicPartition]) -> int:
    """Sum of the committed offsets; 0 as long as the group's coordinator is being made."""
    try:
        return sum(max(0, tp.offset) for tp in group.committed(partitions, timeout=10))
    except KafkaException as error:
        if _may_pass(error):
            return 0
        raise


def _may_pass(error: KafkaException) -> bool:
    passing = (KafkaError.NOT_COORDINATOR, KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError._TIMED_OUT)
    return error.args[0].retriable() or error.args[0].code() in passing


def _cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)


def wait_until(holds: Callable[[], bool], worker: WorkerProcess) -> None:
    """Wait for something that ``worker`` does."""
    deadline_s = time.monotonic() + _NO_PROGRESS_S
    while not holds():
        if time.monotonic() > deadline_s or not worker.alive:
            raise SystemExit(f"{worker.name} is not ready (exit code {worker.exit_code}):\n{worker.last_lines()}")
        time.sleep(_LOOK_S)
