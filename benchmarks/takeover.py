"""A worker is killed, and another one takes its partitions over: with a standby, which has their tables, and without.

Two workers share a table. When the standby is complete, one worker is killed, and events are written to all partitions.
Measured is the time from the kill until a read_committed reader has the last one's output. The session of the killed worker
(``STREAMS_APP_SESSION_TIMEOUT_MS``) is the most of it: nobody may work on its partitions before that is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from confluent_kafka import Consumer, KafkaException

from benchmarks.bench import Bench, Sample
from benchmarks.engines import OURS
from benchmarks.entries import Entries, amount_of, decode
from benchmarks.progress import Progress
from benchmarks.restore import filled, seek_to_end
from benchmarks.run import Run
from streams_app.supervisor import Supervisor, WorkerProcess

#: Said by a worker: its own partitions are ready, and it has caught up with those that it may have to take over.
_STARTED, _FOLLOWS = "partitions started", "others are followed to their ends"
_DEADLINE_S = 180.0
#: So many that each partition has some.
_EVENTS = 64


def takeover(bench: Bench) -> Iterator[Sample]:
    """Rounds with a standby and without one."""
    keys = bench.scale.restored_keys
    run = filled(bench, OURS)
    for number in range(bench.scale.rounds):
        for turn, standbys in enumerate(("1", "0")):
            run.forget_tables()
            case = f"{keys:,} keys, {'a' if standbys == '1' else 'no'} standby"
            figures = _killed(run, keys, 2 * number + turn, standbys)
            yield Sample("takeover", case, OURS.name, number, figures)
    run.delete()


def _killed(run: Run, keys: int, turn: int, standbys: str) -> dict[str, float]:
    engine = replace(OURS, env={**OURS.env, "STREAMS_APP_STANDBY_REPLICAS": standbys})
    workers = [engine.worker(run, name) for name in ("one", "two")]
    reader = run.reader("takeover")
    try:
        with Supervisor(workers) as supervisor:
            supervisor.start()
            for worker in workers:
                _wait_for(worker, _FOLLOWS if standbys == "1" else _STARTED)
            Progress(run, workers, OURS.group, ["entries"], ["outputs"]).settle()
            seek_to_end(reader, run)
            workers[0].kill()
            killed_s = time.monotonic()
            entries = Entries(_EVENTS, keys, turn * _EVENTS, in_turn=True)
            run.fill("entries", entries.records())
            wrong = _wrong(reader, workers[1], entries)
            return {"takeover_s": time.monotonic() - killed_s, "wrong": wrong}
    finally:
        reader.close()
        for worker in workers:
            worker.log.unlink(missing_ok=True)


def _wait_for(worker: WorkerProcess, said: str) -> None:
    deadline_s = time.monotonic() + _DEADLINE_S
    while not worker.said(said):
        if not worker.alive or time.monotonic() > deadline_s:
            raise SystemExit(f"{worker.name} did not say {said!r}:\n{worker.last_lines()}")
        time.sleep(0.1)


def _wrong(reader: Consumer, worker: WorkerProcess, entries: Entries) -> int:
    """Wait for the outputs of all ``entries``, the second ones of their accounts; how many are wrong."""
    waiting = dict.fromkeys(range(entries.first, entries.first + entries.count))
    wrong, deadline_s = 0, time.monotonic() + _DEADLINE_S
    while waiting:
        message = reader.poll(0.01)
        if message is not None:
            if message.error():
                raise KafkaException(message.error())
            output = decode(message.value() or b"")
            wrong += output.id not in waiting or output.balance != 2 * amount_of(output.id)
            waiting.pop(output.id, None)
        if not worker.alive or time.monotonic() > deadline_s:
            raise SystemExit(f"{worker.name} did not take over:\n{worker.last_lines()}")
    return wrong
