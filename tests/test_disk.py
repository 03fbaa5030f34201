"""A worker whose disk is full."""

from __future__ import annotations

import resource
from pathlib import Path

from streams_app.errors import ExitCode
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
