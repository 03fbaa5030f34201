"""Whether this process is alive and ready, with reasons: ``GET /livez``, ``GET /readyz``.

*Alive*: what must move does (watchdog.py). Who is not is ended by the watchdog; whoever asks is told a while before that.
*Ready*: the process does what it was started for. It is not while one of these is true of a guarantee that it runs:

=================== ===============================================================================================
reason              means
=================== ===============================================================================================
``joining``         the group has not given it partitions, or none, for the first time
``rebalancing``     partitions are being given out anew
``restoring``       tables are read from their changelogs; ``progress`` from 0 to 1, ``remaining_s``
``starting``        partitions are being started, again after the trouble that ``detail`` names
``no_progress``     there is input to read, and nothing was committed for a while
``copying``         it answers from copies of tables, which are not read to their ends yet
``kafka``           no broker answers
``slot_lost``       somebody took its slot from it; it ends
``stopping``        it was asked to end
=================== ===============================================================================================

A worker with nothing to do is ready; one that waits minutes for a slow agent is alive, and not ready.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from faust.types import TP
from mode import Service

from streams_app.deadlines import discard
from streams_app.errors import SlotLost, StoreFailed

if TYPE_CHECKING:
    from streams_app.application import App
    from streams_app.faust_adapter import Assignment

_LOOK_EVERY_S = 1.0
#: So many looks in a row that found input, and no commit: more than the time-outs of one commit.
_STALLED_LOOKS = 45
_PROBE_EVERY_S, _PROBE_TIMEOUT_S = 5.0, 5.0
#: So many probes in a row must fail: one alone may have met a broker that restarts.
_PROBES_FAILED = 2


class Reason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why not."""

    reason: str
    detail: str
    guarantee: str | None = None
    #: From 0 to 1.
    progress: float | None = None
    remaining_s: float | None = None


class Health(Service):
    """Looks at the engines, the slots and Kafka, and remembers what takes two looks to know."""

    def __init__(self, app: App, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._app = app
        self._stalls = {each.guarantee: Stall() for each in app.family}
        self._admin: AdminClient | None = None
        self._failed_probes = 0
        self._slot_lost: SlotLost | None = None

    async def on_stop(self) -> None:
        self._give_up_admin()

    # -- What is asked.

    def reasons(self) -> list[Reason]:
        """Why this process is not ready; none: it is."""
        found = [reason for app in self._app.family for reason in self.reasons_of(app)]
        return [*found, *self.reasons_of_process()]

    def reasons_of_process(self) -> list[Reason]:
        """Why it is not ready for any guarantee."""
        found = []
        if self._app.should_stop:
            found.append(Reason("stopping", "it was asked to end"))
        if self._failed_probes >= _PROBES_FAILED:
            found.append(Reason("kafka", f"no broker answers at {self._app.kafka.servers}"))
        if self._slot_lost is not None:
            found.append(Reason("slot_lost", str(self._slot_lost)))
        return found

    def reasons_of(self, app: App) -> list[Reason]:
        """Why it is not ready for one guarantee."""
        if not app.runs_here:
            return [*_of_copies(app)]
        return [*_of_engine(app), *self._stalls[app.guarantee].reasons(app)]

    # -- What looks.

    @Service.task
    async def _look(self) -> None:
        while not self.should_stop:
            for app in self._app.family:
                if app.runs_here:
                    self._stalls[app.guarantee].look(app)
                await self._check_slot(app)
            await self.sleep(_LOOK_EVERY_S)

    async def _check_slot(self, app: App) -> None:
        try:
            app.check_slot()
        except SlotLost as error:
            if self._slot_lost is None:
                self._slot_lost = error
                await app.crash(error)
        except StoreFailed as error:
            await app.crash(error)

    @Service.task
    async def _probe(self) -> None:
        while not self.should_stop:
            answered = await self._asked_kafka()
            self._failed_probes = 0 if answered else self._failed_probes + 1
            if self._failed_probes == _PROBES_FAILED:
                self.log.error("no Kafka broker answers at %s", self._app.kafka.servers)
            await self.sleep(_PROBE_EVERY_S)

    async def _asked_kafka(self) -> bool:
        if self._admin is None:
            self._admin = AdminClient({**self._app.kafka.librdkafka(), "log_level": 0})
        asked = asyncio.wrap_future(self._admin.describe_cluster(request_timeout=_PROBE_TIMEOUT_S))
        await asyncio.wait({asked}, timeout=2 * _PROBE_TIMEOUT_S)
        error = asked.exception() if asked.done() else None
        # A broker that said no did say so.
        if asked.done() and (error is None or (isinstance(error, KafkaException) and error.args[0].code() >= 0)):
            return True
        # After a restart of the broker it may get no answer for a minute; a new one does.
        self._give_up_admin()
        return False

    def _give_up_admin(self) -> None:
        admin, self._admin = self._admin, None
        if admin is not None:
            discard(admin)


class Stall:
    """Partitions with input whose committed position does not move.

    Counts looks, not time: a frozen process looks at nothing. Only those count at which the engine works: while it restores,
    nothing can move. What was counted before stays: an engine that fails, pauses and starts anew for hours moves nothing.
    """

    def __init__(self) -> None:
        self._seen: dict[TP, int] = {}
        self._looks: dict[TP, int] = {}

    def look(self, app: App) -> None:
        """Once a second."""
        if not app.engine.is_working:
            self._keep(app.engine.assignment)
            return
        lag, positions = dict(readable(app)), dict(app.engine.positions)
        self._looks = {tp: self._counted(tp, position, lag.get(tp)) for tp, position in positions.items()}
        self._seen = positions

    def _counted(self, tp: TP, position: int, lag: int | None) -> int:
        """How many looks by now; ``lag`` is None until something was fetched since the partition was started."""
        looks = self._looks.get(tp, 0)
        if lag is None and self._seen.get(tp) == position:
            return looks
        return looks + 1 if lag and self._seen.get(tp) == position else 0

    def _keep(self, assignment: Assignment | None) -> None:
        """Forget the partitions that are somebody else's by now."""
        ours = assignment.partitions if assignment is not None else frozenset()
        self._seen = {tp: position for tp, position in self._seen.items() if tp in ours}
        self._looks = {tp: looks for tp, looks in self._looks.items() if tp in ours}

    def reasons(self, app: App) -> Iterator[Reason]:
        """Empty: there is none."""
        stalled = [f"{tp.topic}-{tp.partition}" for tp, looks in self._looks.items() if looks >= _STALLED_LOOKS]
        if stalled:
            seconds = max(self._looks.values()) * _LOOK_EVERY_S
            text = f"nothing of {', '.join(sorted(stalled))} was committed for {seconds:.0f} s, though there is input"
            yield Reason("no_progress", text, app.guarantee)


def readable(app: App) -> Iterator[tuple[TP, int]]:
    """Of each partition, how many offsets are not done, up to the first transaction that its writer has not ended."""
    reads = app.input.reads()
    for tp, position in app.engine.positions.items():
        last_stable = reads[tp].last_stable if tp in reads else None
        if last_stable is not None:
            yield tp, last_stable - position


def _of_engine(app: App) -> Iterator[Reason]:
    engine, guarantee = app.engine, app.guarantee
    assignment = engine.assignment
    if assignment is None:
        yield Reason("joining", "waits for the group to give it partitions", guarantee)
    elif assignment.over.is_set():
        yield Reason("rebalancing", "partitions are being given out anew", guarantee)
    elif not engine.is_working:
        restoring = engine.restoring
        if restoring.began_s is not None:
            progress = round(restoring.done / restoring.total, 4)
            yield Reason("restoring", restoring.text, guarantee, progress, restoring.remaining_s)
        else:
            yield Reason("starting", engine.trouble or "partitions are being started", guarantee)


def _of_copies(app: App) -> Iterator[Reason]:
    if any(table.is_followed for table in app.transactional_tables()) and not app.replicas.is_current:
        yield Reason("copying", f"{app.replicas.records:,} records of copies were read so far", app.guarantee)


def register(app: App) -> None:
    """Serve ``/livez`` and ``/readyz``."""

    @app.page("/livez")
    async def livez(view: Any, request: Any) -> Any:
        late = app.watchdog.late()
        status = HTTPStatus.SERVICE_UNAVAILABLE if late else HTTPStatus.OK
        return view.json({"alive": not late, "reasons": msgspec.to_builtins(late)}, status=status.value)

    @app.page("/readyz")
    async def readyz(view: Any, request: Any) -> Any:
        reasons = app.health.reasons()
        status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
        running = {each.guarantee: each.slot.name for each in app.family if each.runs_here and each.has_slot}
        body = {"ready": not reasons, "reasons": msgspec.to_builtins(reasons), "slots": running}
        return view.json(body, status=status.value)
