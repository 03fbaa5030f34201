"""Start with a table: restored from its changelog, or kept; ours and Kafka Streams.

Each engine's table is filled once, by work. Then, round by round, one event lies ready and a worker starts without the files
of its tables, ends tidily, and starts again with them. Measured are the records restored per second, by each engine's own
word (from the first partition's restore to the last one's end), and for both starts the time from the start of the process
until a read_committed reader has the event's output, which needs nobody's word.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

from confluent_kafka import Consumer, KafkaException

from benchmarks.bench import Bench, Sample
from benchmarks.engines import KAFKA_STREAMS, OURS, Engine
from benchmarks.entries import Balance, Entries, amount_of, decode
from benchmarks.figures import rotated
from benchmarks.progress import Progress
from benchmarks.run import Run
from streams_app.supervisor import Supervisor, WorkerProcess

#: Our log line, and that of Bare.java.
RESTORED = re.compile(r"([\d,]+) records restored in ([\d.]+) s")
_DEADLINE_S = 120.0


def restore(bench: Bench) -> Iterator[Sample]:
    """Rounds of both engines, without tables and with them."""
    keys = bench.scale.restored_keys
    tables = [(engine, filled(bench, engine)) for engine in (OURS, KAFKA_STREAMS) if engine in bench.engines]
    for number in range(bench.scale.rounds):
        for engine, run in rotated(tables, number):
            run.forget_tables()
            restored = _start(engine, run, keys, 2 * number)
            yield Sample("restore", f"{keys:,} keys restored", engine.name, number, restored)
            kept = _start(engine, run, keys, 2 * number + 1)
            del kept["records_per_s"]  # the tail that a worker with its tables reads is a few records, or none
            yield Sample("restore", f"{keys:,} keys kept", engine.name, number, kept)
    for _, run in tables:
        run.delete()


def filled(bench: Bench, engine: Engine) -> Run:
    """A run whose table has one record for each key in its changelog, or a few more."""
    keys = bench.scale.restored_keys
    run = Run(bench.kafka, bench.folder)
    run.create_topics("entries", "outputs")
    run.fill("entries", Entries(keys, keys, in_turn=True).records())
    worker = engine.worker(run)
    with Supervisor([worker]) as supervisor:
        supervisor.start()
        Progress(run, [worker], engine.group, ["entries"], ["outputs"]).drain(keys)
    return run


def _start(engine: Engine, run: Run, keys: int, start: int) -> dict[str, float]:
    """Figures of the ``start``-th start of a worker, from 0; the event that lies ready is that account's second one."""
    worker = engine.worker(run)
    reader = run.reader("first-event")
    try:
        seek_to_end(reader, run)
        run.fill("entries", Entries(1, keys, start, in_turn=True).records())
        with Supervisor([worker]) as supervisor:
            started_s = time.monotonic()
            supervisor.start()
            output = _first_output(reader, worker)
            first_event_s = time.monotonic() - started_s
            Progress(run, [worker], engine.group, ["entries"], ["outputs"]).settle()
    finally:
        reader.close()
    expected = Balance(start, f"account-{start}", 2 * amount_of(start))
    said = RESTORED.findall(worker.log.read_text())
    found = [(int(records.replace(",", "")), float(seconds)) for records, seconds in said]
    records, seconds = max(found, default=(0, 1.0))
    worker.log.unlink()
    return {"first_event_s": first_event_s, "records_per_s": records / seconds, "wrong": int(output != expected)}


def seek_to_end(reader: Consumer, run: Run) -> None:
    """From now on it reads what is new."""
    outputs = run.partitions_of("outputs")
    for tp in outputs:
        tp.offset = reader.get_watermark_offsets(tp, timeout=10)[1]
    reader.assign(outputs)


def _first_output(reader: Consumer, worker: WorkerProcess) -> Balance:
    deadline_s = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline_s and worker.alive:
        message = reader.poll(0.01)
        if message is not None:
            if message.error():
                raise KafkaException(message.error())
            return decode(message.value() or b"")
    raise SystemExit(f"{worker.name} gave no output (exit code {worker.exit_code}):\n{worker.last_lines()}")
