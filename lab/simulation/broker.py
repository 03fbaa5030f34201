"""A model of the brokers, as librdkafka's clients see them: logs, the transaction coordinator, and what holds them together.

It is the reference of the simulation, and `compare` holds it against a real Kafka. Every method is one request, which takes
effect at once and answers with an error code of Kafka's, 0 for none; when requests arrive is decided elsewhere (network.py).
Producer epochs change when a producer begins, or when the broker takes a transaction away, and not with each transaction: so
it is for all clients without KIP-890's second part, librdkafka's among them, and why a late EndTxn can end the wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from confluent_kafka import KafkaError
from faust.types import TP

from lab.simulation.group import Group
from streams_app.session import Pin

OK = 0
#: The partition of the group's offsets, which takes part in transactions as any other.
OFFSETS = TP("__consumer_offsets", 0)
#: A producer that never was, to mark that no epoch is known.
_NO_EPOCH = -1

Entries: TypeAlias = Sequence[tuple[bytes | None, bytes | None]]
Offsets: TypeAlias = Mapping[TP, tuple[int, str]]


class Transaction:
    """One transaction, for the checks: what became of it, and what it had."""

    __slots__ = ("has_offsets", "name", "outcome", "records")

    def __init__(self, name: str) -> None:
        self.name = name
        #: None until the coordinator has decided.
        self.outcome: bool | None = None
        self.has_offsets = False
        self.records = 0


class Record:
    """A record, or a marker, of a log."""

    __slots__ = ("key", "outcome", "transaction", "value")

    def __init__(self, key: bytes | None, value: bytes | None, outcome: bool | None, transaction: Transaction | None):
        self.key = key
        self.value = value
        #: Whether readers of committed records see it; None: its transaction is open.
        self.outcome = outcome
        self.transaction = transaction


class Log:
    """One partition."""

    __slots__ = ("_epochs", "_open", "_sequences", "records")

    def __init__(self) -> None:
        self.records: list[Record] = []
        #: First offset, and records, of each producer's open transaction.
        self._open: dict[int, tuple[int, list[Record]]] = {}
        self._epochs: dict[int, int] = {}
        #: Of each producer: its epoch, the next sequence number, the last offset.
        self._sequences: dict[int, tuple[int, int, int]] = {}

    @property
    def end(self) -> int:
        """The high watermark."""
        return len(self.records)

    @property
    def stable_end(self) -> int:
        """The last stable offset."""
        return min((first for first, _ in self._open.values()), default=len(self.records))

    def is_fenced(self, pid: int, epoch: int) -> bool:
        """Whether a newer epoch of the producer was seen here."""
        return epoch < self._epochs.get(pid, _NO_EPOCH)

    def append(self, entries: Entries, transaction: Transaction | None = None, pid: int = -1) -> int:
        """Give the offset of the last one."""
        records = [Record(key, value, None if transaction else True, transaction) for key, value in entries]
        if transaction is not None:
            self._open.setdefault(pid, (len(self.records), []))[1].extend(records)
            transaction.records += len(records)
        self.records += records
        return len(self.records) - 1

    def append_once(
        self, entries: Entries, pid: int, epoch: int, sequence: int, transaction: Transaction | None
    ) -> tuple[int, int]:
        """Append what carries the producer's next sequence number; an earlier one is a repetition."""
        known_epoch, expected, last = self._sequences.get(pid, (epoch, 0, -1))
        if epoch > known_epoch:
            expected = 0
        if sequence < expected:
            return OK, last
        if sequence > expected:
            return KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, -1
        offset = self.append(entries, transaction, pid)
        self._epochs[pid] = epoch
        self._sequences[pid] = epoch, expected + len(entries), offset
        return OK, offset

    def mark(self, pid: int, epoch: int, committed: bool) -> None:
        """Write the marker that ends the producer's transaction here."""
        for record in self._open.pop(pid, (0, []))[1]:
            record.outcome = committed
        self._epochs[pid] = epoch
        self.records.append(Record(None, None, False, None))


State: TypeAlias = Literal["empty", "ongoing", "ending", "ended"]


class Producing:
    """What the transaction coordinator knows of a transactional id."""

    __slots__ = ("commits", "epoch", "name", "partitions", "pid", "state", "timeout_s", "transaction", "unmarked")

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.epoch = 0
        self.state: State = "empty"
        self.timeout_s = 0.0
        self.partitions: set[TP] = set()
        self.unmarked: set[TP] = set()
        self.commits = False
        self.transaction = Transaction(name)


class Broker:
    """All brokers of the cluster."""

    def __init__(
        self,
        partitions: Iterable[TP],
        group: Group,
        post: Callable[[str, Callable[[], None]], None],
        at: Callable[[float, Callable[[], None]], None],
    ) -> None:
        """``post`` sends a message between brokers, ``at`` calls after so many seconds."""
        self.logs = {tp: Log() for tp in [*partitions, OFFSETS]}
        self.group = group
        self.ids: dict[str, Producing] = {}
        self.transactions: list[Transaction] = []
        self._post = post
        self._at = at
        self._pids = 0

    def new_pid(self) -> int:
        """For a producer without transactions."""
        self._pids += 1
        return self._pids

    # -- The transaction coordinator.

    def init_producer(self, name: str, timeout_s: float) -> tuple[int, int, int]:
        """InitProducerId: error, producer id, epoch; what is open under the id is aborted first."""
        state = self.ids.get(name)
        if state is None:
            state = self.ids[name] = Producing(name, self.new_pid())
        elif state.state == "ending":
            return KafkaError.CONCURRENT_TRANSACTIONS, -1, -1
        elif state.state == "ongoing":
            self._take_away(state)
            return KafkaError.CONCURRENT_TRANSACTIONS, -1, -1
        else:
            state.epoch += 1
        state.state, state.timeout_s = "empty", timeout_s
        return OK, state.pid, state.epoch

    def add_partitions(self, name: str, pid: int, epoch: int, partitions: Iterable[TP]) -> int:
        """AddPartitionsToTxn, and AddOffsetsToTxn with `OFFSETS`."""
        state, code = self._identified(name, pid, epoch)
        if code:
            return code
        if state.state != "ongoing":
            state.state, state.partitions = "ongoing", set()
            state.transaction = Transaction(name)
            self.transactions.append(state.transaction)
            transaction = state.transaction
            self._at(state.timeout_s, lambda: self._time_out(state, transaction))
        state.partitions.update(partitions)
        return OK

    def end_transaction(self, name: str, pid: int, epoch: int, commits: bool) -> int:
        """EndTxn."""
        state, code = self._identified(name, pid, epoch)
        if code:
            return code
        if state.state == "ongoing":
            self._prepare(state, commits)
            return OK
        # A repetition of the request that ended it.
        return OK if state.state == "ended" and state.commits == commits else KafkaError.INVALID_TXN_STATE

    def _identified(self, name: str, pid: int, epoch: int) -> tuple[Producing, int]:
        state = self.ids[name]
        if state.pid != pid:
            return state, KafkaError.INVALID_PRODUCER_ID_MAPPING
        if state.epoch != epoch:
            return state, KafkaError.PRODUCER_FENCED
        return state, KafkaError.CONCURRENT_TRANSACTIONS if state.state == "ending" else OK

    def _time_out(self, state: Producing, transaction: Transaction) -> None:
        if state.transaction is transaction and state.state == "ongoing":
            self._take_away(state)

    def _take_away(self, state: Producing) -> None:
        state.epoch += 1
        self._prepare(state, False)

    def _prepare(self, state: Producing, commits: bool) -> None:
        """Decide; from here on nothing changes the outcome, though readers learn it partition by partition."""
        state.state, state.commits = "ending", commits
        state.transaction.outcome = commits
        state.unmarked = set(state.partitions)
        for tp in sorted(state.partitions):
            self._post(
                f"{'commit' if commits else 'abort'} marker of {state.name} for {tp[0]}-{tp[1]}",
                _Marker(self, state, tp),
            )

    def mark(self, state: Producing, tp: TP) -> None:
        """WriteTxnMarkers, for one partition."""
        self.logs[tp].mark(state.pid, state.epoch, state.commits)
        if tp == OFFSETS:
            self.group.end_pending(state.pid, state.commits)
        state.unmarked.discard(tp)
        if not state.unmarked:
            state.state = "ended"

    # -- The leaders of partitions.

    def produce(
        self, tp: TP, entries: Entries, pid: int, epoch: int, sequence: int, name: str | None
    ) -> tuple[int, int]:
        """Produce, with a sequence number: error, and the offset of the last one. ``name`` is the transactional id."""
        log = self.logs[tp]
        if log.is_fenced(pid, epoch):
            return KafkaError.INVALID_PRODUCER_EPOCH, -1
        transaction = None
        if name is not None:
            code = self._verify(tp, name, pid, epoch)
            if code:
                return code, -1
            transaction = self.ids[name].transaction
        return log.append_once(entries, pid, epoch, sequence, transaction)

    def _verify(self, tp: TP, name: str, pid: int, epoch: int) -> int:
        """KIP-890's first part: the leader asks the coordinator whether the partition is in an open transaction."""
        state, code = self._identified(name, pid, epoch)
        if code == KafkaError.PRODUCER_FENCED:
            return int(KafkaError.INVALID_PRODUCER_EPOCH)
        if code or state.state != "ongoing" or tp not in state.partitions:
            return int(KafkaError.INVALID_TXN_STATE)
        return OK

    def read(self, tp: TP, start: int, end: int, most: int) -> tuple[list[tuple[int, Record]], int]:
        """Fetch, read committed: at most so many records from ``start`` on, and the position behind them."""
        log, at = self.logs[tp], start
        found: list[tuple[int, Record]] = []
        stop = min(end, log.stable_end)
        while at < stop and len(found) < most:
            record = log.records[at]
            if record.outcome:
                found.append((at, record))
            at += 1
        while at < stop and not log.records[at].outcome:
            at += 1
        return found, at

    # -- The group's coordinator; what needs nothing of transactions is asked of the group itself.

    def commit_in_transaction(self, name: str, pid: int, epoch: int, offsets: Offsets, pin: Pin) -> int:
        """TxnOffsetCommit."""
        code = self.group.validate(pin, in_transaction=True)
        if code:
            return code
        if self.logs[OFFSETS].is_fenced(pid, epoch):
            return int(KafkaError.INVALID_PRODUCER_EPOCH)
        code = self._verify(OFFSETS, name, pid, epoch)
        if code:
            return code
        self.ids[name].transaction.has_offsets = True
        self.logs[OFFSETS].append([(None, None)], self.ids[name].transaction, pid)
        self.group.hold_pending(pid, offsets)
        return OK


class _Marker:
    """A marker on its way."""

    __slots__ = ("_broker", "_state", "_tp")

    def __init__(self, broker: Broker, state: Producing, tp: TP) -> None:
        self._broker = broker
        self._state = state
        self._tp = tp

    def __call__(self) -> None:
        self._broker.mark(self._state, self._tp)
