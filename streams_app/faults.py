"""Named places where a test may make the process die: ``STREAMS_APP_CRASH_AT="3 end"``, or ``"3 end@5"`` for the 5th time.

Off unless the variable is set; then the process ends as by ``kill -9``, with nothing flushed and nobody told.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def _nothing(_name: str) -> None:
    """No fault is armed."""


def _crash_at(spec: str) -> Callable[[str], None]:
    name, _, count = spec.partition("@")
    remaining = int(count or 1)

    def step(reached: str) -> None:
        nonlocal remaining
        if reached == name:
            remaining -= 1
            if not remaining:
                os.kill(os.getpid(), signal.SIGKILL)

    return step


#: Called by the engine at its numbered steps.
step: Callable[[str], None] = (
    _crash_at(os.environ["STREAMS_APP_CRASH_AT"]) if "STREAMS_APP_CRASH_AT" in os.environ else _nothing
)
