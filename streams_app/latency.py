"""How long answers took lately, for figures: percentiles of the last few seconds, of at most so many answers."""

from __future__ import annotations

import time
from collections import deque

_WINDOW_S = 10.0
_MOST = 20_000


class Latencies:
    """From the times that the records carry: that of the input, which its producer gave it, to that of the answer."""

    def __init__(self) -> None:
        self._last: deque[tuple[int, int]] = deque(maxlen=_MOST)

    def add(self, asked_ms: int, answered_ms: int) -> None:
        """One more; clocks may differ by more than it took."""
        self._last.append((answered_ms, max(0, answered_ms - asked_ms)))

    def figures(self) -> dict[str, int]:
        """Median and 99th percentile in milliseconds; nothing when nothing came lately."""
        # By the answers' own times: who reads a long history tells nothing of it as if it were now.
        now_ms, window_ms = time.time() * 1000, _WINDOW_S * 1000
        found = sorted(latency_ms for at_ms, latency_ms in self._last if abs(now_ms - at_ms) <= window_ms)
        if not found:
            return {}
        return {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100]}
