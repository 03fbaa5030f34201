"""A reader of committed records *during* the run; what it saw must be what lies there at the end."""

from __future__ import annotations

import threading
import time
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from streams_app.audit import TP
from streams_app.kafka import KafkaAddress
from streams_app.registry import Findings

_CHUNK_RECORDS, _POLL_S = 5_000, 0.2


class LiveReader:
    """Reads topics as they grow, in a thread; keeps of each record its offset and a checksum (12 bytes)."""

    def __init__(self, address: KafkaAddress, tps: Iterable[TP], findings: Findings) -> None:
        self.seen = Seen(findings)
        self._consumer = Consumer(
            {
                **address.librdkafka(),
                "log_level": 0,
                "group.id": "streams-app-lab",  # the client wants one; nothing is ever committed for it
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
            }
        )
        #: Up to where each partition was read, behind transaction markers, too.
        self._read: dict[TP, int] = {}
        self._consumer.assign([TopicPartition(*tp, 0) for tp in tps])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def read_to(self, ends: Mapping[TP, int], timeout_s: float) -> None:
        """Read on up to these stable ends; what does not come in time is told as ``unseen``."""
        deadline_s = time.monotonic() + timeout_s
        while late := [tp for tp, end in ends.items() if self._read.get(tp, 0) < end]:
            if time.monotonic() > deadline_s:
                for tp in late:
                    self.seen.findings.add(
                        "unseen", f"{tp[0]}[{tp[1]}]: a reader stands at {self._read.get(tp, 0)} of {ends[tp]}"
                    )
                break
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End."""
        self._stop.set()
        self._thread.join()
        self._consumer.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            for message in self._consumer.consume(_CHUNK_RECORDS, _POLL_S):
                error = message.error()
                tp, offset = (str(message.topic()), int(message.partition() or 0)), int(message.offset() or 0)
                if error is None:
                    self.seen.take(message)
                    self._read[tp] = offset + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._read[tp] = offset
                elif error.code() not in {KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT}:
                    self.seen.findings.add("unreadable", f"{message.topic()}[{message.partition()}]: {error.str()}")


class Seen:
    """What a reader saw, record by record."""

    def __init__(self, findings: Findings) -> None:
        self._offsets: dict[TP, array[int]] = defaultdict(lambda: array("Q"))
        self._checksums: dict[TP, array[int]] = defaultdict(lambda: array("L"))
        self.findings = findings

    def take(self, message: Message) -> None:
        """Take note of a record."""
        tp, offset = (str(message.topic()), int(message.partition() or 0)), int(message.offset() or 0)
        offsets = self._offsets[tp]
        if offsets and offset <= offsets[-1]:
            self.findings.add("non-monotonic poll", f"{tp[0]}[{tp[1]}]: {offset} came behind {offsets[-1]}")
            return
        offsets.append(offset)
        self._checksums[tp].append(checksum(message))

    def compare(self, tp: TP, messages: Iterable[Message]) -> None:
        """Compare what was seen of a partition with what lies there at the end."""
        seen = dict(zip(self._offsets[tp], self._checksums[tp], strict=True))
        last = self._offsets[tp][-1] if seen else -1
        for message in messages:
            offset = int(message.offset() or 0)
            there = seen.pop(offset, None)
            where = f"{tp[0]}[{tp[1]}]@{offset}"
            if there is None and offset <= last:
                self.findings.add("unseen", f"{where} was not seen by a reader that has seen later ones")
            elif there is not None and there != checksum(message):
                self.findings.add("aborted read", f"{where} was another record when it was read during the run")
        for offset in seen:
            self.findings.add("aborted read", f"{tp[0]}[{tp[1]}]@{offset} was read during the run, and is not there")


def checksum(message: Message) -> int:
    """Of key and value."""
    return zlib.crc32(message.value() or b"", zlib.crc32(message.key() or b""))
