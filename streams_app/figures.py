"""What the engine of one guarantee has done since the process started; written once a batch, read by metrics.py."""

from __future__ import annotations

import re
import time
from collections import Counter

from faust.types import TP
from prometheus_client import Histogram

from streams_app.batch import Batch

#: From a commit on loopback to one that runs into its time-outs.
_COMMIT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1_800)


class Figures(Counter[str]):
    """Counts by name, and beside them what has a partition, a reason or a duration."""

    def __init__(self) -> None:
        super().__init__()
        #: Records of committed batches, by input partition.
        self.events_of: Counter[TP] = Counter()
        #: Batches, by what they were dropped for.
        self.dropped: Counter[str] = Counter()
        #: Starts of partitions that had to be tried anew, by what was wrong.
        self.troubles: Counter[str] = Counter()
        #: Events set aside, by the code of their dead letters.
        self.set_aside: Counter[str] = Counter()
        self.commit_s = Histogram("commit", "See metrics.py.", registry=None, buckets=_COMMIT_BUCKETS_S)
        self.latency_s = Histogram("latency", "See metrics.py.", registry=None, buckets=_LATENCY_BUCKETS_S)
        #: By the monotonic clock; to begin with when the process began.
        self.committed_s = time.monotonic()

    @property
    def committed_age_s(self) -> float:
        """Since the last commit, or the beginning."""
        return time.monotonic() - self.committed_s

    def committed(self, batch: Batch, took_s: float) -> None:
        """A batch took effect."""
        now_s = time.time()
        self.committed_s = time.monotonic()
        self["batches"] += 1
        self["events"] += len(batch.events)
        self["outputs"] += len(batch.outputs) + batch.sent_at_once
        self["table_writes"] += sum(len(overlay.writes) for overlay in batch.overlays.values())
        self["dead_letters"] += len(batch.set_aside)
        for letter in batch.set_aside.values():
            self.set_aside[dict(letter.headers or ())["dlq.error"].decode()] += 1
        self.commit_s.observe(took_s)
        for tp, messages in batch.messages.items():
            if messages:
                self.events_of[tp] += len(messages)
                self.latency_s.observe(max(0.0, now_s - messages[0].timestamp))

    def drop(self, reason: str) -> None:
        """A batch was dropped."""
        self["dropped_batches"] += 1
        self.dropped[reason] += 1


def named(error: BaseException | type[BaseException]) -> str:
    """An error's class as a label: ``CommitUnconfirmed`` is ``commit_unconfirmed``."""
    kind = error if isinstance(error, type) else type(error)
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
