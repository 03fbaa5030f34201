"""A worker's process as the world sees it: it lives in a slot, belongs to a group, freezes, dies, and is started again.

Its engine runs in a greenlet (worker.py). The consumer's thread (heartbeats, joining, assignments) has none: what it does are
actions of the world, which go on while the engine waits for an answer, and do not while the process is frozen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

from confluent_kafka import KafkaError
from faust.types import TP
from greenlet import getcurrent, greenlet

from lab.simulation.broker import Broker
from lab.simulation.disk import Folder
from lab.simulation.network import Broken, NoAnswer, ask
from lab.simulation.plan import CHANGELOGS, GROUP, Plan
from lab.simulation.world import Crash, World
from streams_app.errors import PartitionsLost
from streams_app.faust_adapter import Assignment
from streams_app.session import Pin

if TYPE_CHECKING:
    from lab.simulation.cluster import Cluster

SESSION_S = 8.0
_REVOKE_S = 4.0
_COMMIT_TIMEOUT_S = 5.0
_HEARTBEAT_S = 0.02
_LATE_NOTICE_S = (0.5, 1.5, 3.0)
_MOVED_ON = frozenset({KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID})


class Slot:
    """What outlives a process: its name, its disks, and the member that it was last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.disks = {tp: Folder() for tp in CHANGELOGS}
        self.member_id: str | None = None
        self.members = 0


class Process:
    """See the module."""

    def __init__(self, cluster: Cluster, slot: Slot, run: Callable[[Process], None]) -> None:
        self.cluster = cluster
        self.world: World = cluster.world
        self.broker: Broker = cluster.broker
        self.plan: Plan = cluster.plan
        self.slot = slot
        self.name = slot.name
        self.is_dead = False
        #: Asked to stop in good order.
        self.is_finishing = False
        self.has_stopped = False
        self.assignment: Assignment | None = None
        self.live_pin: Pin | None = None
        self.is_idle = True
        self._member: str | None = None
        self._frozen_until_s = 0.0
        self._is_parked = False
        self._joins_when_idle = False
        # Whoever makes it may be an engine itself, and must not go on when this one has ended.
        self.greenlet = _Engine(partial(run, self), parent=self.world.hub)
        self.greenlet.process = self

    # -- What the engine does.

    def check_alive(self) -> None:
        """Raise `Crash` if the process is no more."""
        if self.is_dead:
            raise Crash

    def sleep(self, seconds: float) -> None:
        """Let time pass; longer, if the process is frozen meanwhile."""
        world = self.world
        if self.is_dead:
            raise Crash
        world.wait(seconds)
        if self.is_dead:
            raise Crash
        while self._frozen_until_s > world.now_s:
            world.wait(self._frozen_until_s - world.now_s)
            if self.is_dead:
                raise Crash

    def pause(self, assignment: Assignment, seconds: float) -> None:
        """Wait so long, or until the assignment is over."""
        self.check_alive()
        until_s = self.world.now_s + seconds
        while self.world.now_s < until_s and not assignment.over.is_set() and not self.is_finishing:
            self.sleep(min(0.5, until_s - self.world.now_s + 0.0001))

    def park(self) -> None:
        """Rest until the assignment changes."""
        self._is_parked = True
        self.world.park()
        self._is_parked = False
        self.sleep(0)

    def wake(self) -> None:
        """End the rest."""
        if self._is_parked:
            self._is_parked = False
            self.world.at(0, self.greenlet.switch)

    def step(self, name: str) -> None:
        """A named place in the engine's code; it may be the last."""
        self.check_alive()
        fault = self.world.fault()
        if not fault:
            return
        kind, more = fault % 4, fault // 4
        if kind < 2:
            self.crash(f"at step {name!r}", more)
        elif kind == 2:
            self.freeze((0.5, 6.0, 9.0, 12.0, 25.0)[more % 5])
        else:
            self.change_group((0.02, 0.5, 9.0)[more % 3], more // 3)

    def commit_once(self, pin: Pin, commits: Mapping[TP, tuple[int, str]]) -> None:
        """As `ConsumerThread.commit_once`: one request, never sent again; without an answer the membership is given up."""
        if not pin.is_valid or pin != self.live_pin:
            raise PartitionsLost(f"the membership is {self.live_pin}, not {pin} any more")
        apply = partial(self.broker.group.commit, pin, commits)
        try:
            code = ask(self, "OffsetCommit", apply, self.world.now_s + _COMMIT_TIMEOUT_S)
        except (NoAnswer, Broken) as error:
            self._give_up_membership(pin, error)
        if code in _MOVED_ON:
            raise PartitionsLost(f"the group has moved on since {pin}")
        assert not code

    def _give_up_membership(self, pin: Pin, error: Exception) -> NoReturn:
        # As the adapter does: whatever member it is by now, it is no more; only the pin's is left for.
        for member in dict.fromkeys((pin.member_id, self._member or pin.member_id)):
            self._expect_no_more(member)
        self.live_pin = self._member = None
        with contextlib.suppress(NoAnswer, Broken):
            ask(
                self,
                "LeaveGroup",
                partial(self.broker.group.leave, pin.member_id),
                self.world.now_s + _COMMIT_TIMEOUT_S,
            )
        self.world.at(_HEARTBEAT_S, self._join_again)
        raise PartitionsLost("nobody knows whether offsets were committed") from error

    def aside(self, run: Callable[[], None]) -> None:
        """Do something in another thread of the process: it dies and is frozen with it."""
        thread = _Engine(run, parent=self.world.hub)
        thread.process = self
        self.world.at(0, thread.switch)

    # -- What happens to it.

    @property
    def frozen_s(self) -> float:
        """How much longer it is frozen."""
        return max(0.0, self._frozen_until_s - self.world.now_s)

    def crash(self, where: str, more: int = 0) -> NoReturn:
        """End here, as by SIGKILL; started again a little later."""
        self.die(where, more)
        raise Crash

    def die(self, where: str, more: int = 0) -> None:
        """End, whatever it is doing; once."""
        if self.is_dead:
            return
        self.is_dead = True
        self.world.counts["crash"] += 1
        self.world.tell(self.name, f"! is killed {where}")
        if self._member is not None:
            self._expect_no_more(self._member)
        more, wait = divmod(more, 4)
        self.cluster.start_again(self.slot, (0.5, 0.05, 5.0, 30.0)[wait], more)
        self.wake()

    def freeze(self, seconds: float) -> None:
        """Stop here, as by SIGSTOP, and go on after so many seconds."""
        self.world.counts["zombie" if seconds > SESSION_S else "pause"] += 1
        self.world.tell(self.name, f"! is frozen for {seconds:g} s")
        self._frozen_until_s = max(self._frozen_until_s, self.world.now_s + seconds)
        if self._member is not None and seconds > SESSION_S:
            self._expect_no_more(self._member)
        self.sleep(0)
        self.world.tell(self.name, "goes on")

    def _expect_no_more(self, member: str) -> None:
        """Its heartbeats have ended: so does its session."""
        self.world.at(SESSION_S, partial(self._end_session, member))

    def _end_session(self, member: str) -> None:
        if member not in self.broker.group.members:
            return
        self.world.tell("group", f"the session of {member} ends")
        self.broker.group.leave(member)
        self._later(self._notice, member)

    def change_group(self, delay_s: float, more: int) -> None:
        """Something happens in the group, to this worker or another, now or soon."""
        self.world.at(delay_s if more % 2 else 0.0, partial(self.cluster.change_group, more // 2))

    def lose_session(self) -> None:
        """Its heartbeats got lost, though it is well."""
        if self._member is not None:
            self.world.counts["lost session"] += 1
            self._end_session(self._member)

    def finish(self) -> None:
        """Asked to stop in good order."""
        if not self.is_finishing and not self.is_dead:
            self.world.counts["clean stop"] += 1
            self.world.tell(self.name, "! is asked to stop")
            self.is_finishing = True
            self.wake()

    def stopped(self) -> None:
        """The engine has ended in good order: leave the group."""
        self.has_stopped = self.is_dead = True
        if self._member is not None:
            self.broker.group.leave(self._member)
        self.slot.member_id = None
        self.world.tell(self.name, "has stopped")
        self.cluster.start_again(self.slot, 0.5, 0)

    # -- The consumer's thread.

    def _later(self, action: Callable[..., None], *args: object) -> None:
        """As soon as a heartbeat comes round, and the process is not frozen."""
        fault = self.world.fault()
        delay_s = _LATE_NOTICE_S[fault % len(_LATE_NOTICE_S)] if fault else _HEARTBEAT_S
        self.world.at(max(delay_s, self.frozen_s + 0.5 * delay_s), partial(self._if_awake, action, *args))

    def _if_awake(self, action: Callable[..., None], *args: object) -> None:
        if self.is_dead:
            return
        if self.frozen_s:
            self.world.at(self.frozen_s + _HEARTBEAT_S, partial(self._if_awake, action, *args))
            return
        action(*args)

    def become_member(self) -> str:
        """Get a member id, as somebody new."""
        self.slot.members += 1
        self._member = self.slot.member_id = f"{self.name}-{self.slot.members}"
        return self._member

    def join_first(self) -> None:
        """Join the group, as somebody new."""
        self.broker.group.join(self.become_member())

    def notice_rebalance(self) -> None:
        """The group's coordinator tells with a heartbeat that a rebalance has begun."""
        if self._member in self.broker.group.members:
            self._later(self._notice, self._member)

    def _notice(self, member: str) -> None:
        group = self.broker.group
        if member != self._member:
            return
        if member not in group.members:
            self._lose()
        elif group.rebalancing and member not in group.joined:
            self._revoke(lost=False)

    def _join_again(self) -> None:
        if self._member is None:
            self._revoke(lost=True)

    def _lose(self) -> None:
        self.live_pin = self._member = None
        self._revoke(lost=True)

    def _revoke(self, *, lost: bool) -> None:
        """Tell the engine; join when it is through with its batch, or has not come to an end in time."""
        if self.is_dead:
            return
        self.world.tell(self.name, f"learns that its partitions are {'lost' if lost else 'revoked'}")
        if self.assignment is not None:
            self.assignment.end(lost=lost)
        self.wake()
        if self.is_idle:
            self._join()
        else:
            self._joins_when_idle = True
            self.world.at(_REVOKE_S, partial(self._if_awake, self._join_anyway, self.assignment))

    def idle(self) -> None:
        """The engine is through with its assignment."""
        self.check_alive()
        self.is_idle = True
        if self._joins_when_idle:
            self._join()

    def _join_anyway(self, assignment: Assignment | None) -> None:
        if self._joins_when_idle and assignment is self.assignment:
            if assignment is not None:
                assignment.end(lost=True)
            self._join()

    def _join(self) -> None:
        self._joins_when_idle = False
        if self._member is not None and self._member in self.broker.group.members:
            self.broker.group.join(self._member)
        elif not self.is_finishing:
            self.join_first()

    def joined(self) -> None:
        """A rebalance has ended: learn the assignment."""
        group = self.broker.group
        if self._member in group.members:
            self._later(self._learn, self._member, group.generation)

    def _learn(self, member: str, generation: int) -> None:
        group = self.broker.group
        if member != self._member or member not in group.members or group.generation != generation:
            return
        if group.rebalancing:
            return  # there is a next one already, and a heartbeat has told so, or will
        assert self.assignment is None or self.assignment.over.is_set()
        partitions = frozenset(group.members[member])
        self.live_pin = Pin(GROUP, generation, member)
        numbers = [tp.partition for tp in sorted(partitions)]
        self.world.tell(self.name, f"is {self._member} of generation {generation}, with partitions {numbers}")
        self.assignment = Assignment(self.live_pin, partitions)
        self.wake()


class _Engine(greenlet):
    process: Process


def running() -> Process:
    """The process whose engine runs."""
    return cast(_Engine, getcurrent()).process
