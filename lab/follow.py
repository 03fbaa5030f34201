"""The followers of ``audit --follow`` at work *during* the run: what agents promise is judged while faults strike."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from streams_app.follow import Anomaly, Auditor

_POLL_S = 0.1

#: Called with the follower's name and what it found.
OnFinding = Callable[[str, Anomaly], None]


class LiveFollowers:
    """An auditor's followers, by name, with a consumer each; `run` is for a thread."""

    def __init__(self, auditor: Auditor, names: Iterable[str], on_finding: OnFinding) -> None:
        self._auditor = auditor
        self._names = frozenset(names)
        self._on_finding = on_finding
        self._stop = threading.Event()

    def run(self) -> None:
        """Judge what comes, until `stop`."""
        try:
            while not self._stop.is_set():
                self._auditor.step(self._tell)
        finally:
            self._auditor.close()

    def _tell(self, name: str, anomaly: Anomaly) -> None:
        # The auditor watches the apps, too: but under faults a transaction is open for as long as its coordinator is away.
        if name in self._names:
            self._on_finding(name, anomaly)

    def judge_all(self, timeout_s: float) -> list[str]:
        """Wait until all that is committed by now is judged; gives the followers that did not come so far in time."""
        now_s, deadline_s = time.time(), time.monotonic() + timeout_s
        while (late := self._behind(now_s)) and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        return late

    def _behind(self, at_s: float) -> list[str]:
        status = self._auditor.status
        lags_s = {name: each.cut_lag_s for name, each in status.followers.items()}
        return [name for name, lag_s in lags_s.items() if lag_s is None or status.at_s - lag_s < at_s]

    def stop(self) -> None:
        """Have `run` end."""
        self._stop.set()
