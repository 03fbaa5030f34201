"""The wire between one worker and the brokers: a proxy on loopback, with faults that can be healed.

Every broker has a listener for every wire and advertises the wire's port for it (``EmbeddedKafka.ensure(…, wires=n)``). So
whoever starts from `Wire.url` stays on this wire, whatever broker or coordinator it is sent to, and nobody else is on it::

    worker ──> advertised port 1 ── Wire ──> listener of broker 1
          └──> advertised port 2 ──  ·  ──> listener of broker 2

=================  =====================================================  ===============================================
fault              while it lasts                                         when it is healed
=================  =====================================================  ===============================================
``cut``            connections are reset, new ones too                    new ones work
``half_open``      connections stand, new ones too, nothing passes        they are reset, what was held back is lost
``delay``          everything arrives later, in its order                 what was held back arrives
``lose_answers``   the broker did it, its answer silences the connection  silent connections are reset
``delay_answers``  the broker did it, its answer and all behind it wait   what was held back arrives
=================  =====================================================  ===============================================

Only what a real network can do happens here: bytes arrive late, or the connection ends. Never does an answer arrive without
the one before it; aiokafka would take it for an error of the protocol, and librdkafka, which knows answers by their number,
would go on as if little had happened. So a lost answer silences its connection, in both directions, until that is reset.
What was sent arrives even if its sender hung up meanwhile: that is how a delayed EndTxn meets a later transaction.
`half_open` is the firewall that forgot a connection: bytes that it swallowed leave a hole which only a reset can end. The
partition after which TCP sends everything again is a `delay` longer than the fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Concatenate, NamedTuple, ParamSpec, Self

log = logging.getLogger(__name__)
P = ParamSpec("P")

HOST = "127.0.0.1"
#: The wire's thread only waits for bytes: it answers at once unless the machine stands still.
THREAD_TIMEOUT_S = 30
#: Kafka's own bound for requests, ``socket.request.max.bytes``; answers are smaller by default.
MAX_FRAME_BYTES = 100 * 1024 * 1024
#: Frames that wait in one direction of a connection, then the sender has to: clients have fewer under way.
MAX_FRAMES = 1000
#: Requests whose answer may still come. Those that get none (Produce with acks=0) fall out in time.
MAX_PENDING = 10_000


class Api(IntEnum):
    """Kafka's numbers of the requests whose lost answers hurt."""

    PRODUCE = 0
    OFFSET_COMMIT = 8
    INIT_PRODUCER_ID = 22
    END_TXN = 26
    TXN_OFFSET_COMMIT = 28


class _Frame(NamedTuple):
    """A request, an answer to the API ``answers``, or (empty) the end of the connection."""

    content: bytes
    arrived_s: float
    answers: int | None = None


@dataclass
class _Faults:
    """What is broken now. Belongs to the wire's thread."""

    cut: bool = False
    half_open: bool = False
    delay_s: float = 0.0
    answer_delays_s: dict[int | None, float] = field(default_factory=dict)
    lost_answers: Counter[int | None] = field(default_factory=Counter)
    silence_s: float = 0.0

    def delays_s(self, frame: _Frame) -> dict[str, float]:
        """How long each fault holds the frame back."""
        answer_s = self.answer_delays_s.get(frame.answers, 0.0)
        return {name: s for name, s in (("delay", self.delay_s), ("delay_answers", answer_s)) if s > 0}

    def left_s(self, frame: _Frame) -> float:
        """How long the frame has to wait from now on."""
        return frame.arrived_s + sum(self.delays_s(frame).values()) - time.monotonic()


def _in_its_thread(change: Callable[Concatenate[Wire, P], None]) -> Callable[Concatenate[Wire, P], None]:
    """The method runs in the wire's thread, whoever waits there looks again, and the caller waits for both."""

    @functools.wraps(change)
    def call(wire: Wire, /, *args: P.args, **kwargs: P.kwargs) -> None:
        async def run() -> None:
            change(wire, *args, **kwargs)
            wire._changed.set()
            wire._changed = asyncio.Event()

        if wire._loop is None:
            raise RuntimeError("the wire is not started, or closed")
        asyncio.run_coroutine_threadsafe(run(), wire._loop).result(THREAD_TIMEOUT_S)

    return call


class Wire:
    """One worker's way to the brokers. Faults may be set and healed from any thread, and are in force on return.

    Attributes:
        struck: how often each fault met something, by its method's name: connections for ``cut``, else requests and answers.
        requests: how many requests came from the worker, by API.
    """

    def __init__(self, ports: Sequence[tuple[int, int]]) -> None:
        """
        Args:
            ports: for each broker the port to listen on and the one to forward to.
        """
        self.ports = tuple(ports)
        self.struck: Counter[str] = Counter()
        self.requests: Counter[int] = Counter()
        self._faults = _Faults()
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = asyncio.Event()
        self._connections: set[_Connection] = set()

    @property
    def url(self) -> str:
        """What the worker gets as ``KAFKA_URL``."""
        return ",".join(f"kafka://{HOST}:{listens}" for listens, _ in self.ports)

    def start(self) -> Self:
        """Listen, once.

        Raises:
            OSError: one of the ports is taken.
        """
        started: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="wire", daemon=True)
        self._thread.start()
        started.result(THREAD_TIMEOUT_S)
        return self

    def close(self) -> None:
        """Reset all connections and listen no more. A second call does nothing."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._closed.set)
            self._thread.join(THREAD_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Faults ---

    @_in_its_thread
    def cut(self) -> None:
        """Reset all connections, and new ones at once."""
        self._faults.cut = True
        self.struck["cut"] += len(self._connections)
        for connection in self._connections:
            connection.reset()

    @_in_its_thread
    def half_open(self) -> None:
        """Let nothing pass any more in either direction; new connections stand, but nothing passes there either."""
        self._faults.half_open = True
        for connection in self._connections:
            connection.silent = True

    @_in_its_thread
    def delay(self, seconds: float) -> None:
        """Let every request and every answer arrive that much later."""
        self._faults.delay_s = seconds

    @_in_its_thread
    def lose_answers(self, api: int, count: int = 1, silence_s: float = 2.0) -> None:
        """Lose the next ``count`` answers to ``api``; each one's connection is reset after ``silence_s``."""
        self._faults.lost_answers[api] = count
        self._faults.silence_s = silence_s

    @_in_its_thread
    def delay_answers(self, api: int, seconds: float) -> None:
        """Let every answer to ``api``, and what comes behind it on its connection, arrive that much later."""
        self._faults.answer_delays_s[api] = seconds

    @_in_its_thread
    def heal(self) -> None:
        """End all faults; a second call does nothing."""
        self._faults = _Faults()
        for connection in self._connections:
            if connection.silent:
                connection.reset()

    # --- In the wire's thread ---

    async def _serve(self, started: Future[None]) -> None:
        async with contextlib.AsyncExitStack() as open_:
            try:
                for listens, forwards_to in self.ports:
                    accept = functools.partial(self._accept, forwards_to)
                    server = await asyncio.start_server(accept, HOST, listens)
                    open_.callback(server.close)
            except OSError as error:
                started.set_exception(error)
                return
            self._loop = asyncio.get_running_loop()
            started.set_result(None)
            await self._closed.wait()
            self._loop = None
        for connection in self._connections:
            connection.reset()
        # Also for what the servers were about to accept, which would otherwise stay open.
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    def _accept(self, forwards_to: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._faults.cut or self._loop is None:
            self.struck["cut"] += self._faults.cut
            _abort(writer)
            return
        connection = _Connection(self, reader, writer, forwards_to)
        self._connections.add(connection)
        connection.task.add_done_callback(lambda _: self._connections.discard(connection))


class _Connection:
    """One connection of the worker, and the one to the broker that belongs to it."""

    def __init__(
        self, wire: Wire, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, forwards_to: int
    ) -> None:
        #: Nothing passes any more, until the reset.
        self.silent = wire._faults.half_open
        self._wire = wire
        self._pending: deque[tuple[int, int]] = deque(maxlen=MAX_PENDING)
        self._writers = [writer]
        self.task = asyncio.get_running_loop().create_task(self._run(reader, writer, forwards_to))
        # Not by the task itself: it may be cancelled before it began.
        self.task.add_done_callback(self._abort)

    def reset(self) -> None:
        """Break off both ends."""
        self.task.cancel()

    def _abort(self, _task: asyncio.Task[None]) -> None:
        for writer in self._writers:
            _abort(writer)

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, forwards_to: int) -> None:
        requests: asyncio.Queue[_Frame] = asyncio.Queue(MAX_FRAMES)
        answers: asyncio.Queue[_Frame] = asyncio.Queue(MAX_FRAMES)
        try:
            from_broker, to_broker = await asyncio.open_connection(HOST, forwards_to)
            self._writers.append(to_broker)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(_read(reader, requests, self._on_request))
                    tasks.create_task(self._forward(requests, to_broker))
                    tasks.create_task(_read(from_broker, answers, self._on_answer))
                    tasks.create_task(self._forward_answers(answers, writer))
            except* (OSError, EOFError):
                # One end hung up: the other gets what was sent before, then the same.
                for each in self._writers:
                    each.close()
            for each in self._writers:
                await each.wait_closed()
        except OSError as error:
            log.debug("port %d: %s", forwards_to, error)

    async def _forward_answers(self, answers: asyncio.Queue[_Frame], writer: asyncio.StreamWriter) -> None:
        try:
            await self._forward(answers, writer)
        except OSError as error:  # the worker hung up; what it has sent must still arrive
            log.debug("an answer had nobody to go to: %s", error)

    async def _forward(self, frames: asyncio.Queue[_Frame], writer: asyncio.StreamWriter) -> None:
        while True:
            frame = await frames.get()
            await self._hold(frame)
            if not frame.content:
                raise EOFError
            writer.write(frame.content)
            await writer.drain()

    async def _hold(self, frame: _Frame) -> None:
        """Return when the frame may pass; on a silent connection never, its reset ends the waiting."""
        wire = self._wire
        wire.struck.update(wire._faults.delays_s(frame).keys())
        while not self.silent and (left_s := wire._faults.left_s(frame)) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wire._changed.wait(), left_s)
        if not self.silent and wire._faults.lost_answers[frame.answers] > 0:
            wire._faults.lost_answers[frame.answers] -= 1
            wire.struck["lose_answers"] += 1
            self.silent = True
            asyncio.get_running_loop().call_later(wire._faults.silence_s, self.reset)
        elif wire._faults.half_open:
            wire.struck["half_open"] += 1
        if self.silent:
            await asyncio.Event().wait()

    def _on_request(self, body: bytes) -> None:
        api, _version, number = struct.unpack_from(">hhi", body)
        self._pending.append((number, api))
        self._wire.requests[api] += 1

    def _on_answer(self, body: bytes) -> int | None:
        """The API of the request; answers come in the order of their requests, of which some have none."""
        (answered,) = struct.unpack_from(">i", body)
        while self._pending:
            number, api = self._pending.popleft()
            if number == answered:
                return api
        return None


async def _read(
    reader: asyncio.StreamReader, frames: asyncio.Queue[_Frame], look: Callable[[bytes], int | None]
) -> None:
    """Queue what comes, frame by frame, and then that nothing comes any more."""
    try:
        while True:
            head = await reader.readexactly(4)
            (size_bytes,) = struct.unpack(">i", head)
            if not 0 <= size_bytes <= MAX_FRAME_BYTES:
                raise ConnectionError(f"a frame of {size_bytes} bytes is not Kafka's protocol")
            body = await reader.readexactly(size_bytes)
            await frames.put(_Frame(head + body, time.monotonic(), look(body)))
    except (OSError, EOFError, struct.error) as error:
        log.debug("%s", error)
        await frames.put(_Frame(b"", time.monotonic()))


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close with a reset, without what was not sent yet; nothing when it is closed."""
    if not writer.is_closing():
        at_once = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    writer.transport.abort()
