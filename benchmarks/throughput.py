"""Throughput of the bare app on our engine and on stock Faust, and of the ledger; one broker, one run, in turn.

scripts/bench            three rounds; --quick for one with fewer events
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import NamedTuple
from uuid import uuid4

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from streams_app.embedded import EmbeddedKafka, free_port, shown_progress
from streams_app.generate import Feed, Plan
from streams_app.kafka import KafkaAddress

CHECKOUT = Path(__file__).parent.parent
PARTITIONS = 4
ACCOUNTS = 10_000
DEADLINE_S = 300.0


class Contender(NamedTuple):
    """An app, the input it reads, and its consumer group, without prefix."""

    name: str
    app: str
    group: str
    inputs: tuple[str, ...]
    output: str
    events: int


class Outcome(NamedTuple):
    """One run of a contender."""

    events_per_s: float
    missing: int
    repeated: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, fewer events")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    rounds, share = (1, 4) if options.quick else (options.rounds, 1)
    contenders = [
        Contender("bare, ours", "benchmarks.bare_ours", "bench-ours", ("entries",), "outputs", 600_000 // share),
        Contender(
            "bare, stock Faust", "benchmarks.bare_stock", "bench-stock", ("entries",), "outputs", 30_000 // share
        ),
        Contender(
            "ledger", "streams_app", "streams-app", ("transfers", "credits"), "transfer-results", 200_000 // share
        ),
    ]
    found: dict[str, list[Outcome]] = {contender.name: [] for contender in contenders}
    with (
        tempfile.TemporaryDirectory() as folder,
        shown_progress() as progress,
        EmbeddedKafka.ensure(Path(folder), port=free_port(), progress=progress) as kafka,
    ):
        for number in range(rounds):
            for contender in contenders:
                outcome = measure(contender, kafka.url, Path(folder))
                found[contender.name].append(outcome)
                print(
                    f"round {number + 1}: {contender.name}: {outcome.events_per_s:,.0f} events/s, "
                    f"{outcome.missing} missing, {outcome.repeated} repeated",
                    flush=True,
                )
    report(found, options.json)


def report(found: dict[str, list[Outcome]], file: Path | None) -> None:
    """Medians, and the ratio of each round's pair."""
    for name, outcomes in found.items():
        rates = [outcome.events_per_s for outcome in outcomes]
        print(f"{name:20} median {statistics.median(rates):>10,.0f} events/s  ({min(rates):,.0f} to {max(rates):,.0f})")
    pairs = zip(found["bare, ours"], found["bare, stock Faust"], strict=True)
    ratios = [ours.events_per_s / stock.events_per_s for ours, stock in pairs]
    print(f"{'ours ÷ stock':20} median {statistics.median(ratios):>10.1f}  ({min(ratios):.1f} to {max(ratios):.1f})")
    if file is not None:
        machine = {"python": platform.python_version(), "cores": os.cpu_count()}
        figures = {name: [outcome._asdict() for outcome in outcomes] for name, outcomes in found.items()}
        file.write_text(json.dumps({"machine": machine, "runs": figures, "ours_by_stock": ratios}, indent=2))


def measure(contender: Contender, url: str, folder: Path) -> Outcome:
    """Write the input, then let one worker work through it; the time runs from its first progress to its last."""
    prefix = f"b{uuid4().hex[:8]}-"
    address = KafkaAddress.parse(url)
    env = {
        **os.environ,
        "KAFKA_URL": url,
        "KAFKA_PREFIX": prefix,
        "STREAMS_APP_DATADIR": str(folder / prefix),
        "PYTHONPATH": str(CHECKOUT),
    }
    write_input(contender, address, prefix)
    log = (folder / f"{prefix}.log").open("wb")
    worker = subprocess.Popen(
        [sys.executable, "-m", "faust", "-A", contender.app, "worker", "-l", "info", "--without-web"],
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        rate = watch(contender, address, prefix, worker)
        missing, repeated = compare(contender, address, prefix)
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        log.close()
        shutil.rmtree(folder / prefix, ignore_errors=True)
    return Outcome(rate, missing, repeated)


def write_input(contender: Contender, address: KafkaAddress, prefix: str) -> None:
    names = {
        *contender.inputs,
        contender.output,
        *(("ledger", "dead-letters") if "credits" in contender.inputs else ()),
    }
    new = [NewTopic(prefix + name, PARTITIONS, 1) for name in names]
    admin = AdminClient(address.librdkafka())
    for future in admin.create_topics(new).values():
        future.result(30)
    if contender.inputs[0] == "transfers":
        import agents.ledger_input  # noqa: F401, PLC0415 - registers its generator

        Feed(Plan("transfers", contender.events, keys=ACCOUNTS), address, prefix).run(Event())
        return
    producer = Producer({**address.librdkafka(), "partitioner": "murmur2_random", "linger.ms": 20})
    for key, value in entries(contender.events):
        while True:
            try:
                producer.produce(f"{prefix}entries", value, key)
                break
            except BufferError:
                producer.poll(0.1)
        producer.poll(0)
    assert producer.flush(60) == 0


def entries(count: int) -> Iterator[tuple[bytes, bytes]]:
    chance = random.Random(1)
    for number in range(count):
        account = f"account-{chance.randrange(ACCOUNTS)}"
        entry = {"id": number, "account": account, "amount": chance.randrange(1, 100)}
        yield account.encode(), json.dumps(entry).encode()


def watch(contender: Contender, address: KafkaAddress, prefix: str, worker: subprocess.Popen[bytes]) -> float:
    """Events of the first input per second."""
    group = Consumer({**address.librdkafka(), "group.id": prefix + contender.group})
    try:
        first = [TopicPartition(prefix + contender.inputs[0], p) for p in range(PARTITIONS)]
        others = [TopicPartition(prefix + name, p) for name in contender.inputs[1:] for p in range(PARTITIONS)]
        begun: tuple[float, int] | None = None
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s and worker.poll() is None:
            done = committed(group, first)
            now_s = time.monotonic()
            if done and begun is None:
                begun = now_s, done
            rest = sum(group.get_watermark_offsets(tp, timeout=10)[1] for tp in others)
            rest -= committed(group, others) if others else 0
            if begun and done >= contender.events and rest <= 0:
                return (done - begun[1]) / (now_s - begun[0])
            time.sleep(0.05)
    finally:
        group.close()
    raise SystemExit(f"{contender.name} did not finish: {worker.poll()=}")


def committed(group: Consumer, partitions: list[TopicPartition]) -> int:
    """Sum of the committed offsets; 0 as long as the group's coordinator is being made."""
    try:
        return sum(max(0, tp.offset) for tp in group.committed(partitions, timeout=10))
    except KafkaException as error:
        if error.args[0].retriable() or error.args[0].code() == KafkaError.NOT_COORDINATOR:
            return 0
        raise


def compare(contender: Contender, address: KafkaAddress, prefix: str) -> tuple[int, int]:
    """How many inputs have no committed output, and how many outputs there are too many."""
    topics = [prefix + contender.output] + ([f"{prefix}dead-letters"] if contender.app == "streams_app" else [])
    consumer = Consumer(
        {
            **address.librdkafka(),
            "group.id": "compare",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    seen: Counter[tuple[str, int, object]] = Counter()
    count = 0
    try:
        consumer.assign([TopicPartition(topic, p, 0) for topic in topics for p in range(PARTITIONS)])
        unfinished = PARTITIONS * len(topics)
        while unfinished:
            for message in consumer.consume(10_000, 1.0):
                if message.error():
                    unfinished -= 1
                    continue
                count += 1
                if contender.output == "outputs":
                    seen["", 0, json.loads(message.value())["id"]] += 1
    finally:
        consumer.close()
    if contender.output != "outputs":
        return max(0, contender.events - count), max(0, count - contender.events)
    return contender.events - len(seen), count - len(seen)


if __name__ == "__main__":
    main()
