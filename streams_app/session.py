"""The owner of a transactional producer: begin, produce, offsets, end, and what each error of them means.

A session knows neither Faust nor tables, and never repairs itself: after any error it is `broken`, and the only way on is
`open`, a new producer under the same transactional id, which aborts whatever the old one left behind.

::

    open ──> begin ──> produce ──> send_offsets ──> end ──> begin …
      ^                   │             │            │
      │     TransactionAborted    PartitionsLost   CommitUnconfirmed
      └───────────────────┴─────────────┴────────────┘

Before ``end`` was called nothing can have taken effect, so every error there is `TransactionAborted` (or `PartitionsLost`,
when the broker says that the group moved on). Out of ``end`` every error is `CommitUnconfirmed`: librdkafka retries EndTxn
on its own, and neither its flags nor a time-out tell whether one of the tries arrived.

Pin: `group_metadata` packs it the way librdkafka serialises a consumer's group metadata (rdkafka_cgrp.c); a test compares
the bytes with those of a real consumer.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition

from streams_app.deadlines import discard, within
from streams_app.errors import CommitUnconfirmed, KafkaUnreachable, OutputRefused, PartitionsLost, TransactionAborted

log = logging.getLogger(__name__)
Headers: TypeAlias = Sequence[tuple[str, bytes]] | None
#: As `Producer.produce_batch` takes it; what is wrong with it stands in ``_error`` afterwards. It ignores partitions in here.
_Message: TypeAlias = dict[str, Any]
#: They are handed over under Python's lock: a millisecond, for which the agents wait.
_MESSAGES_A_CALL = 1_000

#: A commit that took longer may have been retried by librdkafka, and a delayed EndTxn of it could end a later
#: transaction of the same producer epoch (Jepsen's finding; KIP-890 is in no Python client): such a session is replaced.
_SUSPICIOUS_END_S = 1.0
_FLUSH_SHARE = 0.8

#: The broker says: your membership is not the current one.
_GROUP_MOVED_ON = frozenset(
    {KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID}
)
#: librdkafka's names for a connection that ended, or could not be made.
_CONNECTION_BROKE = frozenset({"FAIL", "DISCONN"})
#: About one record, not about the brokers.
REFUSED = frozenset(
    {
        KafkaError._INVALID_ARG,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
    }
)
#: The last is what a producer says of every record that it is given behind its fatal error, which being fenced is.
FENCED = frozenset(
    {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError._FATAL}
)


class Pin(NamedTuple):
    """The membership of a consumer group that a batch was fetched under."""

    group_id: str
    generation: int
    member_id: str

    @property
    def is_valid(self) -> bool:
        """Whether the broker would check it: generation −1 or no member id switch the fence off."""
        return self.generation >= 0 and bool(self.member_id)


class Owner(NamedTuple):
    """Who committed an offset; stands in the offset's metadata."""

    transactional_id: str
    member_id: str

    @property
    def text(self) -> str:
        """The metadata."""
        return f"{self.transactional_id} {self.member_id}"

    @classmethod
    def parse(cls, metadata: str | None) -> Owner | None:
        """The owner that ``metadata`` names; None: it was not written by us."""
        parts = (metadata or "").split(" ")
        return cls(*parts) if len(parts) == 2 and all(parts) else None


class Output(NamedTuple):
    """A record to produce; without partition the producer chooses by the key (murmur2, as Java's clients)."""

    topic: str
    key: bytes | None
    value: bytes | None
    partition: int | None = None
    timestamp_ms: int | None = None
    headers: Headers = None


class Consumed(NamedTuple):
    """The offset of one input partition that a transaction carries: the next one to read."""

    topic: str
    partition: int
    offset: int


class Outgoing:
    """Records to produce, by topic in their order: gathered in the form in which librdkafka takes many at a time."""

    __slots__ = ("apart", "messages")

    def __init__(self, outputs: Iterable[Output] = ()) -> None:
        #: Those that say nothing but key and value, by topic.
        self.messages: defaultdict[str, list[_Message]] = defaultdict(list)
        #: The others, by topic, each with the number of messages in front of it.
        self.apart: dict[str, list[tuple[int, Output]]] = {}
        for output in outputs:
            self.add(output)

    def add(self, output: Output) -> None:
        """Behind what its topic has."""
        topic, key, value, *others = output
        messages = self.messages[topic]
        if any(each is not None for each in others):
            self.apart.setdefault(topic, []).append((len(messages), output))
        else:
            messages.append({"key": key, "value": value})

    def __len__(self) -> int:
        return sum(len(messages) for messages in self.messages.values()) + sum(map(len, self.apart.values()))

    def __iter__(self) -> Iterator[Output]:
        for topic, messages in self.messages.items():
            begun = 0
            for before, output in (*self.apart.get(topic, ()), (len(messages), None)):
                yield from (Output(topic, each["key"], each["value"]) for each in messages[begun:before])
                begun = before
                if output is not None:
                    yield output


def header_pairs(headers: Any) -> list[Any]:
    """Headers as pairs, of a mapping or of pairs; none of none."""
    if not headers:
        return []
    return list(headers.items()) if isinstance(headers, Mapping) else list(headers)


def stamp(timestamp_ms: int | None) -> int:
    """A record's timestamp as librdkafka takes it: 0 is this moment, so the beginning of 1970 is a millisecond later."""
    return 0 if timestamp_ms is None else timestamp_ms or 1


def header_bytes(pairs: Iterable[tuple[str, Any]]) -> int:
    """What headers, as pairs, take of a message."""
    return sum(len(name) + len(value or b"") for name, value in pairs)


def group_metadata(pin: Pin) -> bytes:
    """The pin as librdkafka serialises it."""
    if not pin.is_valid:
        raise PartitionsLost(f"generation {pin.generation} of member {pin.member_id!r} would commit unfenced")
    return unfenced_group_metadata(pin)


def unfenced_group_metadata(pin: Pin) -> bytes:
    """As `group_metadata`, of any pin: for provision, which is a member of no group."""
    text = f"{pin.group_id}\0{pin.member_id}\0".encode()
    return b"CGMDv2:" + struct.pack("<i", pin.generation) + text + b"\1"


class Session:
    """One transactional id and its producer. Not thread-safe: one thread at a time, and all calls block."""

    def __init__(
        self,
        config: Mapping[str, Any],
        transactional_id: str,
        *,
        timeout_s: float = 10.0,
        new_producer: Callable[[dict[str, Any]], Any] = Producer,
    ) -> None:
        self.transactional_id = transactional_id
        self.broken = True
        #: The last error was: a newer producer took over the transactional id, or the broker timed the transaction out.
        self.fenced = False
        self._timeout_s = timeout_s
        self._new_producer = new_producer
        self._producer: Any = None
        self._began_s = 0.0
        self._troubled = threading.Event()
        self._config = {
            "transaction.timeout.ms": int(timeout_s * 1000),
            # Bounded by the transaction, and all of it in memory at once: prepare produces a whole batch, then flushes.
            "queue.buffering.max.messages": 0,
            "queue.buffering.max.kbytes": 2**31 - 1,
            "linger.ms": 5,
            # A transaction that begins before the brokers have finished the last one is turned away and tries again.
            "retry.backoff.ms": 10,
            "compression.type": "lz4",
            "partitioner": "murmur2_random",
            **config,
            "transactional.id": transactional_id,
            # A connection that is closed is no error to librdkafka, which tries again; it only logs it.
            "log_level": 6,
            "logger": _Ear(self._troubled),
        }

    def open(self) -> None:
        """Make a new producer and fence off, and abort, whatever ran under the transactional id before.

        Raises:
            KafkaException, KafkaUnreachable: the brokers did not answer, or do not permit it; the session stays broken.
        """
        self.close()
        self._producer = self._new_producer(dict(self._config))
        try:
            within(self._timeout_s, self._producer.init_transactions, self._timeout_s)
        except TimeoutError as error:
            raise KafkaUnreachable(f"{self.transactional_id}: the brokers do not let the producer begin") from error
        self.broken = self.fenced = False

    def rename(self, transactional_id: str) -> None:
        """Go on under another transactional id, from the next `open` on."""
        self.close()
        self.transactional_id = self._config["transactional.id"] = transactional_id

    def close(self) -> None:
        """Drop the producer; an open transaction is aborted by the next owner of the id, or by the broker in time."""
        self.broken = True
        producer, self._producer = self._producer, None
        if producer is not None:
            discard(producer, "purge")

    def begin(self) -> None:
        """Begin the broker's transaction."""
        self._began_s = time.monotonic()
        with self._before_end("begin"):
            self._producer.poll(0)
            self._troubled.clear()
            self._producer.begin_transaction()

    def produce(self, outgoing: Outgoing) -> None:
        """Hand outputs to the producer; `flush` waits for them. Those of one topic keep their order."""
        with self._before_end("produce"):
            for topic, messages in outgoing.messages.items():
                begun = 0
                for before, output in outgoing.apart.get(topic, ()):
                    self._hand_over(topic, messages[begun:before])
                    self._produce_one(output)
                    begun = before
                self._hand_over(topic, messages[begun:] if begun else messages)

    def produce_changelog(
        self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes | None, int | None]]
    ) -> Written:
        """Hand the changelog records ``(key, value, timestamp ms)`` of one table partition to the producer.

        Returns:
            where the last of them will stand, known after `flush`.
        """
        written = Written(topic, partition)
        *others, (key, value, timestamp_ms) = records
        with self._before_end("produce"):
            if timestamp_ms is None:
                self._hand_over(topic, [{"key": key, "value": value} for key, value, _ in others], partition)
            else:
                for each_key, each_value, each_ms in others:
                    self._produce_one(Output(topic, each_key, each_value, partition, each_ms))
            self._producer.produce(
                topic, value, key, partition, timestamp=stamp(timestamp_ms), on_delivery=written.on_delivery
            )
        return written

    def _produce_one(self, output: Output) -> None:
        topic, key, value, partition, timestamp_ms, headers = output
        at = -1 if partition is None else partition
        self._producer.produce(topic, value, key, at, timestamp=stamp(timestamp_ms), headers=headers)

    def _hand_over(self, topic: str, messages: list[_Message], partition: int = -1) -> None:
        """Many in one call, as each lets go of Python's lock, and gets it back when the agents have to wait for something.

        All for ``partition``; −1: for those that the partitioner chooses.
        """
        for at in range(0, len(messages), _MESSAGES_A_CALL):
            some = messages[at : at + _MESSAGES_A_CALL]
            if self._producer.produce_batch(topic, some, partition) != len(some):
                raise KafkaException(next(message["_error"] for message in some if "_error" in message))

    def flush(self) -> None:
        """Wait until the brokers have all that was produced."""
        with self._before_end("flush"):
            self._flush()

    def _flush(self) -> None:
        # Shorter than the records' own time-out, so that late ones are noticed here.
        timeout_s = _FLUSH_SHARE * self._timeout_s
        remaining = within(timeout_s, self._producer.flush, timeout_s)
        if remaining:
            raise TransactionAborted(f"{self.transactional_id}: {remaining} records were not acknowledged in time")

    def send_offsets(self, consumed: Iterable[Consumed], pin: Pin) -> None:
        """Put the input offsets into the transaction, fenced by the pin.

        The metadata of each offset says who committed it (see `Owner`): so the next owner knows whose transactions may
        still be open.

        Raises:
            PartitionsLost: the group has moved on since the pin.
        """
        owner = Owner(self.transactional_id, pin.member_id).text
        offsets = [TopicPartition(*each, metadata=owner) for each in consumed]
        if not offsets:
            raise AssertionError("a transaction without offsets would be unfenced")
        metadata = group_metadata(pin)
        with self._before_end("send_offsets"):
            send = self._producer.send_offsets_to_transaction
            within(self._timeout_s, send, offsets, metadata, self._timeout_s)

    def end(self) -> None:
        """Commit.

        Raises:
            OutputRefused, TransactionAborted: a record failed, and so the end was never asked for.
            CommitUnconfirmed: any other error: it may or may not have taken effect.
        """
        started_s = time.monotonic()
        try:
            within(self._timeout_s, self._producer.commit_transaction, self._timeout_s)
        except TimeoutError as error:
            self._break(error)
            raise CommitUnconfirmed(f"{self.transactional_id}: commit: no answer") from error
        except KafkaException as error:
            self._break(error)
            code = error.args[0].code()
            # librdkafka's words for "a record failed", and for what the brokers said of it: before EndTxn is sent, so nothing
            # took effect. After a long while it failed by its time-out, which is no fault of its own.
            if code in REFUSED or code == KafkaError._INCONSISTENT:
                quick = time.monotonic() - self._began_s < self._timeout_s / 2
                refused = OutputRefused if quick or code in REFUSED else TransactionAborted
                raise refused(f"{self.transactional_id}: {_text(error)}") from error
            raise CommitUnconfirmed(f"{self.transactional_id}: commit: {_text(error)}") from error
        except BaseException:
            self.broken = True
            raise
        # What was logged meanwhile is told here only.
        self._producer.poll(0)
        if time.monotonic() - started_s > _SUSPICIOUS_END_S or self._troubled.is_set():
            self.broken = True

    def _before_end(self, step: str) -> _BeforeEnd:
        return _BeforeEnd(self, step)

    def _break(self, error: BaseException) -> None:
        self.broken = True
        self.fenced = isinstance(error, KafkaException) and error.args[0].code() in FENCED


class _Ear:
    """Hears librdkafka's log: a connection that broke means that a request may have been sent twice.

    Stands where a `logging.Logger` stands. What is an error is passed on.
    """

    def __init__(self, troubled: threading.Event) -> None:
        self._troubled = troubled

    def log(self, level: int, message: str, *args: Any) -> None:
        """One line; the first of ``args`` is librdkafka's name for what it is about."""
        if args and args[0] in _CONNECTION_BROKE:
            self._troubled.set()
        if level >= logging.ERROR:
            log.log(level, message, *args)


class Written:
    """Where the last changelog record of a table partition stands, once the brokers acknowledged it."""

    __slots__ = ("error", "offset", "partition", "topic")

    def __init__(self, topic: str, partition: int) -> None:
        self.topic = topic
        self.partition = partition
        #: None: not known (yet), or not told by the broker, as for a record it took for a repetition.
        self.offset: int | None = None
        #: Of a record that the brokers did not take.
        self.error: KafkaError | None = None

    def on_delivery(self, error: KafkaError | None, message: Message) -> None:
        """Called by the producer; in a transaction a failed record needs no further care, as it fails the transaction."""
        offset = message.offset()
        if error is not None:
            self.error = error
        elif offset is not None and offset >= 0:
            self.offset = offset


class _BeforeEnd:
    """Turns what goes wrong before ``end`` into the error that says so, and marks the session broken."""

    __slots__ = ("_session", "_step")

    def __init__(self, session: Session, step: str) -> None:
        self._session = session
        self._step = step

    def __enter__(self) -> None:
        if self._session.broken:
            raise TransactionAborted(f"{self._session.transactional_id}: the session is not open")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        if error is None:
            return
        if isinstance(error, SystemError) and isinstance(error.__cause__, KafkaException):
            error = error.__cause__  # after a fatal error the next of our functions that it calls gets the blame
        self._session._break(error)
        if isinstance(error, TransactionAborted):
            return
        if isinstance(error, KafkaException) and error.args[0].code() in REFUSED:
            raise OutputRefused(f"{self._session.transactional_id}: {self._step}: {_text(error)}") from error
        # After a fatal error flush may raise anything; of the others only what comes from Kafka is an abort.
        if not isinstance(error, (KafkaException, BufferError, TimeoutError)) and self._step != "flush":
            return
        text = f"{self._session.transactional_id}: {self._step}: {_text(error)}"
        if isinstance(error, KafkaException) and error.args[0].code() in _GROUP_MOVED_ON:
            raise PartitionsLost(text) from error
        raise TransactionAborted(text) from error


def _text(error: BaseException) -> str:
    if isinstance(error, KafkaException):
        kafka_error = error.args[0]
        return f"{kafka_error.name()}: {kafka_error.str()}"
    return str(error) or type(error).__name__
