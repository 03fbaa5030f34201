"""librdkafka's blocking calls with deadlines that hold, and its clients destroyed where nobody waits for it.

It takes a time-out for most calls, and does not keep them all. Measured with 2.16.0: after its broker was killed and had come
back, ``send_offsets_to_transaction(…, 10 s)`` did not return for minutes, as the search for the group's coordinator looks at
its time-out only when some connection changes its state (rdkafka_coord.c). The destruction of a client waits for all its
threads, the closing of a consumer that looks for its coordinator takes a minute.

What hangs is left behind, in a thread of its own. So whoever calls must be able to go on without it: a session by a new
producer, which fences the old one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

#: librdkafka's own time-out gets that much more time to be kept.
_GRACE_S = 1.0
#: What librdkafka is told as the time-out of a question to a group's coordinator. It must not be over as long as its client
#: lives: a question that has timed out before the coordinator is found is answered twice when it is, and the assertion
#: ``eonce->refcnt > 0`` ends the process (2.16.1, rdkafka_coord.c; a broker that was away for long enough suffices). Whoever
#: asks bounds the wait for the answer's future, and gives the client up when there is none.
COORDINATOR_TIMEOUT_S = 3600.0

#: What a thread is asked to call, and where its answer goes.
_Calls: TypeAlias = "SimpleQueue[tuple[Future[Any], Any, Any]]"
#: Threads that wait for a call. Those that hang are not among them; so there are as many as have been needed at a time.
_idle: deque[_Calls] = deque()


def within(timeout_s: float, call: Callable[..., T], *args: Any) -> T:
    """Call, and wait a little longer than the call itself is to take.

    Raises:
        TimeoutError: it did not return; it may still do so at any time, or never.
    """
    answer: Future[T] = Future()
    try:
        caller = _idle.pop()
    except IndexError:
        caller = SimpleQueue()
        threading.Thread(target=_serve, args=(caller,), name="librdkafka", daemon=True).start()
    caller.put((answer, call, args))
    try:
        return answer.result(timeout_s + _GRACE_S)
    except TimeoutError:
        log.warning("librdkafka's %s did not return within its %g s and is left behind", call.__name__, timeout_s)
        raise
    finally:
        del answer  # has the error, whose traceback leads here: see _answer


def _serve(calls: _Calls) -> None:
    """A thread: one call after the other, as long as they return."""
    while True:
        _answer(calls, *calls.get())


def _answer(calls: _Calls, answer: Future[Any] | None, call: Any, args: Any) -> None:
    assert answer is not None
    try:
        result = call(*args)
    except BaseException as error:  # noqa: BLE001 - handed over to who waits
        _idle.append(calls)
        answer.set_exception(error)
    else:
        _idle.append(calls)
        answer.set_result(result)
    finally:
        # The error's traceback leads here: with this circle the client would live until the garbage is collected, and then
        # be destroyed by whoever collects it.
        answer = call = args = result = None


def discard(client: Any, last_call: str | None = None) -> None:
    """Destroy a client to which the caller keeps no reference, after a last call of this name."""
    threading.Thread(target=_discard, args=(client, last_call), name="librdkafka", daemon=True).start()


def _discard(client: Any, last_call: str | None) -> None:
    if last_call is not None:
        getattr(client, last_call)()
