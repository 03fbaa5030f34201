"""Outputs that leave at once, outside of any transaction: those of at least once and of at most once.

*Sent again until heard back*: idempotent, acknowledged by all replicas, retried by the producer; what fails for good fails
the batch that sent it. *Sent once*: never retried, and what is not acknowledged is counted, as it may be lost.

`produce` is for the main thread and returns at once; `flush` blocks, and is for the engine's. Failures are learnt of in
`flush` only, by which time they belong to the batch that is about to be committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from streams_app.deadlines import discard, within
from streams_app.errors import OutputRefused, TransactionAborted
from streams_app.session import REFUSED, Output, Written, stamp

_SENT_AGAIN = {"enable.idempotence": True, "acks": "all"}
_SENT_ONCE = {"enable.idempotence": False, "acks": "1", "message.send.max.retries": 0}


class Outbox:
    """Two producers of one kind: for outputs, and, made when first needed, for changelogs."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        retries: bool,
        timeout_s: float = 10.0,
        new_producer: Callable[[dict[str, Any]], Any] = Producer,
    ) -> None:
        self._timeout_s = timeout_s
        self._config = {
            **config,
            **(_SENT_AGAIN if retries else _SENT_ONCE),
            "message.timeout.ms": int(timeout_s * 1000),
            "queue.buffering.max.messages": 1_000_000,
            "linger.ms": 5,
            "compression.type": "lz4",
            "partitioner": "murmur2_random",
        }
        self._new_producer = new_producer
        self._failures: list[KafkaError] = []
        self._changelogs: Any = None
        self._outputs = self._new_outputs()

    def _new_outputs(self) -> Any:
        # A word about each record that arrived would cost more than sending it.
        only_errors = {"delivery.report.only.error": True, "on_delivery": self._on_delivery}
        return self._new_producer({**self._config, **only_errors})

    def renew(self) -> None:
        """Send what is left, and go on with new producers: after a fatal error the old ones send nothing any more."""
        self.flush()
        self.close()
        self._outputs, self._changelogs = self._new_outputs(), None
        self._failures = []

    def produce(self, output: Output) -> None:
        """Hand a record to the producer.

        Raises:
            KafkaException: it is one that no broker takes.
            TransactionAborted: the producer takes nothing any more, or the brokers have not for a long time.
        """
        topic, key, value, partition, timestamp_ms, headers = output
        at = -1 if partition is None else partition
        self._hand_over(self._outputs, topic, value, key, at, timestamp=stamp(timestamp_ms), headers=headers)

    def _hand_over(self, producer: Any, *record: Any, **more: Any) -> None:
        try:
            try:
                producer.produce(*record, **more)
            except BufferError:
                # A million records wait: nothing of use can be done before the brokers take some of them.
                _flush(producer, time.monotonic() + self._timeout_s)
                producer.produce(*record, **more)
        except (BufferError, KafkaException) as error:
            if isinstance(error, KafkaException) and error.args[0].code() in REFUSED:
                raise
            raise TransactionAborted(f"an output could not be sent: {error}") from error

    def produce_changelog(
        self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes | None, int | None]]
    ) -> Written:
        """As `Session.produce_changelog`, outside of a transaction."""
        if self._changelogs is None:
            self._changelogs = self._new_producer(self._config)
        written = Written(topic, partition)
        for key, value, timestamp_ms in records:
            self._hand_over(
                *(self._changelogs, topic, value, key, partition),
                timestamp=stamp(timestamp_ms),
                on_delivery=written.on_delivery,
            )
        return written

    def flush(self) -> list[KafkaError]:
        """Wait until the brokers have, or have refused, all that was produced; gives the failures.

        Records of which nothing was heard in time are among them.
        """
        deadline_s = time.monotonic() + self._timeout_s
        for producer in (self._outputs, self._changelogs):
            if producer is not None:
                self._failures += [KafkaError(KafkaError._MSG_TIMED_OUT)] * _flush(producer, deadline_s)
        failures, self._failures = self._failures, []
        return failures

    def flush_or_raise(self) -> None:
        """As `flush`, for those who deliver the batch again.

        Raises:
            OutputRefused: a record is one that no broker takes.
            TransactionAborted: the brokers did not take a record in time.
        """
        failures = self.flush()
        if failures:
            text = f"{len(failures)} outputs were not taken, the first: {failures[0].str()}"
            refused = any(error.code() in REFUSED for error in failures)
            raise (OutputRefused if refused else TransactionAborted)(text) from KafkaException(failures[0])

    def close(self) -> None:
        """Give up what was not sent."""
        producers, self._outputs, self._changelogs = (self._outputs, self._changelogs), None, None
        for producer in producers:
            if producer is not None:
                discard(producer, "purge")

    def _on_delivery(self, error: KafkaError | None, _message: Any) -> None:
        if error is not None:
            self._failures.append(error)


def _flush(producer: Any, deadline_s: float) -> int:
    """Gives the number of records of which nothing was heard."""
    timeout_s = max(0.1, deadline_s - time.monotonic())
    try:
        return int(within(timeout_s, producer.flush, timeout_s))
    except TimeoutError:
        return len(producer)
