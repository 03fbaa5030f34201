"""Virtual time, what happens when, and which faults: the same faults give the same history, step by step.

Everything is an action at a time. A worker is a greenlet that sleeps until its next action; the hub, in the main greenlet,
takes the earliest action off a heap and does it. Between two actions nothing happens, so time jumps.

Wherever a history could take another turn, `World.fault` is asked, and answers 0 nearly always: "nothing special". Which of
the questions get another number, and which number, is the history's `Faults`: so it is drawn, recorded, repeated and shrunk.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import TypeAlias

from greenlet import getcurrent, greenlet

#: Number of a question to its answer; to all others the answer is 0.
Faults: TypeAlias = Mapping[int, int]

LATENCY_S = 0.001
_LARGEST_ANSWER = 1_000_000
#: A history that is longer has lost its way; healed ones take a few minutes at most.
_LONGEST_S, _MOST_ACTIONS, _MOST_QUESTIONS = 1_500.0, 30_000, 10_000


class Crash(BaseException):
    """Ends a worker as ``kill -9`` does: nobody may catch it and go on."""


class Stuck(BaseException):
    """Things happen for ever, and lead to nothing; no part of the engine may catch it."""


def drawn_faults(random: Random) -> dict[int, int]:
    """Faults for a history: some have one, some many, some of them in a row."""
    faults: dict[int, int] = {}
    apart = random.choice((3, 12, 40))
    at = random.randrange(0, 60)
    for _ in range(random.choice((1, 2, 2, 3, 3, 4, 6, 9))):
        faults[at] = random.randrange(1, _LARGEST_ANSWER)
        at += 1 + int(random.expovariate(1 / apart))
    return faults


class World:
    """The clock, the heap and the faults of one history."""

    def __init__(self, faults: Faults, story: list[str] | None = None) -> None:
        self.now_s = 0.0
        #: What happened, in words, if somebody wants to read it.
        self.story = story
        #: What happened, by kind.
        self.counts: Counter[str] = Counter()
        self._heap: list[tuple[float, int, Callable[[], object]]] = []
        self._number = itertools.count()
        self.hub: greenlet = getcurrent()
        self._faults = sorted(faults.items(), reverse=True)
        self._asked = -1
        self._next_fault, self._next_answer = self._faults.pop() if self._faults else (_MOST_QUESTIONS, 0)

    def fault(self) -> int:
        """0: nothing special."""
        self._asked += 1
        if self._asked < self._next_fault:
            return 0
        if self._asked >= _MOST_QUESTIONS:
            raise Stuck(f"after {self.now_s:.0f} s and {self._asked} steps things still happen")
        answer = self._next_answer
        self._next_fault, self._next_answer = self._faults.pop() if self._faults else (_MOST_QUESTIONS, 0)
        return answer

    @property
    def asked(self) -> int:
        """How often a fault could have happened."""
        return self._asked + 1

    def at(self, delay_s: float, action: Callable[[], object]) -> None:
        """Do something later."""
        heapq.heappush(self._heap, (self.now_s + delay_s, next(self._number), action))

    def wait(self, seconds: float) -> None:
        """Let time pass for the running greenlet, and others do what they do meanwhile."""
        due_s = self.now_s + seconds
        if self._heap and self._heap[0][0] <= due_s:
            heapq.heappush(self._heap, (due_s, next(self._number), getcurrent().switch))
            self.hub.switch()
        else:
            self.now_s = due_s

    def park(self) -> None:
        """Let the running greenlet rest until somebody switches to it."""
        self.hub.switch()

    def run(self) -> None:
        """Until nothing is left to be done.

        Raises:
            Stuck: that does not come.
        """
        heap = self._heap
        for _ in range(_MOST_ACTIONS):
            if not heap:
                return
            self.now_s, _, action = heapq.heappop(heap)
            action()
            if self.now_s > _LONGEST_S:
                break
        raise Stuck(f"after {self.now_s:.0f} s things still happen")

    def tell(self, who: str, what: str) -> None:
        """Add to the story."""
        if self.story is not None:
            self.story.append(f"{self.now_s:8.3f} s  {who:<10} {what}")
