"""The transactional session, with a producer that fails as scripted: what each error at each step means."""

from __future__ import annotations

from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException

from streams_app.errors import BatchError, CommitUnconfirmed, OutputRefused, PartitionsLost, TransactionAborted
from streams_app.session import Consumed, Outgoing, Output, Pin, Session, group_metadata, unfenced_group_metadata

PIN = Pin("group", 3, "member")


class FakeProducer:
    """Stands where confluent-kafka's `Producer` stands: does nothing, or raises what the script says for a step."""

    def __init__(self, config: dict[str, Any], script: dict[str, Any]) -> None:
        self.config = config
        self.script = script
        self.calls: list[str] = []

    def _do(self, step: str) -> Any:
        self.calls.append(step)
        outcome = self.script.get(step)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def init_transactions(self, timeout: float) -> None:
        assert timeout > 0
        self._do("init")

    def begin_transaction(self) -> None:
        self._do("begin")

    def produce(self, *args: Any, **kwargs: Any) -> None:
        self._do("produce")

    def produce_batch(self, topic: str, messages: list[dict[str, Any]], partition: int) -> int:
        self._do("produce")
        refused = self.script.get("refused")
        if refused is not None:
            messages[-1]["_error"] = refused
        return len(messages) - (refused is not None)

    def flush(self, timeout: float) -> int:
        assert timeout > 0
        return self._do("flush") or 0

    def send_offsets_to_transaction(self, offsets: list[Any], metadata: bytes, timeout: float) -> None:
        assert timeout > 0
        assert metadata == group_metadata(PIN)
        self._do("offsets")

    def commit_transaction(self, timeout: float) -> None:
        assert timeout > 0
        self._do("end")

    def poll(self, timeout: float) -> int:
        assert timeout == 0
        self.config["logger"].log(20, "%s [%s] %s", *self.script.get("heard", ("INIT", "producer", "nothing of note")))
        return 0

    def purge(self) -> None:
        self.calls.append("purge")


def kafka_error(code: int, **flags: bool) -> KafkaException:
    return KafkaException(KafkaError(code, "scripted", **flags))


def run(session: Session) -> None:
    session.begin()
    session.produce(Outgoing([Output("out", b"k", b"v")]))
    session.flush()
    session.send_offsets([Consumed("in", 0, 1)], PIN)
    session.end()


def opened(script: dict[str, Any]) -> tuple[Session, list[FakeProducer]]:
    made: list[FakeProducer] = []

    def new_producer(config: dict[str, Any]) -> FakeProducer:
        made.append(FakeProducer(config, script if len(made) == 0 else {}))
        return made[-1]

    session = Session({}, "id", new_producer=new_producer)
    session.open()
    return session, made


ERRORS = [
    kafka_error(KafkaError._TIMED_OUT, retriable=True),
    kafka_error(KafkaError.REQUEST_TIMED_OUT, retriable=True),
    kafka_error(KafkaError.INVALID_TXN_STATE, txn_requires_abort=True),
    kafka_error(KafkaError._FENCED, fatal=True),
    kafka_error(KafkaError.INVALID_PRODUCER_EPOCH, fatal=True),
    kafka_error(KafkaError.COORDINATOR_NOT_AVAILABLE, retriable=True),
    kafka_error(KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED, fatal=True),
    kafka_error(KafkaError._STATE),
    kafka_error(KafkaError.UNKNOWN),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.args[0].name())
@pytest.mark.parametrize("step", ["begin", "produce", "flush", "offsets"])
def test_any_error_before_the_end_means_that_nothing_took_effect(step: str, error: KafkaException) -> None:
    """Going on with the same producer could put old and new into one transaction."""
    session, _ = opened({step: error})
    with pytest.raises(TransactionAborted):
        run(session)
    assert session.broken


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.args[0].name())
def test_any_error_out_of_the_end_leaves_the_outcome_unknown(error: KafkaException) -> None:
    """Treated as aborted, a commit that did arrive would be done again."""
    session, _ = opened({"end": error})
    with pytest.raises(CommitUnconfirmed):
        run(session)
    assert session.broken


@pytest.mark.parametrize("code", [KafkaError.INVALID_RECORD, KafkaError.INVALID_TIMESTAMP, KafkaError._INCONSISTENT])
def test_a_record_that_the_brokers_refuse_is_found_out(code: int) -> None:
    """librdkafka says it where the end is asked for, and asks for none. As an unknown end it would be tried for ever."""
    session, _ = opened({"end": kafka_error(code, txn_requires_abort=True)})
    with pytest.raises(OutputRefused):
        run(session)
    assert session.broken


@pytest.mark.parametrize("code", [KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID])
def test_a_group_that_moved_on_means_that_the_partitions_are_lost(code: int) -> None:
    """Rewinding and trying again would fail for ever: somebody else owns them."""
    session, _ = opened({"offsets": kafka_error(code, txn_requires_abort=True)})
    with pytest.raises(PartitionsLost):
        run(session)
    assert session.broken


def test_a_record_that_is_refused_among_others_is_no_success() -> None:
    """A call for many says so by a number, and in the record, not by an error."""
    session, _ = opened({"refused": KafkaError(KafkaError.MSG_SIZE_TOO_LARGE, "scripted")})
    session.begin()
    with pytest.raises(OutputRefused):
        session.produce(Outgoing([Output("out", b"k", b"v"), Output("out", b"k", b"large")]))
    assert session.broken


def test_records_that_were_not_acknowledged_in_time_abort() -> None:
    """A flush that gives up says so by a number, not by an error."""
    session, _ = opened({"flush": 3})
    with pytest.raises(TransactionAborted, match="3 records"):
        run(session)
    assert session.broken


def test_whatever_flush_raises_after_a_fatal_error_aborts() -> None:
    """It would end the worker instead of starting a new producer."""
    session, _ = opened({"flush": SystemError("result with an exception set")})
    with pytest.raises(TransactionAborted):
        run(session)
    assert session.broken


@pytest.mark.parametrize("step", ["begin", "produce", "flush", "offsets", "end"])
def test_a_broken_session_does_nothing_until_it_is_opened_anew(step: str) -> None:
    """Producing on after a failed step is how effects of two batches get into one transaction."""
    session, made = opened({step: kafka_error(KafkaError._TIMED_OUT)})
    with pytest.raises(BatchError):
        run(session)
    calls = len(made[0].calls)
    with pytest.raises(TransactionAborted, match="not open"):
        session.begin()
    assert len(made[0].calls) == calls
    session.open()
    assert made[0].calls[-1] == "purge"
    run(session)
    assert made[1].calls == ["init", "begin", "produce", "flush", "offsets", "end"]


def test_an_open_that_fails_leaves_the_session_broken() -> None:
    """The old producer is gone by then."""
    session, made = opened({})
    made_before = len(made)
    session._new_producer = lambda config: FakeProducer(config, {"init": kafka_error(KafkaError._TIMED_OUT)})
    with pytest.raises(KafkaException):
        session.open()
    assert session.broken
    assert len(made) == made_before


def test_a_fence_is_noticed_where_another_callback_gets_the_blame() -> None:
    """confluent-kafka raises a fatal error in the next function of ours that it calls."""
    blamed = SystemError("<function Written.on_delivery> returned a result with an exception set")
    blamed.__cause__ = kafka_error(KafkaError._FENCED, fatal=True)
    session, _ = opened({"flush": blamed})
    with pytest.raises(TransactionAborted, match="_FENCED"):
        run(session)
    assert session.fenced


def test_a_fence_is_noticed_by_who_hands_over_records_behind_it() -> None:
    """It was told so in the background; the records are refused with another error, and a replay went on."""
    session, _ = opened({"refused": KafkaError(KafkaError._FATAL)})
    with pytest.raises(TransactionAborted, match="produce: _FATAL"):
        run(session)
    assert session.fenced


def test_a_fence_is_noticed() -> None:
    """Twice within a minute it means that the slot was copied: then another name is needed."""
    session, _ = opened({"end": kafka_error(KafkaError._FENCED, fatal=True)})
    with pytest.raises(CommitUnconfirmed):
        run(session)
    assert session.fenced
    session.open()
    assert not session.fenced


def test_a_commit_during_which_a_connection_broke_is_the_producers_last() -> None:
    """librdkafka may have sent EndTxn twice, and the second could end a later transaction of the same epoch."""
    session, _ = opened({"heard": ("FAIL", "producer", "Disconnected while requests still in-flight")})
    session.begin()
    session.send_offsets([Consumed("in", 0, 1)], PIN)
    session.end()
    assert session.broken


def test_a_commit_during_which_nothing_of_note_was_heard_is_not() -> None:
    session, _ = opened({})
    run(session)
    assert not session.broken


def test_a_commit_that_took_suspiciously_long_is_the_producers_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the same reason: it may have been retried."""
    session, _ = opened({})
    clock = iter([0.0, 5.0])
    session.begin()
    session.send_offsets([Consumed("in", 0, 1)], PIN)
    monkeypatch.setattr("streams_app.session.time.monotonic", lambda: next(clock))
    session.end()
    assert session.broken


@pytest.mark.parametrize("pin", [Pin("group", -1, "member"), Pin("group", 3, ""), Pin("group", -1, "")])
def test_a_pin_that_brokers_do_not_check_is_refused(pin: Pin) -> None:
    """Generation -1 or an empty member switch the fence off: a woken zombie would commit."""
    session, made = opened({})
    session.begin()
    with pytest.raises(PartitionsLost):
        session.send_offsets([Consumed("in", 0, 1)], pin)
    assert "offsets" not in made[0].calls


def test_a_transaction_without_offsets_is_refused() -> None:
    """It would not be fenced by the group."""
    session, _ = opened({})
    session.begin()
    with pytest.raises(AssertionError):
        session.send_offsets([], PIN)


def test_the_pin_is_packed_as_a_real_consumer_packs_it(kafka_url: str) -> None:
    """A new librdkafka may change its bytes; then nothing would be fenced, or nothing would commit."""
    consumer = Consumer({"bootstrap.servers": kafka_url.removeprefix("kafka://"), "group.id": "packed"})
    try:
        real = consumer.consumer_group_metadata()
    finally:
        consumer.close()
    assert unfenced_group_metadata(Pin("packed", -1, "")) == real
