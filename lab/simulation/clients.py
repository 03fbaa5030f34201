"""Stand-ins for the clients of confluent-kafka and aiokafka, as far as the engine uses them, in front of the model broker."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from confluent_kafka import OFFSET_BEGINNING, KafkaError, KafkaException, TopicPartition
from faust.types import TP

from lab.simulation.broker import OFFSETS, OK
from lab.simulation.network import NoAnswer, ask
from lab.simulation.process import Process, running
from streams_app.session import Pin

_RETRY_S = 0.05
#: One record: so a restore can end between two of one transaction.
_RESTORE_CHUNK = 1
_FENCED = frozenset({KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
#: What a producer recovers from by aborting; out of anything else it does not go on.
_ABORTABLE = frozenset({KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID})


def new_producer(config: dict[str, Any]) -> Any:
    """`confluent_kafka.Producer`."""
    return (
        TransactionalProducer(running(), config) if "transactional.id" in config else PlainProducer(running(), config)
    )


class Queued(NamedTuple):
    """A record on its way."""

    tp: TP
    key: bytes | None
    value: bytes | None
    on_delivery: Any


class Report(NamedTuple):
    """What a delivery report says of a message."""

    at: int

    def offset(self) -> int:
        """Where it stands."""
        return self.at


def _partitioned(queued: Iterable[Queued]) -> dict[TP, list[Queued]]:
    """By partition, in their order."""
    batches: dict[TP, list[Queued]] = {}
    for each in queued:
        batches.setdefault(each.tp, []).append(each)
    return batches


class TransactionalProducer:
    """With a transactional id. Its methods block, and mean and raise what librdkafka's do."""

    def __init__(self, process: Process, config: Mapping[str, Any]) -> None:
        self._process = process
        self._world = process.world
        self._broker = process.broker
        self._name: str = config["transactional.id"]
        self._timeout_s: float = config["transaction.timeout.ms"] / 1000
        self._logger: Any = config["logger"]
        self._pid = self._epoch = -1
        self._ready = self._begun = False
        self._queue: list[Queued] = []
        self._added: set[TP] = set()
        self._sequences: dict[TP, int] = {}
        #: Waits for the next flush, as librdkafka tells them to nobody else.
        self._callbacks: list[Callable[[], object]] = []
        self._error: KafkaError | None = None

    def init_transactions(self, timeout_s: float) -> None:
        """Get an epoch."""
        apply = partial(self._broker.init_producer, self._name, self._timeout_s)
        with _TimesOut():
            code, self._pid, self._epoch = self._until_free("InitProducerId", apply, timeout_s)
        if code:
            raise self._fatal(code)
        self._ready = True

    def begin_transaction(self) -> None:
        """Begin one, which the broker learns with its first partition."""
        self._check(self._ready and not self._begun)
        self._begun, self._added = True, set()

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int,
        on_delivery: Any = None,
        timestamp: int = 0,
        headers: object = None,
    ) -> None:
        """Queue a record."""
        if self._error is not None:
            raise KafkaException(
                KafkaError(KafkaError._FATAL if self._error.fatal() else KafkaError._STATE, "not any more")
            )
        self._check(self._begun)
        self._queue.append(Queued(TP(topic, partition), key, value, on_delivery))

    def produce_batch(self, topic: str, messages: list[dict[str, Any]], partition: int) -> int:
        """Queue records of one topic."""
        for message in messages:
            self.produce(topic, message["value"], message["key"], partition)
        return len(messages)

    def flush(self, timeout_s: float) -> int:
        """Send what is queued; the number of those that were not acknowledged."""
        self._serve()
        deadline_s = self._world.now_s + timeout_s
        try:
            if self._queue and self._error is None:
                self._send(deadline_s)
        except NoAnswer:
            return len(self._queue)
        failed, self._queue = self._queue, []
        for each in failed:
            if each.on_delivery is not None:
                self._callbacks.append(partial(each.on_delivery, self._error, Report(-1)))
        self._serve()
        if failed and self._error is not None and self._error.fatal():
            raise KafkaException(self._error)
        return 0

    def _send(self, deadline_s: float) -> None:
        batches = _partitioned(self._queue)
        if not self._add(batches.keys(), deadline_s):
            return
        for tp, batch in batches.items():
            sequence = self._sequences.get(tp, 0)
            entries = [(each.key, each.value) for each in batch]
            apply = partial(self._broker.produce, tp, entries, self._pid, self._epoch, sequence, self._name)
            code, offset = ask(self._process, f"Produce to {tp[0]}-{tp[1]}", apply, deadline_s, self._on_break)
            if code:
                if code in _FENCED:
                    self._fatal(code)
                else:
                    self._fail(KafkaError(code, "produce", txn_requires_abort=True))
                return
            self._sequences[tp] = sequence + len(batch)
            for number, each in enumerate(batch, offset - len(batch) + 1):
                if each.on_delivery is not None:
                    self._callbacks.append(partial(each.on_delivery, None, Report(number)))
            self._queue = [each for each in self._queue if each.tp != tp]

    def _add(self, partitions: Iterable[TP], deadline_s: float) -> bool:
        """Put partitions into the transaction; whether they are in it."""
        new = sorted(set(partitions) - self._added)
        if new:
            apply = partial(self._broker.add_partitions, self._name, self._pid, self._epoch, new)
            what = "AddOffsetsToTxn" if new == [OFFSETS] else "AddPartitionsToTxn"
            code = self._until_free(what, apply, deadline_s - self._world.now_s)
            if code:
                self._fatal(code)
                return False
            self._added.update(new)
        return True

    def send_offsets_to_transaction(self, offsets: Sequence[TopicPartition], metadata: bytes, timeout_s: float) -> None:
        """Put offsets into the transaction."""
        self._check(self._begun)
        deadline_s = self._world.now_s + timeout_s
        with _TimesOut():
            if not self._add([OFFSETS], deadline_s):
                raise KafkaException(self._error)
            commits = {TP(each.topic, each.partition): (each.offset, each.metadata or "") for each in offsets}
            sent = self._name, self._pid, self._epoch, commits, unpacked(metadata)
            apply = partial(self._broker.commit_in_transaction, *sent)
            code = ask(self._process, "TxnOffsetCommit", apply, deadline_s, self._on_break)
        if code in _ABORTABLE:
            raise KafkaException(self._fail(KafkaError(code, "offsets", txn_requires_abort=True)))
        if code:
            raise self._fatal(code)

    def commit_transaction(self, timeout_s: float) -> None:
        """Flush and commit."""
        self._end(True, timeout_s)

    def abort_transaction(self, timeout_s: float) -> None:
        """Forget what is queued and abort."""
        if self._error is not None and not self._error.fatal():
            self._error = None
        self._queue = []
        self._end(False, timeout_s)

    def _end(self, commits: bool, timeout_s: float) -> None:
        self._check(self._begun)
        deadline_s = self._world.now_s + timeout_s
        if self.flush(timeout_s):
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, "flush", retriable=True))
        self._check(True)
        if self._added:
            apply = partial(self._broker.end_transaction, self._name, self._pid, self._epoch, commits)
            what = f"EndTxn({'commit' if commits else 'abort'})"
            with _TimesOut():
                code = self._until_free(what, apply, deadline_s - self._world.now_s)
            if code:
                raise self._fatal(code)
        self._begun = False

    def poll(self, _timeout_s: float) -> int:
        """Call the callbacks that wait; nothing but this and `flush` does."""
        waiting = len(self._callbacks)
        self._serve()
        return waiting

    def purge(self) -> None:
        """Send nothing any more."""
        self._queue = []

    def _until_free(self, what: str, apply: Callable[[], Any], timeout_s: float) -> Any:
        """Ask until the transaction before has ended in all partitions."""
        deadline_s = self._world.now_s + timeout_s
        while True:
            answer = ask(self._process, what, apply, deadline_s, self._on_break)
            code = answer[0] if isinstance(answer, tuple) else answer
            if code != KafkaError.CONCURRENT_TRANSACTIONS:
                return answer
            if self._world.now_s > deadline_s:
                raise NoAnswer(what)
            self._process.sleep(_RETRY_S)

    def _check(self, state_permits: bool) -> None:
        if self._error is not None:
            raise KafkaException(self._error)
        if not state_permits:
            raise KafkaException(KafkaError(KafkaError._STATE, "not now"))

    def _fatal(self, code: int) -> KafkaException:
        code = KafkaError._FENCED if code in _FENCED else code
        return KafkaException(self._fail(KafkaError(code, "fatal", fatal=True)))

    def _fail(self, error: KafkaError) -> KafkaError:
        self._error = error
        return error

    def _on_break(self) -> None:
        # As librdkafka words it; told when the producer is polled.
        self._callbacks.append(partial(self._logger.log, 20, "%s [%s] %s", "FAIL", "model", "Disconnected"))

    def _serve(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class _TimesOut:
    """Turns a missing answer into librdkafka's error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, _traceback: object) -> None:
        if isinstance(error, NoAnswer):
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, str(error), retriable=True)) from error


def unpacked(metadata: bytes) -> Pin:
    """The pin that librdkafka's group metadata hold."""
    assert metadata.startswith(b"CGMDv2:")
    [generation] = struct.unpack_from("<i", metadata, 7)
    group, member, _ = metadata[11:].split(b"\0")
    return Pin(group.decode(), generation, member.decode())


class PlainProducer:
    """Without transactions: sends in the background. Idempotent and repeating, or once and never again."""

    def __init__(self, process: Process, config: Mapping[str, Any]) -> None:
        self._process = process
        self._world = process.world
        self._broker = process.broker
        self._repeats: bool = config["enable.idempotence"]
        self._timeout_s: float = config["message.timeout.ms"] / 1000
        self._only_errors: bool = config.get("delivery.report.only.error", False)
        self._on_delivery = config.get("on_delivery")
        self._pid = self._broker.new_pid()
        self._sequences: dict[TP, int] = {}
        self._queue: list[Queued] = []
        #: Sent, or about to be, and not heard of.
        self._unheard = 0
        self._callbacks: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return self._unheard

    def produce(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int,
        on_delivery: Any = None,
        timestamp: int = 0,
        headers: object = None,
    ) -> None:
        """Queue a record, and send it soon."""
        self._process.check_alive()
        self._queue.append(Queued(TP(topic, partition), key, value, on_delivery or self._on_delivery))
        self._unheard += 1
        if len(self._queue) == 1:
            # Soon, or at the flush, whichever comes first: then there is no thread of librdkafka that runs beside.
            self._world.at(_RETRY_S, self._send)

    def _send(self) -> None:
        if self._process.is_dead or not self._queue:
            return
        if self._process.frozen_s:
            self._world.at(self._process.frozen_s, self._send)
            return
        queue, self._queue = self._queue, []
        for tp, batch in _partitioned(queue).items():
            self._send_one(tp, batch, self._next_sequence(tp, len(batch)), self._world.now_s + self._timeout_s)

    def _next_sequence(self, tp: TP, records: int) -> int:
        sequence = self._sequences.get(tp, 0)
        self._sequences[tp] = sequence + records
        return sequence

    def _send_one(self, tp: TP, batch: list[Queued], sequence: int, deadline_s: float) -> None:
        """Send one request, in the background: nobody waits for it here."""
        if self._process.is_dead:
            return
        fault, what = self._world.fault(), f"Produce to {tp[0]}-{tp[1]}"
        apply = partial(self._arrive, tp, batch, sequence, what)
        if not fault:
            self._heard(batch, *apply())
            return
        fault, fate = divmod(fault, 4)
        delay_s = (0.2, 3.0, 9.0, 14.0)[fault % 4]
        self._world.counts[("late request", "lost answer", "lost request", "late answer")[fate]] += 1
        if fate == 0:
            self._tell(f"! {what} is on its way for {delay_s:g} s")
            self._world.at(delay_s, apply)
        elif fate == 1:
            apply()
            self._tell("! the answer is lost")
        elif fate == 2:
            self._tell(f"! {what} is lost")
        else:
            answer = apply()
            self._tell(f"! the answer takes {delay_s:g} s")
            self._world.at(delay_s, partial(self._heard, batch, *answer))
            return
        if self._repeats and self._world.now_s + 1 < deadline_s:
            self._world.at(1.0, partial(self._send_one, tp, batch, sequence, deadline_s))
        else:
            self._world.at(deadline_s - self._world.now_s, partial(self._heard, batch, KafkaError._MSG_TIMED_OUT, -1))

    def _arrive(self, tp: TP, batch: list[Queued], sequence: int, what: str) -> tuple[int, int]:
        entries = [(each.key, each.value) for each in batch]
        self._tell(what)
        if self._repeats:
            return self._broker.produce(tp, entries, self._pid, 0, sequence, None)
        return OK, self._broker.logs[tp].append(entries)

    def _tell(self, what: str) -> None:
        if self._world.story is not None:
            self._world.tell(self._process.name, what)

    def _heard(self, batch: list[Queued], code: int, offset: int) -> None:
        self._unheard -= len(batch)
        error = KafkaError(code) if code else None
        for number, each in enumerate(batch, offset - len(batch) + 1):
            if each.on_delivery is not None and (error is not None or not self._only_errors):
                self._callbacks.append(partial(each.on_delivery, error, Report(number)))

    def flush(self, timeout_s: float) -> int:
        """Wait until all is heard of; the number of those that are not."""
        deadline_s = self._world.now_s + timeout_s
        self._process.sleep(0.001)
        self._send()
        step_s = 0.005
        while self._unheard and self._world.now_s < deadline_s:
            self._process.sleep(step_s)
            step_s = min(2 * step_s, deadline_s - self._world.now_s + 0.001)
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
        return self._unheard

    def purge(self) -> None:
        """Send nothing any more; what is on its way is."""
        self._queue = []


class Reader:
    """`confluent_kafka.Consumer`, which joins no group and is asked for offsets."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._process = running()
        self._stable = config["isolation.level"] == "read_committed"

    def committed(self, partitions: Sequence[TopicPartition], timeout: float) -> list[TopicPartition]:
        """The group's offsets; asks again while they are unstable, for as long as it may."""
        asked = [TP(each.topic, each.partition) for each in partitions]
        deadline_s = self._process.world.now_s + timeout
        apply = partial(self._process.broker.group.committed, asked, stable=self._stable)
        while True:
            with _TimesOut():
                found = ask(self._process, "OffsetFetch", apply, deadline_s, _nobody)
                if found is None and self._process.world.now_s > deadline_s:
                    raise NoAnswer("the offsets are not stable")
            if found is not None:
                break
            self._process.sleep(0.1)
        return [
            TopicPartition(topic, partition, -1001)
            if stored is None
            else TopicPartition(topic, partition, stored.offset, stored.metadata.partition("\0")[0])
            for (topic, partition), stored in found.items()
        ]

    def offsets_for_times(self, asked: Sequence[TopicPartition], timeout: float) -> list[TopicPartition]:
        """Beginnings, which are 0; or ends."""
        logs, deadline_s = self._process.broker.logs, self._process.world.now_s + timeout

        def at(each: TopicPartition) -> int:
            if each.offset == OFFSET_BEGINNING:
                return 0
            log = logs[TP(each.topic, each.partition)]
            return log.stable_end if self._stable else log.end

        with _TimesOut():
            found = ask(self._process, "ListOffsets", lambda: [at(each) for each in asked], deadline_s, _nobody)
        return [TopicPartition(each.topic, each.partition, at) for each, at in zip(asked, found, strict=True)]

    def close(self) -> None:
        """Nothing is held."""


def _nobody() -> None:
    pass


class _Done(NamedTuple):
    """A future whose answer is there."""

    answer: Any

    def result(self, timeout: float | None = None) -> Any:
        """The answer."""
        return self.answer


#: How long the engine waits for an answer whose own time-out must not be over, see `COORDINATOR_TIMEOUT_S`.
_WAITED_S = 10.0


class Admin:
    """`confluent_kafka.admin.AdminClient`."""

    def __init__(self, _config: Mapping[str, Any]) -> None:
        self._process = running()

    def _ask(self, what: str, apply: Callable[[], Any], timeout_s: float) -> Any:
        with _TimesOut():
            return ask(self._process, what, apply, self._process.world.now_s + timeout_s, _nobody)

    def list_topics(self, timeout: float) -> Any:
        """The input topic, which is all that has offsets."""
        partitions = dict.fromkeys(range(len(self._process.plan.inputs)))
        return SimpleNamespace(topics={self._process.plan.inputs[0].topic: SimpleNamespace(partitions=partitions)})

    def describe_consumer_groups(self, groups: Sequence[str], request_timeout: float) -> dict[str, _Done]:
        """Live members."""
        group = self._process.broker.group
        members = self._ask("DescribeGroups", lambda: list(group.members), min(request_timeout, _WAITED_S))
        return {groups[0]: _Done(SimpleNamespace(members=[SimpleNamespace(member_id=each) for each in members]))}

    def describe_topics(self, topics: Any, request_timeout: float) -> dict[str, _Done]:
        """Their ids."""
        return {name: _Done(SimpleNamespace(topic_id=f"id of {name}")) for name in topics.topic_names}

    def describe_configs(self, resources: Sequence[Any], request_timeout: float) -> dict[Any, _Done]:
        """All settings have one value, which is long enough for every time."""
        return {resources[0]: _Done(_Settings())}


class _Settings:
    def __getitem__(self, _name: str) -> Any:
        return SimpleNamespace(value="86400000")


class ChangelogReader:
    """`confluent_kafka.Consumer`, reading committed records of assigned partitions, and telling their ends."""

    def __init__(self, _config: object) -> None:
        self._process = running()
        self._positions: dict[TP, int] = {}
        #: The last end of each partition that was told: once each.
        self._ends: dict[TP, int] = {}

    def close(self) -> None:
        """Nothing to do."""

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Read these."""
        self._positions = {TP(each.topic, each.partition): each.offset for each in partitions}

    def consume(self, _most: int, timeout_s: float) -> list[Changelogged]:
        """Some records, and the ends that were found; after the time none."""
        found: list[Changelogged] = []
        for tp, start in self._positions.items():
            apply = partial(self._process.broker.read, tp, start, _FOR_EVER, _RESTORE_CHUNK)
            try:
                records, position = ask(
                    self._process, f"Fetch {tp[0]}-{tp[1]} from {start}", apply, self._process.world.now_s + 30, _nobody
                )
            except NoAnswer:
                continue
            self._positions[tp] = position
            found += [Changelogged(tp, offset, each.key, each.value) for offset, each in records]
            if not records and self._ends.get(tp) != position:
                self._ends[tp] = position
                found.append(Changelogged(tp, position, ending=KafkaError(KafkaError._PARTITION_EOF)))
        if not found:
            self._process.sleep(timeout_s)
        return found


_FOR_EVER = 1 << 60


class Changelogged(NamedTuple):
    """`confluent_kafka.Message`: a record, or the report of an end."""

    tp: TP
    at: int
    key_bytes: bytes | None = None
    value_bytes: bytes | None = None
    ending: KafkaError | None = None

    def error(self) -> KafkaError | None:
        """Set in a report."""
        return self.ending

    def topic(self) -> str:
        """Where it is from."""
        return self.tp.topic

    def partition(self) -> int:
        """Where it is from."""
        return self.tp.partition

    def offset(self) -> int:
        """Where it stands."""
        return self.at

    def key(self) -> bytes | None:
        """The key."""
        return self.key_bytes

    def value(self) -> bytes | None:
        """The value."""
        return self.value_bytes

    def timestamp(self) -> tuple[int, int]:
        """Of no record that is modelled does it count."""
        return 1, 0
