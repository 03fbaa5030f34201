"""Named places where a test may make the process die or freeze.

``STREAMS_APP_FAULT="kill 3 end"`` ends it there as by ``kill -9``, with nothing flushed and nobody told;
``"stop 2 offsets@5"`` freezes it, the fifth time it comes by, until somebody sends SIGCONT. Off unless the variable is set.
What librdkafka was handed before has time to leave: so it is known what the brokers have.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping

_TO_LEAVE_S = 0.2
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _nothing(_name: str) -> None:
    """No fault is armed."""


def armed(env: Mapping[str, str] = os.environ) -> Callable[[str], None]:
    """The function to call at each named place."""
    if "STREAMS_APP_FAULT" not in env:
        return _nothing
    action, _, place = env["STREAMS_APP_FAULT"].partition(" ")
    name, _, count = place.partition("@")
    remaining = int(count or 1)

    def step(reached: str) -> None:
        nonlocal remaining
        if reached == name:
            remaining -= 1
            if not remaining:
                time.sleep(_TO_LEAVE_S)
                # To this thread: a signal to the process wakes another one, and this one may go on meanwhile.
                signal.pthread_kill(threading.get_ident(), _SIGNALS[action])

    return step


#: Called by the engine at its numbered steps.
step: Callable[[str], None] = armed()
