"""How long answers took lately, for figures: percentiles of the last few seconds, of at most so many answers."""

from __future__ import annotations

import time
from collections import deque

_WINDOW_S = 10.0
_MOST = 2_000


class Latencies:
    """From the times that the records carry: that of the input, which its producer gave it, to that of the answer."""

    def __init__(self) -> None:
        self._last: deque[tuple[float, int]] = deque(maxlen=_MOST)

    def add(self, latency_ms: int) -> None:
        """One more; clocks may differ by more than it took."""
        self._last.append((time.monotonic(), max(0, latency_ms)))

    def figures(self) -> dict[str, int]:
        """Median and 99th percentile in milliseconds; nothing when nothing came lately."""
        begin_s = time.monotonic() - _WINDOW_S
        found = sorted(latency_ms for at_s, latency_ms in self._last if at_s >= begin_s)
        if not found:
            return {}
        return {"p50": found[len(found) // 2], "p99": found[len(found) * 99 // 100]}
