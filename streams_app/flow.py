"""What flows under one guarantee: its generated inputs, and how far the group has worked them off."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from streams_app.audit import AT_MOST_ONCE, TP, AuditedApp, Log
from streams_app.claims import Claim
from streams_app.generate import Feed

_RATE_WINDOW_S = 3.0


class Flow:
    """Of one app. The topics are of this run, begin at 0 and hold no transactions: their offsets are counts."""

    def __init__(self, app: AuditedApp, feeds: Sequence[Feed], partitions: Mapping[str, int]) -> None:
        """``partitions`` gives the number of partitions of each feed's topic."""
        self.guarantee = app.guarantee
        self.feeds = feeds
        #: Records behind the committed offsets.
        self.processed = 0
        #: Events that workers reported as given up; None: under this guarantee none is.
        self.given_up: int | None = 0 if app.guarantee == AT_MOST_ONCE else None
        self._app_id = app.app_id
        self._partitions = [(feed.topic, number) for feed in feeds for number in range(partitions.get(feed.topic, 0))]
        self._samples: deque[tuple[float, int, int]] = deque()

    @property
    def written(self) -> int:
        """Records that Kafka has acknowledged."""
        return sum(feed.acknowledged for feed in self.feeds)

    @property
    def waiting(self) -> int:
        """Records that are written and not processed."""
        return max(0, self.written - self.processed)

    def measure(self, log: Log, now_s: float) -> dict[TP, int]:
        """Ask for the committed offsets and take note of them; 0 where there is none yet.

        Raises:
            KafkaException: no answer.
        """
        metadata = log.metadata(self._app_id, self._partitions)
        if self.given_up is not None:
            claims = [Claim.parse(text) for _, text in metadata.values()]
            self.given_up = sum(claim.given_up for claim in claims if claim is not None)
        committed = dict.fromkeys(self._partitions, 0) | {tp: offset for tp, (offset, _) in metadata.items()}
        self.processed = sum(committed.values())
        self._samples.append((now_s, self.written, self.processed))
        while self._samples[0][0] < now_s - _RATE_WINDOW_S:
            self._samples.popleft()
        return committed

    def rates(self) -> tuple[float, float]:
        """Written and processed records per second, over the last few seconds."""
        if len(self._samples) < 2:
            return 0.0, 0.0
        first, last = self._samples[0], self._samples[-1]
        elapsed_s = last[0] - first[0]
        return (last[1] - first[1]) / elapsed_s, (last[2] - first[2]) / elapsed_s
