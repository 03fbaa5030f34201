"""Replay: dead letters sent back to where they came from, each of them once.

**Once.** A letter is noted (see letters.py) in the same transaction as the record that goes home. So a replay that dies
leaves both or neither, and the next one goes on where it ended. All replays share a transactional id: one that starts ends
the one that runs, and reads the notes only after that; a paused one that wakes can no longer commit.

Where the cluster permits no transactions, `Unfenced` sends a letter first and notes it after that. A replay that dies in
between sends that letter again, and two at a time send everything twice, so that form has to be asked for.

**Back to where it came from** is the same topic and the same partition, if the topic still has it, so that what is sent
back keeps its order within a key. There it would fail again if the partition was the fault: of a letter `wrong_partition`
the key decides (murmur2), as of one whose partition is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, cast

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from streams_app.errors import (
    CommitUnconfirmed,
    ConfigurationError,
    KafkaUnreachable,
    OutputRefused,
    TransactionAborted,
)
from streams_app.letters import OURS, Choice, Letter, Letters, Listing, Place
from streams_app.outbox import Outbox
from streams_app.registry import Findings
from streams_app.session import FENCED, Outgoing, Output, Session, header_bytes

#: Of a replayed record: the letter's place in the dead letters, ``partition@offset``.
REPLAYED = "dlq.replayed"
#: The code of a letter that only lay in the wrong partition.
_WRONG_PARTITION = "wrong_partition"

#: One transaction: far below the producer's queue, and sent well within the transaction's time-out.
_CHUNK_RECORDS = 500
_CHUNK_BYTES = 8 * 1024 * 1024
_ATTEMPTS = 3
#: A replay that dies holds up whoever reads the topics it wrote to, until the next replay or for that long.
_TRANSACTION_TIMEOUT_S = 10.0
_DELIVERY_TIMEOUT_S = 30.0
#: Of those that a replay would send, where there is no limit.
_KEPT_LETTERS = 20
#: What brokers say that permit no transactions, or know none.
_NOT_PERMITTED = frozenset(
    {
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.UNSUPPORTED_VERSION,
        KafkaError._UNSUPPORTED_FEATURE,
    }
)
#: What delivery reports say when the transaction or the brokers failed: other records of the transaction are purged.
_NOT_ABOUT_THE_RECORD = FENCED | {
    KafkaError._PURGE_QUEUE,
    KafkaError._PURGE_INFLIGHT,
    KafkaError._MSG_TIMED_OUT,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
}

#: Called with the number of letters that are through.
OnProgress: TypeAlias = Callable[[int], None]
#: Letters with the records that bring them home.
Homeward: TypeAlias = Sequence[tuple[Letter, Output]]
#: Letters that were not delivered, with the reason.
Refused: TypeAlias = list[tuple[Letter, str]]


class Transactions:
    """Letters and their notes in transactions: all of one or nothing. A second replay ends the first. Blocks."""

    def __init__(
        self, letters: Letters, transactional_id: str, *, new_producer: Callable[[dict[str, Any]], Any] = Producer
    ) -> None:
        #: Letters that it brought home, and those that another replay had noted meanwhile.
        self.sent = 0
        self.already = 0
        self._notes = letters.notes
        #: Letters that are not to be sent, with the offsets of their notes.
        self._noted: dict[Place, int] = {}
        #: Notes that do not count, as what was sent back before is to be sent again.
        self._void: set[tuple[Place, int]] = set()
        #: Why records were refused, as the delivery reports say.
        self._reasons: list[str] = []
        self._new_producer = new_producer
        config = letters.address.librdkafka()
        self._session = Session(config, transactional_id, timeout_s=_TRANSACTION_TIMEOUT_S, new_producer=self._producer)

    def open(self, *, again: bool = False) -> None:
        """Connect, and end other replays; with ``again`` what they noted does not count.

        Raises:
            KafkaUnreachable: the brokers do not answer.
            ConfigurationError: they permit no transactions.
        """
        self._open()
        if again:
            self._void, self._noted = set(self._noted.items()), {}

    def _open(self) -> None:
        """Fence off other replays, then read what they noted: what is not noted now, nobody else can send any more."""
        try:
            self._session.open()
        except KafkaException as error:
            if error.args[0].code() in _NOT_PERMITTED:
                raise ConfigurationError(
                    f"the brokers permit no transactions as {self._session.transactional_id!r} "
                    f"({error.args[0].str()}); permit them, or use --without-transactions: then a replay that dies may "
                    "have sent a letter that the next one sends again"
                ) from error
            raise KafkaUnreachable(f"no transaction can be made: {error.args[0].str()}") from error
        self._noted = dict(self._notes.read().items() - self._void)

    def close(self) -> None:
        """Give the connection back."""
        self._session.close()

    def deliver(self, letters: Homeward) -> Refused:
        """Send the records, and note them; gives those that the brokers refuse.

        Raises:
            TransactionAborted: another replay took over, or the brokers had trouble several times in a row.
            CommitUnconfirmed: the same, and the last of the letters may have been sent; the notes know.
        """
        if self._session.broken:
            self._open()
        todo = self._todo(letters)
        self.already += len(letters) - len(todo)
        attempt = 0
        while todo:
            attempt += 1
            try:
                self._transact(todo)
            except OutputRefused as error:
                self._open()
                return self._apart(todo, str(error))
            except (TransactionAborted, CommitUnconfirmed) as error:
                self._give_up_if_due(error, attempt)
                self._open()
                # Of a transaction whose outcome was unknown, the notes tell.
                before, todo = len(todo), self._todo(todo)
                self.sent += before - len(todo)
            else:
                self.sent += len(todo)
                break
        return []

    def _todo(self, letters: Homeward) -> Homeward:
        return [each for each in letters if each[0].place not in self._noted]

    def _transact(self, letters: Homeward) -> None:
        self._reasons.clear()
        self._session.begin()
        self._session.produce(Outgoing(output for _, output in letters))
        self._session.produce(Outgoing(self._notes.note(letter) for letter, _ in letters))
        self._session.flush()
        if self._reasons:
            raise OutputRefused(self._reasons[0])
        self._session.end()

    def _apart(self, letters: Homeward, reason: str) -> Refused:
        """Brokers refuse a whole chunk for the sake of one record: halve until that one is alone."""
        if len(letters) == 1:
            return [(letters[0][0], reason)]
        middle = len(letters) // 2
        return self.deliver(letters[:middle]) + self.deliver(letters[middle:])

    def _give_up_if_due(self, error: TransactionAborted | CommitUnconfirmed, attempt: int) -> None:
        cause = error.__cause__
        # After a fatal error, which is what fencing is, flush may raise anything.
        fatal = isinstance(cause, SystemError) or (isinstance(cause, KafkaException) and cause.args[0].fatal())
        if self._session.fenced or fatal:
            raise TransactionAborted(
                "another replay took over, or the brokers ended a transaction that took too long; "
                "what was sent back is noted, so a further replay goes on from there"
            ) from error
        if attempt == _ATTEMPTS:
            raise error

    def _producer(self, config: dict[str, Any]) -> Any:
        """A producer that notes why records were refused; what an earlier one still tells is of its own transactions."""
        self._reasons = reasons = []

        def on_delivery(error: KafkaError | None, _message: Message) -> None:
            if error is not None and error.code() not in _NOT_ABOUT_THE_RECORD:
                reasons.append(error.str())

        return self._new_producer({**config, "on_delivery": on_delivery})


class Unfenced:
    """Each letter, and its note after it, without transactions: one that dies in between has sent what is not noted."""

    def __init__(self, letters: Letters) -> None:
        #: Letters that it brought home, and those that another replay had noted meanwhile.
        self.sent = 0
        self.already = 0
        self._notes = letters.notes
        self._noted: dict[Place, int] = {}
        config = {**letters.address.librdkafka(), "log_level": 0}
        self._outbox = Outbox(config, retries=True, timeout_s=_DELIVERY_TIMEOUT_S)

    def open(self, *, again: bool = False) -> None:
        """Read what other replays noted; with ``again`` that does not count."""
        if not again:
            self._noted = self._notes.read()

    def close(self) -> None:
        """Give the connection back."""
        self._outbox.close()

    def deliver(self, letters: Homeward) -> Refused:
        """Send the records, and note them; gives those that the brokers refuse, or that they have but took no note of.

        Raises:
            KafkaUnreachable: no acknowledgement in time.
        """
        refused: Refused = []
        for letter, output in letters:
            if letter.place in self._noted:
                self.already += 1
            elif reason := self._send(output):
                refused.append((letter, reason))
            else:
                self.sent += 1
                if reason := self._send(self._notes.note(letter)):
                    refused.append((letter, f"sent, but not noted: {reason}"))
        return refused

    def _send(self, output: Output) -> str | None:
        """Gives why the brokers refuse the record; None: they have it."""
        try:
            self._outbox.produce(output)
        except KafkaException as error:
            return str(error.args[0].str())
        failures = self._outbox.flush()
        if not failures:
            return None
        if failures[0].code() in _NOT_ABOUT_THE_RECORD:
            raise KafkaUnreachable(f"a letter, or its note, was not acknowledged: {failures[0].str()}")
        return failures[0].str()


class Replay:
    """Chosen letters on their way back: looked through when this is made, sent by `send`."""

    def __init__(
        self, letters: Letters, choice: Choice, *, limit: int | None = None, again: bool = False, cut_too: bool = False
    ) -> None:
        """Without ``limit`` all of them; with it the oldest, so that what is sent back keeps its order.

        Raises `KafkaUnreachable` if they cannot be read.
        """
        #: None: nothing was tried.
        self.sent: int | None = None
        #: Left alone, as they were sent back before.
        self.already = 0
        #: What keeps letters from going home.
        self.findings = Findings()
        self._letters = letters
        self._choice = choice
        self._again = again
        self._cut_too = cut_too
        self._limit = limit
        #: Those that can go home; their content is not needed before they are sent.
        self.pending = Listing(self._look(), limit or _KEPT_LETTERS, newest=False)
        self._chosen = {letter.place for letter in self.pending.kept} if limit else None

    @property
    def due(self) -> int:
        """Letters that `send` sends."""
        return min(self.pending.letters, self._limit or self.pending.letters)

    def _look(self) -> Iterator[Letter]:
        missing = set(self._choice.places)
        for letter in self._letters.read(self._choice):
            missing.discard(letter.place)
            if self._is_done(letter):
                self.already += 1
            elif obstacle := self._obstacle(letter):
                self.findings.add(obstacle, f"{letter.place} from {letter.source}")
            else:
                yield letter._replace(value=None, headers=())
        for place in sorted(missing):
            self.findings.add("no letter there, or not one that the filters choose", str(place))

    def _is_done(self, letter: Letter) -> bool:
        return letter.replayed and not self._again

    def _obstacle(self, letter: Letter) -> str | None:
        if letter.origin is None:
            return "it does not say where it came from"
        if letter.origin.topic not in self._letters.partitions:
            return "the topic it came from does not exist"
        if letter.cut and not self._cut_too:
            return "it is not whole: --cut-too sends what there is of it"
        return None

    def send(self, sender: Transactions | Unfenced, on_progress: OnProgress = lambda through: None) -> None:
        """Send the letters home; what is refused becomes a finding, and the others go on.

        Raises:
            KafkaUnreachable, ConfigurationError, TransactionAborted, CommitUnconfirmed: as the sender.
        """
        self._letters.notes.create()
        before, through = self.already, 0
        try:
            sender.open(again=self._again)
            for chunk in _chunks(self._outgoing()):
                for letter, reason in sender.deliver(chunk):
                    self.findings.add(f"refused: {reason}", f"{letter.place} from {letter.source}")
                through += len(chunk)
                on_progress(through)
        finally:
            self.sent, self.already = sender.sent, before + sender.already
            sender.close()

    def _outgoing(self) -> Iterator[tuple[Letter, Output]]:
        for letter in self._letters.read(self._choice):
            chosen = self._chosen is None or letter.place in self._chosen
            if chosen and not self._is_done(letter) and self._obstacle(letter) is None:
                yield letter, self._home(letter)

    def _home(self, letter: Letter) -> Output:
        """The record as it came, where it came from, with a header that says so."""
        if letter.origin is None:
            raise AssertionError("a letter without origin is not sent")
        topic, partition, _ = letter.origin
        stays = partition < self._letters.partitions[topic] and letter.error != _WRONG_PARTITION
        # A record may come with headers that have no value; the type of an output does not know them.
        came_with = cast("list[tuple[str, bytes]]", [each for each in letter.headers if not each[0].startswith(OURS)])
        headers = [*came_with, (REPLAYED, str(letter.place).encode())]
        return Output(topic, letter.key, letter.value, partition if stays else None, headers=headers)


def _chunks(letters: Iterable[tuple[Letter, Output]]) -> Iterator[Homeward]:
    chunk: list[tuple[Letter, Output]] = []
    size_bytes = 0
    for letter, output in letters:
        chunk.append((letter, output))
        size_bytes += len(letter.key or b"") + len(letter.value or b"") + header_bytes(letter.headers)
        if len(chunk) == _CHUNK_RECORDS or size_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, size_bytes = [], 0
    if chunk:
        yield chunk
