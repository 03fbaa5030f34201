"""Deadlines that hold, though the call does not keep its own."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest

from streams_app import deadlines
from streams_app.deadlines import discard, within
from streams_app.errors import CommitUnconfirmed, KafkaUnreachable, TransactionAborted
from streams_app.outbox import Outbox
from streams_app.session import Consumed, Pin, Session
from tests.rig import wait_until


class Client:
    """Stands where a producer stands; calls named in ``hanging`` return when the test ends."""

    def __init__(self, hanging: set[str], ended: threading.Event) -> None:
        self.hanging = hanging
        self.ended = ended
        self.purged = threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> int:
            if name in self.hanging:
                self.ended.wait(20)  # not for ever: a session that believed in it would be found out
            return 0

        call.__name__ = name
        return call

    def __len__(self) -> int:
        return 3

    def fail(self) -> None:
        """Raise, as clients do."""
        raise ValueError("no")

    def purge(self) -> None:
        """Told before it is destroyed."""
        self.purged.set()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What hangs returns at the end of the test."""
    monkeypatch.setattr(deadlines, "_GRACE_S", 0.05)
    event = threading.Event()
    yield event
    event.set()


def opened(hanging: set[str], ended: threading.Event) -> Session:
    """A session in a transaction, whose producer hangs in these calls."""
    session = Session({}, "id", timeout_s=0.05, new_producer=lambda _: Client(hanging, ended))
    session.open()
    session.begin()
    return session


def test_a_call_gives_its_answer_or_its_error(ended: threading.Event) -> None:
    assert within(1.0, max, 1, 2) == 2
    with pytest.raises(ValueError, match="no"):
        within(1.0, Client(set(), ended).fail)


def test_an_error_keeps_no_client_alive(ended: threading.Event) -> None:
    """A client would be destroyed, which can take a minute, by whoever happens to collect the garbage."""
    gc.disable()
    try:
        client = Client(set(), ended)
        there = weakref.ref(client)
        with contextlib.suppress(ValueError):
            within(1.0, client.fail)
        del client
        wait_until(lambda: there() is None, "the client destroyed", 5)
    finally:
        gc.enable()


def test_a_discarded_client_is_told_and_destroyed(ended: threading.Event) -> None:
    client = Client(set(), ended)
    purged, there = client.purged, weakref.ref(client)
    discard(client, "purge")
    del client
    assert purged.wait(5)
    wait_until(lambda: there() is None, "the client destroyed", 5)


def test_a_session_whose_producer_hangs_before_the_end_is_aborted(ended: threading.Event) -> None:
    session = opened({"flush"}, ended)
    with pytest.raises(TransactionAborted):
        session.flush()
    assert session.broken
    session = opened({"send_offsets_to_transaction"}, ended)
    with pytest.raises(TransactionAborted):
        session.send_offsets([Consumed("t", 0, 1)], Pin("group", 1, "member"))
    assert session.broken
    session.open()
    assert not session.broken


def test_nobody_knows_the_outcome_of_a_commit_that_hangs(ended: threading.Event) -> None:
    session = opened({"commit_transaction"}, ended)
    with pytest.raises(CommitUnconfirmed):
        session.end()
    assert session.broken


def test_a_session_whose_producer_never_begins_says_so(ended: threading.Event) -> None:
    session = Session({}, "id", timeout_s=0.05, new_producer=lambda _: Client({"init_transactions"}, ended))
    with pytest.raises(KafkaUnreachable, match="id"):
        session.open()
    assert session.broken


def test_records_of_a_flush_that_hangs_are_not_heard_of(ended: threading.Event) -> None:
    box = Outbox({}, retries=False, timeout_s=0.05, new_producer=lambda _: Client({"flush"}, ended))
    assert len(box.flush()) == 3
