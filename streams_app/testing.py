"""Fixtures for tests of your agents. ``pytest_plugins = ["streams_app.testing"]`` in ``tests/conftest.py`` makes them known.

``run_agent``   one agent with its tables, without Kafka: milliseconds
``on_kafka``    the whole app in a worker process on a real Kafka of the test run's own: seconds
``kafka_url``   that Kafka
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import uuid4

import msgspec
import pytest
from confluent_kafka import Consumer, Producer
from faust.types import TP, AgentT, Message

from streams_app.batch import Batch
from streams_app.commit import expire_all
from streams_app.embedded import EmbeddedKafka, free_port
from streams_app.events import Event, current_batch
from streams_app.faust_adapter import Agent
from streams_app.kafka import KafkaAddress
from streams_app.session import Output, Pin, header_pairs
from streams_app.store import Store, store_path

if TYPE_CHECKING:
    from streams_app.outbox import Outbox

_STARTED = b"partitions started"


class Sent(NamedTuple):
    """A record that came out; the topic without the settings' prefix."""

    topic: str
    key: Any
    value: Any
    headers: Mapping[str, Any] = {}


class _Box:
    """Where outputs go that do not wait for the commit."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def produce(self, output: Output) -> None:
        self.outputs.append(output)


class AgentRun:
    """One agent at work, see `run_agent`; ``async with`` starts and ends it."""

    def __init__(self, agent: AgentT[Any], folder: Path) -> None:
        self.agent = agent
        self.app: Any = agent.app
        #: What the agent yielded; it went to the sinks, and to whoever asked.
        self.results: list[Any] = []
        self._folder = folder
        self._stores: dict[tuple[str, int], Store] = {}
        self._sent = 0
        self._declares = True
        self._stream: Any = None
        self._task: asyncio.Future[None] | None = None

    async def __aenter__(self) -> AgentRun:
        self.app.flow_control.resume()
        # What runs between a topic and the one that it is grouped into tells the engine what it raises.
        self.app.__dict__["engine"] = self
        self._declares = self.app.conf.topic_allow_declare
        self._let_declare(False)
        self._begin(self.agent.channel)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._stream.stop()
        del self.app.__dict__["engine"]
        self._let_declare(self._declares)
        for table in self.app.transactional_tables():
            table.data.partitions = {}
        for store in self._stores.values():
            store.close()

    def _let_declare(self, allowed: bool) -> None:
        """Whether topics are created, by whom there is none to ask."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Faust warns of settings that change late; this one is asked each time
            self.app.conf.topic_allow_declare = allowed

    async def send(
        self,
        key: Any = None,
        value: Any = None,
        *,
        partition: int = 0,
        timestamp: float | None = None,
        headers: Mapping[str, Any] | None = None,
    ) -> list[Sent]:
        """Let the agent process one event, and commit it; gives what it sent.

        Key and value are those of the agent's topic, or the bytes of a record; None is no value, as in a tombstone.
        ``timestamp`` is in seconds since 1970.

        Raises:
            Exception: whatever the agent raised; then nothing of the event took effect.
            UndecodableError: the worker would set the record aside, the agent does not see it.
        """
        box = None if self.app.guarantee == "exactly_once" else _Box()
        batch = Batch(
            Pin("test", 1, "test"), cast("Outbox | None", box), redelivers=self.app.guarantee != "at_most_once"
        )
        event = self._event(batch, key, value, partition, time.time() if timestamp is None else timestamp, headers)
        for table in self.app.transactional_tables():
            table.data.partitions[partition] = self._store(table, partition)
        batch.add([event])
        await self._stream.channel.queue.put(event)
        await self._settled(batch)
        self._commit(batch)
        outputs = batch.outputs if box is None else box.outputs
        return [self._came_out(output) for output in (*outputs, *batch.set_aside.values())]

    def _begin(self, channel: Any) -> None:
        self._stream = cast(Agent, self.agent).stream(channel)
        self._task = asyncio.ensure_future(self._work())

    async def _work(self) -> None:
        running = self.agent.fun(self._stream)
        if inspect.isawaitable(running):
            await running
        else:
            await cast(Agent, self.agent).slurp(self._stream, self._noted(cast("AsyncIterator[Any]", running)))

    async def _noted(self, results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for result in results:
            self.results.append(result)
            yield result

    def _event(
        self,
        batch: Batch,
        key: Any,
        value: Any,
        partition: int,
        timestamp_s: float,
        headers: Mapping[str, Any] | None,
    ) -> Event:
        topic: Any = self.agent.channel
        key_bytes, value_bytes = topic.encode_message(key, b"" if value is None else value)
        at, self._sent = self._sent, self._sent + 1
        name = topic.get_topic_name()
        tp = TP(name, partition)
        content = key_bytes, None if value is None else value_bytes
        record = (name, partition, at, timestamp_s, 0, header_pairs(headers), *content, None)
        message = Message(*record, tp=tp)
        batch.consumed[tp] = at + 1
        key, value = topic.decode_message(message)
        return Event(self.app, key, value, message.headers, message, batch)

    def _store(self, table: Any, partition: int) -> Store:
        at = table.name, partition
        if at not in self._stores:
            path = store_path(self._folder, table.name, partition)
            self._stores[at] = Store(path, topic_id="test", expires_ms=table.expires_ms)
        return self._stores[at]

    async def _settled(self, batch: Batch) -> None:
        settled = asyncio.ensure_future(batch.settled())
        assert self._task is not None
        await asyncio.wait({settled, self._task}, return_when=asyncio.FIRST_COMPLETED)
        settled.cancel()
        if self._task.done():
            error = self._task.exception() or RuntimeError("the agent ended; agents loop over their stream for ever")
            batch.drop()
            self._begin(await self._stream.hand_over())
            raise error
        if batch.trouble is not None:
            batch.drop()
            raise batch.trouble

    def on_agent_error(self, _name: str, error: BaseException) -> None:
        """What raised is no agent; see `streams_app.engine.Engine.on_agent_error`."""
        batch = current_batch()
        if batch is not None:
            batch.hopeless(error)

    def _commit(self, batch: Batch) -> None:
        batch.seal()
        for overlay, stale in expire_all(batch).items():
            overlay.store.publish(overlay.writes, stale, self._sent)
        for callback in batch.callbacks:
            callback()

    def _came_out(self, output: Output) -> Sent:
        name = output.topic.removeprefix(self.app.settings.kafka_prefix)
        topic = self.app.declared.get(output.topic)
        key, value = output.key, output.value
        if topic is not None and not output.headers:
            key, value = topic.decode_message(Message(output.topic, 0, 0, 0.0, 0, None, key, value, None))
        return Sent(name, key, value, dict(output.headers or ()))


@pytest.fixture
def run_agent(tmp_path: Path) -> Callable[[AgentT[Any]], AgentRun]:
    """Run an agent with its tables, without Kafka.

    ::

        async def test_each_visit_counts(run_agent):
            async with run_agent(count) as agent:
                await agent.send("/home", Visit("ann"))
                assert await agent.send("/home", Visit("bob")) == [Sent("visit-counts", "/home", Count("/home", 2))]
                assert visits_of["/home"] == 2

    Each `AgentRun.send` is a batch of its own. What ``group_by`` and ``through`` send on is told, and not read again: that
    takes `on_kafka`.
    """
    return lambda agent: AgentRun(agent, tmp_path / uuid4().hex)


class RunningApp:
    """An app in worker processes on Kafka, see `on_kafka`."""

    def __init__(self, app: str, kafka_url: str, folder: Path, env: Mapping[str, str]) -> None:
        self.prefix = f"t{uuid4().hex[:8]}-"
        self._app = app
        self._folder = folder
        self._config = KafkaAddress.parse(kafka_url).librdkafka()
        self._env = {
            **os.environ,
            "KAFKA_URL": kafka_url,
            "KAFKA_PREFIX": self.prefix,
            "STREAMS_APP_DATADIR": str(folder / "data"),
            "STREAMS_APP_SESSION_TIMEOUT_MS": "6000",
            **env,
        }
        self._workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> RunningApp:
        """Start a worker, and wait until it is at work."""
        log = self._folder / f"worker-{len(self._workers)}.log"
        with log.open("wb") as file:
            command = [sys.executable, "-m", "faust", "-A", self._app, "worker", "-l", "info", "--without-web"]
            worker = subprocess.Popen(command, env=self._env, stdout=file, stderr=subprocess.STDOUT)
        self._workers.append(worker)
        _wait(lambda: _STARTED in log.read_bytes() or worker.poll() is not None, "the worker has started", log)
        assert worker.poll() is None, log.read_text()[-3_000:]
        return self

    def kill(self) -> None:
        """``kill -9`` of the worker that was started last."""
        self._workers[-1].kill()
        self._workers[-1].wait()

    def send(self, topic: str, records: Sequence[tuple[str | bytes | None, Any]]) -> None:
        """Write records, pairs of key and value; a value is made JSON unless it is bytes."""
        producer = Producer({**self._config, "partitioner": "murmur2_random", "enable.idempotence": True})
        for key, value in records:
            producer.produce(
                self.prefix + topic, value if isinstance(value, bytes) else msgspec.json.encode(value), key
            )
        assert producer.flush(30) == 0, "Kafka did not take the input in time"

    def read(self, topic: str, count: int, timeout_s: float = 60.0) -> list[Sent]:
        """Wait until a topic has so many committed records; gives all of them, values from JSON."""
        found: list[Sent] = []
        consumer = Consumer(
            {
                **self._config,
                "group.id": f"{self.prefix}test-{uuid4().hex}",
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "enable.auto.commit": False,
            }
        )
        consumer.subscribe([self.prefix + topic])

        def enough() -> bool:
            for message in consumer.consume(10_000, 0.2 if len(found) < count else 1.0):
                if message.error() is None:
                    key, value = message.key(), message.value()
                    found.append(
                        Sent(
                            topic,
                            key and key.decode(),
                            value and msgspec.json.decode(value),
                            dict(message.headers() or ()),
                        )
                    )
            return len(found) >= count

        try:
            _wait(enough, f"{topic} has {count} committed records", None, timeout_s)
            enough()  # one that is there too many shall be seen
        finally:
            consumer.close()
        return found

    def end(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            try:
                worker.wait(30)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


@pytest.fixture
def on_kafka(kafka_url: str, tmp_path: Path) -> Iterator[Callable[..., RunningApp]]:
    """Run an app in a worker on Kafka, under a prefix of its own.

    ::

        def test_no_visit_is_lost_with_its_worker(on_kafka):
            app = on_kafka("streams_app").start()
            app.send("visits", [("/home", Visit("ann"))] * 100)
            app.kill()
            app.start()
            counts = [sent.value["visits"] for sent in app.read("visit-counts", 100)]
            assert counts == list(range(1, 101))
    """
    running: list[RunningApp] = []

    def start(app: str = "streams_app", **env: str) -> RunningApp:
        running.append(RunningApp(app, kafka_url, tmp_path, env))
        return running[-1]

    yield start
    for each in running:
        each.end()


@pytest.fixture(scope="session")
def kafka_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``kafka://127.0.0.1:PORT`` of a broker of this run alone, or what the variable KAFKA_URL says."""
    given = os.environ.get("KAFKA_URL")
    if given:
        yield given
        return
    with EmbeddedKafka.ensure(tmp_path_factory.mktemp("kafka"), port=free_port()) as kafka:
        yield kafka.url


def _wait(condition: Callable[[], bool], what: str, log: Path | None, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}\n{log.read_text()[-3_000:] if log else ''}")
        time.sleep(0.05)
