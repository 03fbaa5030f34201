"""What each guarantee does at the turns of a batch; everything else is the same for all three (engine.py).

============== ============================== ========================== ===============================================
turn           exactly once                   at least once              at most once
============== ============================== ========================== ===============================================
start          fence the dead, claim          the same                   claim, and count what was given up
before an      nothing                        nothing                    commit the offsets, once: whatever dies from
agent sees it                                                            here on, nobody reads these events again
a send         waits in the batch             leaves at once             leaves at once, is never sent again
commit         outputs, tables and offsets    outputs are acknowledged;  outputs are acknowledged or counted; tables as
               in one transaction             then tables and offsets    well as it goes
                                              in one transaction
at rest        nothing                        nothing                    commit the offsets as "nothing in hand"
an agent       the batch is delivered again   the same                   its event is set aside, the others go on
raises
============== ============================== ========================== ===============================================

The methods block and run in the engine's thread, one after the other.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias
from uuid import uuid4

from faust.types import TP

from streams_app.batch import Batch, Overlay
from streams_app.claims import Claim
from streams_app.commit import changelog_records, commit, expire_all, publish
from streams_app.errors import TransactionAborted
from streams_app.faults import step
from streams_app.offsets import Committed
from streams_app.outbox import Outbox
from streams_app.session import Consumed, Pin, Session, Written

log = logging.getLogger(__name__)

#: Offset and metadata of each partition.
Commits: TypeAlias = Mapping[TP, tuple[int, str]]
#: Commits under a pin, one try: `Consumer.commit_once`.
CommitOnce: TypeAlias = Callable[[Pin, Commits], None]

#: A second fence within this time means that somebody else runs under our transactional id: take a fresh one.
_FENCE_WINDOW_S = 60.0


class Guarantee:
    """Base: what none of them does."""

    #: Whether an event whose agent raised is delivered again.
    redelivers = True
    #: Whether offsets are committed before the agents see the events.
    claims_first = False
    #: Whether the next batch may be filled while one commits.
    pipelined = False

    def new_batch(self, pin: Pin) -> Batch:
        """An empty batch."""
        raise NotImplementedError

    def open(self) -> None:
        """Get ready for the start of partitions."""

    def fence(self, transactional_id: str) -> None:
        """End the transaction that a dead worker left pending."""

    def claim(
        self, positions: Mapping[tuple[str, int], int], found: Mapping[tuple[str, int], Committed], pin: Pin
    ) -> None:
        """Commit where the input goes on, under our own name; what was committed before was ``found``."""
        raise NotImplementedError

    def take(self, batch: Batch, began: Mapping[TP, int]) -> None:
        """Before the events of ``batch`` are delivered; ``began`` says where it begins."""

    def commit(self, batch: Batch) -> None:
        """Make a batch take effect whose events are all done."""
        raise NotImplementedError

    def rest(self, positions: Mapping[TP, int], pin: Pin) -> None:
        """Nothing is in hand: all up to ``positions`` is done."""

    def forget(self) -> None:
        """The last batch was dropped and is delivered again."""

    def after_trouble(self) -> None:
        """Before the partitions are started anew."""

    def close(self) -> None:
        """Give the connections back."""


class ExactlyOnce(Guarantee):
    """Outputs, table writes and offsets in one transaction."""

    pipelined = True

    def __init__(self, config: dict[str, Any], name: str, timeout_s: float) -> None:
        """``name`` is the transactional id."""
        self._config = config
        self._name = name
        self._fenced_at_s = -_FENCE_WINDOW_S
        self.session = Session(config, name, timeout_s=timeout_s)

    def new_batch(self, pin: Pin) -> Batch:
        return Batch(pin)

    def open(self) -> None:
        self.session.open()

    def fence(self, transactional_id: str) -> None:
        """By taking over its transactional id for a moment."""
        if transactional_id == self.session.transactional_id:
            return  # opening our own session has done that
        session = Session(self._config, transactional_id)
        try:
            session.open()
        finally:
            session.close()

    def claim(
        self, positions: Mapping[tuple[str, int], int], found: Mapping[tuple[str, int], Committed], pin: Pin
    ) -> None:
        self.session.begin()
        self.session.send_offsets((Consumed(*tp, offset) for tp, offset in positions.items()), pin)
        self.session.end()

    def commit(self, batch: Batch) -> None:
        if self.session.broken:
            self.session.open()
        commit(batch, self.session, _now_ms())

    def after_trouble(self) -> None:
        """A second fence within a minute: somebody else runs under our transactional id (a copied slot). Leave it to them."""
        if not self.session.fenced:
            return
        now_s = time.monotonic()
        if now_s - self._fenced_at_s < _FENCE_WINDOW_S:
            self.session.rename(f"{self._name}-{uuid4().hex[:8]}")
            log.error(
                "fenced twice: another worker uses the same slot name; going on as %s", self.session.transactional_id
            )
        self._fenced_at_s = now_s

    def close(self) -> None:
        self.session.close()


class AtLeastOnce(ExactlyOnce):
    """Outputs at once; when they are acknowledged, table writes and offsets in one transaction.

    The transaction is there for its fence: a paused worker that wakes would write stale values behind its successor's, and
    the next restore would lose what was counted.
    """

    #: Its flush would wait for what the next batch sends meanwhile, and blame this one for it.
    pipelined = False

    def __init__(self, config: dict[str, Any], name: str, timeout_s: float) -> None:
        super().__init__(config, name, timeout_s)
        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)

    def new_batch(self, pin: Pin) -> Batch:
        return Batch(pin, self._outbox)

    def open(self) -> None:
        super().open()
        self._outbox.renew()

    def forget(self) -> None:
        """What a dropped batch sent is not the next one's failure."""
        self._outbox.flush()

    def commit(self, batch: Batch) -> None:
        step("1 prepare: outputs sent")
        self._outbox.flush_or_raise()
        super().commit(batch)

    def close(self) -> None:
        super().close()
        self._outbox.close()


class Unfenced(Guarantee):
    """Base of those that commit offsets without a transaction, under their pin, and tables as well as it goes."""

    def __init__(self, config: dict[str, Any], commit_once: CommitOnce, timeout_s: float, *, retries: bool) -> None:
        self._outbox = Outbox(config, retries=retries, timeout_s=timeout_s)
        self._commit_once = commit_once

    def new_batch(self, pin: Pin) -> Batch:
        return Batch(pin, self._outbox, redelivers=self.redelivers)

    def open(self) -> None:
        self._outbox.renew()

    def forget(self) -> None:
        """What a dropped batch sent is not the next one's failure."""
        self._outbox.flush()

    def close(self) -> None:
        self._outbox.close()

    def _produce_tables(self, batch: Batch) -> dict[Overlay, Written]:
        """Send the table writes to the changelogs; where they stand is known after a flush."""
        now_ms = _now_ms()
        return {
            overlay: self._outbox.produce_changelog(overlay.topic, partition, changelog_records(overlay, now_ms))
            for (_, partition), overlay in batch.overlays.items()
            if overlay.writes
        }


class AtLeastOnceUnfenced(Unfenced):
    """At least once where the cluster permits no transactions.

    Its limit: a worker that was paused, taken for dead and woken may write stale table values behind its successor's.
    """

    def __init__(self, config: dict[str, Any], commit_once: CommitOnce, timeout_s: float) -> None:
        super().__init__(config, commit_once, timeout_s, retries=True)

    def claim(
        self, positions: Mapping[tuple[str, int], int], found: Mapping[tuple[str, int], Committed], pin: Pin
    ) -> None:
        self._commit_once(pin, {TP(*tp): (offset, "") for tp, offset in positions.items()})

    def commit(self, batch: Batch) -> None:
        step("1 prepare: begin")
        stale = expire_all(batch)
        written = self._produce_tables(batch)
        self._outbox.flush_or_raise()
        failed = next((each.error for each in written.values() if each.error is not None), None)
        if failed is not None:
            raise TransactionAborted(f"a changelog record was not taken: {failed.str()}")
        step("2 offsets")
        self._commit_once(batch.pin, {tp: (offset, "") for tp, offset in batch.consumed.items()})
        publish(stale, written)


class AtMostOnce(Unfenced):
    """Offsets first; then whatever happens, nobody reads these events again. What may be lost is counted (claims.py)."""

    redelivers = False
    claims_first = True

    def __init__(
        self,
        config: dict[str, Any],
        commit_once: CommitOnce,
        timeout_s: float,
        figures: Counter[str],
        is_member: Callable[[], bool] = lambda: True,
    ) -> None:
        """No output leaves later than ``timeout_s`` after it was sent, nor when the worker is no member any more."""
        super().__init__(config, commit_once, timeout_s, retries=False)
        self._is_member = is_member
        self._figures = figures
        self._given_up: dict[TP, int] = {}
        #: Offsets up to which nobody else will read.
        self._claimed: dict[TP, int] = {}
        #: What the brokers know: the committed offset, and where the batch in hand begins.
        self._said: dict[TP, tuple[int, int]] = {}

    def new_batch(self, pin: Pin) -> Batch:
        # Nothing fences what leaves: woken as a zombie, it would come behind what others have sent meanwhile.
        return Batch(pin, self._outbox, redelivers=False, is_member=self._is_member)

    def claim(
        self, positions: Mapping[tuple[str, int], int], found: Mapping[tuple[str, int], Committed], pin: Pin
    ) -> None:
        self._given_up, self._said, newly = {}, {}, 0
        self._claimed = {TP(*tp): offset for tp, offset in positions.items()}
        for tp, offset in self._claimed.items():
            before, claim = found[tp].offset, Claim.parse(found[tp].metadata)
            given_up = 0
            if before is not None:
                # Events deleted before anybody read them are given up, too.
                given_up = (claim.reported(before) if claim else 0) + max(0, offset - before)
            newly += given_up - (claim.given_up if claim else 0)
            self._given_up[tp] = given_up
        self._say(dict(self._claimed), pin)
        self._count(newly, "by whoever had these partitions before")

    def take(self, batch: Batch, began: Mapping[TP, int]) -> None:
        for tp, offset in batch.consumed.items():
            # What was taken back from an earlier batch, and is still in memory, stays claimed.
            self._claimed[tp] = max(self._claimed[tp], offset)
        step("0 claim")
        self._say(began, batch.pin)
        step("0 claimed")

    def _say(self, began: Mapping[TP, int], pin: Pin) -> None:
        """Commit what the brokers do not know yet."""
        news = {tp: (offset, began[tp]) for tp, offset in self._claimed.items()}
        news = {tp: said for tp, said in news.items() if said != self._said.get(tp)}
        if news:
            claims = {
                tp: (offset, Claim(pin.member_id, began, self._given_up[tp])) for tp, (offset, began) in news.items()
            }
            self._commit_once(pin, {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()})
            self._said |= news

    def commit(self, batch: Batch) -> None:
        stale = expire_all(batch)
        written = self._produce_tables(batch)
        step("1 prepare: outputs produced")
        lost = len(self._outbox.flush()) + batch.given_up
        step("4 publish")
        publish(stale, written)
        step("5 published")
        if lost:
            # Which partition's they were is not known, and all that counts is the sum.
            self._given_up[next(iter(batch.consumed))] += lost
            self._count(lost, "as their outputs were not acknowledged, or their agent ended or took too long")

    def rest(self, positions: Mapping[TP, int], pin: Pin) -> None:
        # Behind the position there may be events that were claimed and that no agent has begun: they are given back.
        self._claimed = dict(positions)
        self._say(positions, pin)

    def _count(self, events: int, why: str) -> None:
        if events:
            self._figures["given_up"] += events
            log.warning("at most %d events were given up %s; in all %d", events, why, sum(self._given_up.values()))


def _now_ms() -> int:
    return int(time.time() * 1000)
