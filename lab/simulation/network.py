"""Requests, and what can become of them: late, lost, unanswered, repeated, and their senders dead or frozen meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError

from lab.simulation.world import LATENCY_S

if TYPE_CHECKING:
    from lab.simulation.process import Process

#: Around the time-outs: a retry's, of a suspicious commit (1), a commit of offsets (5), the session (8), a transaction (10).
_DELAYS_S = (0.02, 0.3, 0.9, 1.6, 4.0, 6.0, 9.0, 11.5, 16.0, 45.0)
_RECONNECT_S = 0.1


class NoAnswer(Exception):
    """None came in time."""


class Broken(Exception):
    """The connection broke while an answer was waited for."""


class Asked:
    """A request under way: who asks, what it does at the broker, and until when its answer is of use."""

    __slots__ = ("apply", "deadline_s", "on_break", "process", "what", "world")

    def __init__(
        self,
        process: Process,
        what: str,
        apply: Callable[[], Any],
        deadline_s: float,
        on_break: Callable[[], None] | None,
    ) -> None:
        self.process = process
        self.world = process.world
        self.what = what
        self.apply = apply
        self.deadline_s = deadline_s
        self.on_break = on_break

    def arrive(self) -> Any:
        """Take effect."""
        answer = self.apply()
        if self.world.story is not None:
            self.world.tell(self.process.name, f"{self.what}{_in_words(answer)}")
        return answer

    def later(self, delay_s: float) -> None:
        """Take effect some time later, whatever becomes of the sender."""
        self.note("late request", f"{self.what} is on its way for {delay_s:g} s")
        self.world.at(delay_s, self.arrive_late)

    def arrive_late(self) -> None:
        """Take effect when nobody may wait for it any more."""
        answer = self.apply()
        if self.world.story is not None:
            self.world.tell(self.process.name, f"  the late {self.what} arrives{_in_words(answer)}")

    def wait(self, seconds: float) -> None:
        """Wait for an answer that takes that long.

        Raises:
            NoAnswer: that is too long.
        """
        left_s = self.deadline_s - self.world.now_s
        self.process.sleep(min(seconds, max(left_s, 0.0)))
        if seconds > left_s:
            self.note(None, f"{self.what}: no answer in time")
            raise NoAnswer(self.what)

    def note(self, kind: str | None, text: str) -> None:
        """Count and tell a fault."""
        if kind is not None:
            self.world.counts[kind] += 1
        if self.world.story is not None:
            self.world.tell(self.process.name, f"! {text}")

    def repeat(self) -> Any:
        """librdkafka's silent retry, over a new connection."""
        if self.on_break is None:
            self.process.sleep(LATENCY_S)
            raise Broken(self.what)
        self.on_break()
        self.wait(_RECONNECT_S)
        return ask(self.process, self.what, self.apply, self.deadline_s, self.on_break)


def ask(
    process: Process,
    what: str,
    apply: Callable[[], Any],
    deadline_s: float,
    on_break: Callable[[], None] | None = None,
) -> Any:
    """Send a request and wait for its answer. ``on_break``: told when the connection breaks; then the request is repeated.

    Raises:
        NoAnswer: not by ``deadline_s``; the request may have arrived, or arrive later.
        Broken: the connection broke, and the request is not one that is repeated; the same.
        Crash: the worker is no more.
    """
    fault = process.world.fault()
    process.sleep(LATENCY_S)
    if not fault:
        answer = apply()
        if process.world.story is not None:
            process.world.tell(process.name, f"{what}{_in_words(answer)}")
        return answer
    asked = Asked(process, what, apply, deadline_s, on_break)
    fault, delay = divmod(fault, len(_DELAYS_S))
    return _FATES[fault % len(_FATES)](asked, _DELAYS_S[delay], fault // len(_FATES))


def _slow(asked: Asked, delay_s: float, _more: int) -> Any:
    if asked.world.now_s + delay_s > asked.deadline_s:
        asked.later(delay_s)
        asked.wait(delay_s)
    asked.note("slow request", f"{asked.what} takes {delay_s:g} s")
    asked.wait(delay_s)
    return asked.arrive()


def _late_answer(asked: Asked, delay_s: float, _more: int) -> Any:
    answer = asked.arrive()
    asked.note("late answer", f"the answer takes {delay_s:g} s")
    asked.wait(delay_s)
    return answer


def _lost_answer(asked: Asked, _delay_s: float, _more: int) -> Any:
    asked.arrive()
    asked.note("lost answer", "the answer is lost")
    asked.wait(float("inf"))


def _lost_request(asked: Asked, _delay_s: float, _more: int) -> Any:
    asked.note("lost request", f"{asked.what} is lost")
    asked.wait(float("inf"))


def _broken(asked: Asked, delay_s: float, more: int) -> Any:
    """The connection breaks, before the request was sent, after it took effect, or with the request still on its way."""
    if more % 3 == 1:
        asked.arrive()
    elif more % 3 == 2:
        # About when the next transaction is under way, or much later.
        asked.later(_RECONNECT_S + 0.001 * (more // 6 % 30) if more // 3 % 2 else delay_s)
    asked.note("broken connection", "the connection breaks")
    return asked.repeat()


def _crash(asked: Asked, delay_s: float, more: int) -> Any:
    """The worker is killed: before it has asked, when it has taken effect, or with the request on its way."""
    if more % 3 == 1:
        asked.arrive()
    elif more % 3 == 2:
        asked.later(delay_s)
    asked.process.crash(f"at {asked.what}", more // 3)


def _freeze(asked: Asked, delay_s: float, more: int) -> Any:
    """The worker is frozen: before it asks, before it sees the answer, or with the request on its way."""
    delay_s *= 2
    more, where = divmod(more, 3)
    if where == 0:
        asked.process.freeze(delay_s)
        return asked.arrive()
    if where == 1:
        answer = asked.arrive()
        asked.process.freeze(delay_s)
    else:
        asked.later(delay_s * (0.5, 1.5)[more % 2])
        asked.process.freeze(delay_s)
        asked.wait(float("inf"))
    if asked.world.now_s > asked.deadline_s and more % 2:
        # Woken, it finds both: the answer has come, and the time is over.
        raise NoAnswer(asked.what)
    return answer


def _group(asked: Asked, delay_s: float, more: int) -> Any:
    asked.process.change_group(delay_s, more)
    return asked.arrive()


_FATES: tuple[Callable[[Asked, float, int], Any], ...] = (
    _slow,
    _late_answer,
    _lost_answer,
    _lost_request,
    _broken,
    _broken,
    _crash,
    _crash,
    _freeze,
    _freeze,
    _group,
)


def _in_words(answer: Any) -> str:
    code = answer[0] if isinstance(answer, tuple) else answer
    return f": {KafkaError(code).name()}" if isinstance(code, int) and code else ""
