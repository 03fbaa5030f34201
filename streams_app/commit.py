"""The commit path: prepare → offsets → end → publish. The one place where a batch takes effect.

Runs in a thread of its own (librdkafka releases the interpreter's lock). Who owns which fact:

======================== ======================== ====================================================
fact                     owner                    set by
======================== ======================== ====================================================
consumed offset          the batch                the consumer's thread, in the step that gives records
pin (membership)         the batch                the same step
outputs, table writes    the batch                the agents, until the barrier
transaction state        the session              this module
written changelog offset the delivery report      `Session.produce_changelog`
value and checkpoint     the store                step 4, and the restore
======================== ======================== ====================================================

A process killed at any of these steps leaves:

before 3: an open transaction that the next owner of the partitions aborts. Nothing happened; the events are read again.
in 3: either of the two others; the stable offsets tell the next owner which.
between 3 and 4: committed, with a store that lags behind its changelog; the restore makes up for it from the checkpoint.
in 4: the same, for each store on its own: values and checkpoint are one atomic write.
"""

from __future__ import annotations

from streams_app.batch import Batch, Overlay
from streams_app.faults import step
from streams_app.session import Session, Written
from streams_app.store import TIME_BYTES

#: Expired keys deleted per table partition and batch: a backlog must not make one batch slow, nor grow under load.
_EXPIRE_AT_LEAST, _EXPIRE_PER_WRITE = 1_000, 2


def commit(batch: Batch, session: Session, now_ms: int) -> None:
    """Make ``batch`` take effect, wholly or not at all.

    Raises:
        TransactionAborted: nothing took effect.
        PartitionsLost: nothing took effect, and the partitions are somebody else's.
        CommitUnconfirmed: nobody knows; the local tables are behind if it did.
    """
    # All of it once: whoever drops the batch meanwhile must not tear its transaction.
    outputs, overlays, stale = batch.outputs, batch.overlays, expire_all(batch)
    step("1 prepare: begin")
    session.begin()
    session.produce(outputs)
    step("1 prepare: outputs produced")
    written = {
        overlay: session.produce_changelog(overlay.topic, partition, changelog_records(overlay, now_ms))
        for (_, partition), overlay in overlays.items()
        if overlay.writes
    }
    step("2 offsets")
    # While the records are on their way: together they take two thirds of the time that they take one after the other.
    session.send_offsets(batch.offsets(), batch.pin)
    session.flush()
    step("3 end")
    session.end()
    step("4 publish")
    publish(stale, written)
    step("5 published")


def expire_all(batch: Batch) -> dict[Overlay, list[bytes]]:
    """Let expire, once, what does in the tables that a batch wrote; gives the index entries that go with it."""
    if batch.stale is None:
        batch.stale = {overlay: expire(overlay) for overlay in batch.overlays.values()}
    return batch.stale


def expire(overlay: Overlay) -> list[bytes]:
    """Delete, in the overlay, what expires by the partition's record time; give the index entries that go with it."""
    stale = []
    limit = max(_EXPIRE_AT_LEAST, _EXPIRE_PER_WRITE * len(overlay.writes))
    for index_key, key in overlay.store.expired(overlay.clock_ms, limit):
        stale.append(index_key)
        if key is not None and key not in overlay.writes:
            overlay.writes[key] = None
    return stale


def changelog_records(overlay: Overlay, now_ms: int) -> list[tuple[bytes, bytes | None, int | None]]:
    """The overlay as changelog records; the time of a value that expires is its record's timestamp."""
    if overlay.store.expires_ms is None:
        return [(key, value, None) for key, value in overlay.writes.items()]
    return [
        (key, None, now_ms) if stored is None else (key, stored[TIME_BYTES:], int.from_bytes(stored[:TIME_BYTES]))
        for key, stored in overlay.writes.items()
    ]


def publish(stale: dict[Overlay, list[bytes]], written: dict[Overlay, Written]) -> None:
    """Let the stores take over what was committed."""
    for overlay, index_keys in stale.items():
        if overlay in written:
            overlay.store.publish(overlay.writes, index_keys, written[overlay].offset)
            step("4 publish: a store")
