"""The start of partitions, in this order: producer → stable offsets → claim → high watermarks → restore → positions.

It takes the place of Faust's ``perform_seek``, ``seek_to_committed`` and the waits around them, and runs, blocking, in a
thread. Each step is only right after the one before it:

- a new producer aborts what this worker's predecessor left open, and so does fencing for other dead workers: their
  offsets become stable, and nothing of theirs holds up readers;
- stable offsets fix where the input goes on: a committed transaction's offset and table values belong together, so the
  changelogs' ends may only be asked *after* the offsets are stable;
- the claim commits these offsets once more under our own pin and name. It proves that the membership is current and that
  transactions, where they are needed, are permitted; it fixes the start of partitions without an offset, and whoever
  follows us finds our name on them;
- the restore reads up to the high watermark, so that no committed value is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from streams_app.errors import PartitionsLost, StartRefused
from streams_app.guarantees import Guarantee
from streams_app.offsets import TP, Committed, Offsets
from streams_app.restore import Restoring, restore
from streams_app.session import Pin
from streams_app.store import Checkpoint, Store

#: Clocks are set right by so much without being wrong.
_CLOCK_LEEWAY_MS = 60_000


@dataclass(frozen=True)
class Started:
    """Where the input goes on."""

    positions: dict[TP, int]
    restored_records: int


class Start:
    """What the start of partitions needs."""

    def __init__(
        self,
        offsets: Offsets,
        guarantee: Guarantee,
        restore_config: Mapping[str, Any],
        *,
        from_latest: bool = False,
        restoring: Restoring | None = None,
        hide: Callable[[TP], None] = lambda _tp: None,
    ) -> None:
        """Before a store is restored from the beginning of its changelog, it is told to ``hide``."""
        self._offsets = offsets
        self._guarantee = guarantee
        self._restore_config = restore_config
        self._from_latest = from_latest
        self._restoring = restoring or Restoring()
        self._hide = hide

    def run(self, pin: Pin, inputs: list[TP], stores: Mapping[TP, Store], cancelled: Callable[[], bool]) -> Started:
        """Start ``inputs``, and the ``stores`` by their changelog partitions.

        Raises:
            PartitionsLost: the assignment ended meanwhile.
            StartRefused: input or offsets are gone; going on would lose events or apply them twice.
            TransactionAborted, CommitUnconfirmed, KafkaUnreachable, KafkaException: trouble; try again.
        """
        self._guarantee.open()
        self._fence_the_dead(inputs)
        committed = self._offsets.stable(inputs, self._guarantee.fence, cancelled)
        self._check_over(cancelled)
        positions = self._resolve(inputs, committed, stores)
        if positions:
            self._guarantee.claim(positions, committed, pin)
        self._check_over(cancelled)
        restored = self._restore(stores, cancelled)
        self._check_over(cancelled)
        return Started(positions, restored)

    def _fence_the_dead(self, inputs: list[TP]) -> None:
        """End what workers left open that had these partitions and are no members any more.

        Their pending offsets would be noticed, and waited for. But a worker can die before it has sent offsets: then its
        outputs and changelog records hold up every reader behind them until the broker times the transaction out.
        """
        for transactional_id in self._offsets.dead_owners(inputs):
            self._guarantee.fence(transactional_id)

    def _resolve(
        self, inputs: list[TP], committed: Mapping[TP, Committed], stores: Mapping[TP, Store]
    ) -> dict[TP, int]:
        begins, ends = self._offsets.beginnings(inputs), self._offsets.high_watermarks(inputs)
        fresh = [tp for tp in inputs if committed[tp].offset is None]
        if fresh:
            self._check_offsets_not_expired(fresh, stores)
        positions = {}
        for tp in inputs:
            offset = committed[tp].offset
            if offset is None:
                offset = ends[tp] if self._from_latest else begins[tp]
            if offset < begins[tp] and not self._guarantee.redelivers:
                offset = begins[tp]  # whatever was deleted unread is counted as given up
            if not begins[tp] <= offset <= ends[tp]:
                raise StartRefused(
                    f"the group is committed up to {offset} of {tp[0]}-{tp[1]}, which now holds {begins[tp]} to {ends[tp]}: "
                    "events were deleted before they were processed, or the topic was created anew. Going on would lose "
                    "them silently; when that is acceptable, reset the offsets of the group with Kafka's own tools"
                )
            positions[tp] = offset
        return positions

    def _check_offsets_not_expired(self, fresh: Iterable[TP], stores: Mapping[TP, Store]) -> None:
        changelogs = [tp for tp in stores if tp[1] in {partition for _, partition in fresh}]
        begins, ends = self._offsets.beginnings(changelogs), self._offsets.high_watermarks(changelogs)
        # Asked last: who has written the table meanwhile, while we were frozen, has committed offsets, too.
        known = {partition for _, partition in self._offsets.group_has_offsets()} if changelogs else set()
        for tp in changelogs:
            if ends[tp] > begins[tp] and tp[1] not in known:
                raise StartRefused(
                    f"the group has no offsets for partition {tp[1]}, but its table {tp[0]} is not empty: the offsets "
                    "expired (brokers keep them 7 days after the last worker left) or were deleted. Reading the input from "
                    "the start would apply it twice; set the group's offsets with Kafka's own tools"
                )

    def _restore(self, stores: Mapping[TP, Store], cancelled: Callable[[], bool]) -> int:
        if not stores:
            return 0
        ends = self._offsets.high_watermarks(stores)
        kept_ms = self._offsets.tombstones_kept_ms(topic for topic, _ in stores)
        starts = {
            tp: trusted_start(store, ends[tp], kept_ms[tp[0]], partial(self._hide, tp)) for tp, store in stores.items()
        }
        restore(self._restore_config, stores, starts, ends, self._restoring, cancelled)
        return self._restoring.records

    def _check_over(self, cancelled: Callable[[], bool]) -> None:
        if cancelled():
            raise PartitionsLost("the assignment ended while its partitions were starting")


def trusted_start(store: Store, end: int, tombstones_kept_ms: int, hide: Callable[[], None] = lambda: None) -> int:
    """The changelog offset to restore from; a store that cannot be trusted is wiped first, behind a call of ``hide``.

    A deleted key's tombstone is itself deleted after a time; a checkpoint older than half of it could miss some.
    """
    checkpoint = store.checkpoint
    if checkpoint is None and not store.corrupt:
        return 0
    if store.corrupt or checkpoint is None or not _is_trusted(checkpoint, store.topic_id, end, tombstones_kept_ms):
        hide()
        store.wipe()
        return 0
    return checkpoint.offset + 1


def _is_trusted(checkpoint: Checkpoint, topic_id: str, end: int, tombstones_kept_ms: int) -> bool:
    # One that was written by a clock that was ahead, and has been set right, says nothing of its age.
    age_ms = time.time() * 1000 - checkpoint.written_ms
    is_young = -_CLOCK_LEEWAY_MS <= age_ms <= tombstones_kept_ms / 2
    return checkpoint.topic_id == topic_id and checkpoint.offset < end and is_young
