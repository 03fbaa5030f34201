"""A worker whose disk is full, or read-only, or broken."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from streams_app.errors import ExitCode, StoreFailed
from streams_app.slot import Slot, acquire
from tests.rig import rig

#: More than the worker's log has, less than RocksDB's has after ten thousand keys.
_LIMIT_BYTES = 64 * 1024


def test_a_full_disk_ends_the_worker_with_a_sentence_and_no_event_is_blamed(kafka_url: str, tmp_path: Path) -> None:
    """Other workers take over then. One that went on would hold partitions that it cannot keep the tables of."""
    with rig(kafka_url, tmp_path) as made:
        worker = made.worker().wait_started()
        _, most = resource.prlimit(worker.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (_LIMIT_BYTES, most))
        made.send(60_000, keys=60_000)
        assert worker.wait() == ExitCode.STORE_FAILED
        assert worker.says("Make room on the disk")
        made.worker().wait_started()
        made.wait_drained()
        made.stop()
        made.check()
        made.check_stores()


def note_member(slot: Slot) -> None:
    slot.member_id = "member"


@pytest.mark.parametrize("use", [note_member, lambda slot: slot.member_id, Slot.check])
def test_a_slot_that_the_disk_does_not_keep_is_told_as_such(tmp_path: Path, use: Callable[[Slot], object]) -> None:
    """Any other error ends the worker as one that may be started again at once, over and over."""
    slot = acquire(tmp_path, "app", "one")
    # Not even its owner may look behind what is no folder.
    slot.folder = tmp_path / "app" / "one" / "lock"
    with pytest.raises(StoreFailed, match="cannot be kept"):
        use(slot)
    slot.release()


def test_a_slot_that_the_disk_does_not_take_is_told_as_such(tmp_path: Path) -> None:
    """A worker on a read-only disk would end with exit code 1, which says nothing of a disk."""
    (tmp_path / "app").write_text("no folder")
    with pytest.raises(StoreFailed, match="cannot be kept"):
        acquire(tmp_path, "app", "one")


def test_a_disk_that_fails_at_a_rebalance_ends_the_worker(kafka_url: str, tmp_path: Path) -> None:
    """It would keep its partitions, paused, and say `rebalancing` for ever: nobody else would get them."""
    with rig(kafka_url, tmp_path) as made:
        worker = made.worker("one").wait_started()
        [slot] = Path(made.env["STREAMS_APP_DATADIR"]).glob("*/one")
        # No file can be written where a folder stands; that holds even for root, whom no mode stops.
        (slot / "member.new").mkdir()
        other = made.worker("two")
        assert worker.wait() == ExitCode.STORE_FAILED
        assert worker.says("cannot be kept")
        other.wait_started()
