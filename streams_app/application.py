"""The app: Faust's, with our engine under it."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Iterable
from typing import Any, cast

from faust.app.base import SCAN_IGNORE
from faust.exceptions import ImproperlyConfigured
from mode.utils.objects import cached_property

from streams_app import table as tables
from streams_app.channels import Channel
from streams_app.engine import Engine
from streams_app.events import Event
from streams_app.faust_adapter import Consumer, HostApp, Supervisor
from streams_app.faust_settings import as_variables, check_classes, check_options
from streams_app.health import Health
from streams_app.kafka import KafkaAddress
from streams_app.provision import TopicSpec, create_topics
from streams_app.replicas import Replicas
from streams_app.settings import GUARANTEES, Settings
from streams_app.slot import Slot, acquire
from streams_app.store import Store, store_path
from streams_app.topics import Topic
from streams_app.watchdog import Watchdog
from streams_app.web import application_options

#: Changelogs keep tombstones for a day, so that a store that was away for half of that may still be trusted.
_CHANGELOG_CONFIG = {"delete.retention.ms": str(24 * 60 * 60 * 1000)}
#: Faust's classes that do another work here; an app may be given some that are derived from these.
_CLASSES = {
    "Agent": "streams_app.faust_adapter.Agent",
    "Stream": "streams_app.faust_adapter.Stream",
    "Topic": "streams_app.topics.Topic",
    "Table": "streams_app.table.Table",
    "SetTable": "streams_app.sets.SetTable",
    "TableManager": "streams_app.faust_adapter.TableManager",
    "PartitionAssignor": "streams_app.faust_adapter.Assignor",
    "Router": "streams_app.faust_adapter.Router",
    "Worker": "streams_app.worker.Worker",
}


class App(HostApp):
    """A Faust app whose ``processing_guarantee`` holds: exactly once, at least once or at most once.

    Topic names, group, changelogs and transactional ids begin with the settings' ``kafka_prefix``.
    """

    slot: Slot

    def __init__(
        self,
        id: str,
        *,
        settings: Settings | None = None,
        processing_guarantee: str = "exactly_once",
        main: App | None = None,
        **options: Any,
    ) -> None:
        if processing_guarantee not in GUARANTEES:
            raise ImproperlyConfigured(f"processing_guarantee={processing_guarantee!r} is none of {GUARANTEES}")
        check_options(id, options)
        check_classes(id, options, _CLASSES)
        self.guarantee = processing_guarantee
        self.settings = settings or Settings.from_env({**as_variables(options), **os.environ})
        self._id = id
        self._main = main
        self._siblings: dict[str, App] = {}
        #: Set from KAFKA_URL; the worker sets it to the embedded Kafka where that is unset.
        self.kafka = KafkaAddress.of(self.settings)
        self.declared: dict[str, Topic] = {}
        #: Asked for each event; an assignment makes it forget them, as topics that grow cause one.
        self.partition_counts: dict[str, int] = {}
        super().__init__(
            f"{self.settings.kafka_prefix}{id}",
            **{
                "broker": self.kafka.urls,
                # Faust knows no third one; of its own it asks only whether there are transactions.
                "processing_guarantee": "exactly_once" if processing_guarantee == "exactly_once" else "at_least_once",
                "datadir": str(self.settings.datadir),
                "store": "memory://",
                "topic_partitions": self.settings.topic_partitions,
                "topic_replication_factor": self.settings.topic_replication,
                "table_standby_replicas": self.settings.standby_replicas,
                "stream_wait_empty": False,
                "web_bind": "127.0.0.1",
                "web_host": "127.0.0.1",
                # Pages of Faust's that show tables whole, and where the workers are; what they do not expect is a 500.
                "web_router_enabled": False,
                "web_tables_enabled": False,
                "web_application_options": application_options(self),
                **({"web_port": self.settings.port} if self.settings.port else {}),
                "agent_supervisor": Supervisor,
                "Event": Event,
                **_CLASSES,
                **options,
            },
        )

    def discover(
        self,
        *extra_modules: str,
        categories: Iterable[str] | None = None,
        ignore: Iterable[Any] = SCAN_IGNORE,
    ) -> None:
        """Import the modules that declare something; not the fixtures for tests, which a deployment lacks pytest for."""
        super().discover(*extra_modules, categories=categories, ignore=[*ignore, "streams_app.testing"])

    def config_from_object(self, obj: Any, *, silent: bool = False, force: bool = False) -> None:
        """Refused: it would take the place of what the guarantee needs."""
        raise ImproperlyConfigured(f"{self._id}: config_from_object() comes too late; give the settings to App(…)")

    def LiveCheck(self, **kwargs: Any) -> Any:
        """Refused: an app of stock Faust's would run beside this one."""
        raise ImproperlyConfigured(
            f"{self._id}: LiveCheck has no guarantee; `audit --follow` looks at what was committed"
        )

    def stream(self, channel: Any, *args: Any, **kwargs: Any) -> Any:
        """As Faust's; refused where nobody reads topics."""
        if self.started and not self.runs_here and isinstance(channel, Topic):
            raise ImproperlyConfigured(
                f"{self.conf.id} runs no agents in this process, so nothing would ever come from {channel}; make what reads "
                "it an agent"
            )
        return super().stream(channel, *args, **kwargs)

    def sibling(self, guarantee: str) -> App:
        """The app of another guarantee in the same worker: its own group, tables and commit; made at the first call.

        Raises:
            ImproperlyConfigured: ``guarantee`` is none, or this app's own, or this app is a sibling itself.
        """
        if self._main is not None or guarantee == self.guarantee:
            raise ImproperlyConfigured(
                f"{self.conf.id} has no sibling of guarantee {guarantee!r}; ask the main app for another"
            )
        if guarantee not in self._siblings:
            self._siblings[guarantee] = type(self)(
                f"{self._id}-{guarantee.replace('_', '-')}",
                settings=self.settings,
                processing_guarantee=guarantee,
                main=self,
                autodiscover=False,
                web_enabled=False,
            )
        return self._siblings[guarantee]

    @property
    def family(self) -> tuple[App, ...]:
        """The main app and its siblings."""
        main = self._main or self
        return main, *main._siblings.values()

    @property
    def selected(self) -> bool:
        """Whether this process runs the guarantee (``STREAMS_APP_GUARANTEES``)."""
        return self.guarantee in self.settings.guarantees

    @property
    def runs_here(self) -> bool:
        """Whether this process reads input for the app: it was selected, and has agents."""
        return self.selected and bool(self.agents)

    def on_init_dependencies(self) -> Any:
        """Faust's parts of this app, as far as they run here, and the siblings."""
        self.producer_only = not self.runs_here
        siblings = [app for app in self._siblings.values() if app.selected]
        health = [self.health] if self._main is None and not self.client_only else []
        # First, and so stopped last: where Kafka is out of reach, the others wait for it.
        return [*health, *super().on_init_dependencies(), *siblings]

    async def on_started(self) -> None:
        """A sibling must not keep the next one waiting until its tables are restored."""
        if self._main is None:
            await super().on_started()
        else:
            self.add_future(super().on_started())

    async def _wait_for_table_recovery_completed(self) -> bool:
        return self.runs_here and await super()._wait_for_table_recovery_completed()

    async def on_started_init_extra_tasks(self) -> None:
        """Timers and tasks of a guarantee that runs elsewhere run there."""
        if self.selected:
            await super().on_started_init_extra_tasks()

    def use_kafka(self, address: KafkaAddress) -> None:
        """Go, with the whole family, to another Kafka than the settings said; before anything is started."""
        for app in self.family:
            if app.kafka == address:
                continue
            app.kafka = address
            with warnings.catch_warnings():
                # Faust warns of parts that still use the old address: ours ask `kafka`, only the banner asks `broker`.
                warnings.simplefilter("ignore")
                app.conf.broker = cast(Any, address.urls)

    @cached_property
    def engine(self) -> Engine:
        """What lies between fetch and commit."""
        return Engine(self, beacon=self.beacon)

    @cached_property
    def health(self) -> Health:
        """Of the whole process; the main app's."""
        return Health(self, beacon=self.beacon)

    @cached_property
    def watchdog(self) -> Watchdog:
        """Of the whole process; the main app's. The worker starts it."""
        return Watchdog()

    @property
    def has_slot(self) -> bool:
        """Whether it has taken its slot."""
        return "slot" in self.__dict__

    def check_slot(self) -> None:
        """Raise `SlotLost` if the slot is not its own any more."""
        if self.has_slot:
            self.slot.check()

    @cached_property
    def replicas(self) -> Replicas:
        """What this process follows of tables that others write."""
        return Replicas(self)

    async def on_first_start(self) -> None:
        """Take the slot; Faust's own folders are not needed."""
        if self.client_only:
            return
        if self.runs_here:
            self._take_slot()
        elif any(table.is_followed for table in self.transactional_tables()):
            self._take_slot()
            self.replicas.follow()

    def _take_slot(self) -> None:
        if not self.has_slot:
            self.slot = acquire(self.settings.datadir, self.conf.id, self.settings.slot)

    async def on_shutdown(self) -> None:
        """Close what was followed, after the engine has closed its own."""
        await super().on_shutdown()
        await asyncio.to_thread(self.replicas.close)

    async def maybe_start_producer(self) -> Any:
        """The producer for sends from outside of agents."""
        await self.producer.maybe_start()
        return self.producer

    def topic(self, *topics: str, internal: bool = False, **options: Any) -> Any:
        """Declare topics; names of ours that do not carry the app's id get the prefix."""
        own = f"{self.conf.id}-" if self.settings.kafka_prefix else None
        names = [
            name if internal or (own and name.startswith(own)) else self.settings.kafka_prefix + name for name in topics
        ]
        topic = super().topic(*names, internal=internal, **options)
        if not internal:
            for name in names:
                self.declared.setdefault(name, cast(Topic, topic))
        return topic

    def channel(self, **options: Any) -> Any:
        """Declare a channel in memory; see `streams_app.channels.Channel`."""
        return Channel(self, **options)

    def Table(self, name: str, **options: Any) -> Any:
        """Declare a transactional table; see `streams_app.table.Table`."""
        config = {**_CHANGELOG_CONFIG, **options.pop("extra_topic_configs", {})}
        return super().Table(name, extra_topic_configs=config, **options)

    def GlobalTable(self, name: str, **options: Any) -> Any:
        """Declare a table that every worker reads whole; see `streams_app.table.Table`."""
        return self.Table(name, everywhere=True, **options)

    def SetTable(self, name: str, **options: Any) -> Any:
        """Declare a table of sets; see `streams_app.sets.SetTable`."""
        config = {**_CHANGELOG_CONFIG, **options.pop("extra_topic_configs", {})}
        return super().SetTable(name, extra_topic_configs=config, **options)

    def SetGlobalTable(self, name: str, **options: Any) -> Any:
        """Declare a table of sets that every worker reads whole."""
        return self.SetTable(name, everywhere=True, **options)

    def follow(self, table: tables.Table) -> None:
        """Keep a committed copy of what this process does not hold of ``table``, for views that read it.

        Asked for by `Table.committed` where something is missing. A process that runs no agents of the app asks for it where
        the table is declared, so that the copy is there before anybody wants it.
        """
        if not table.is_followed:
            table.is_followed = True
            if self.started:
                self._take_slot()
                self.replicas.follow()

    def partitions_of(self, topic: str) -> int | None:
        """Number of partitions of a topic (its declared name, without prefix, will do), once the consumer knows it."""
        if not self.runs_here:
            return self.replicas.partition_counts.get(topic)
        count = self.partition_counts.get(topic)
        if count is None:
            count = self.input.topic_partitions(topic) or self.input.topic_partitions(
                self.settings.kafka_prefix + topic
            )
            if count is not None:
                self.partition_counts[topic] = count
        return count

    @property
    def input(self) -> Consumer:
        """The consumer, as the engine knows it."""
        return cast(Consumer, self.consumer)

    def transactional_tables(self) -> list[tables.Table]:
        """All tables of the app."""
        return [cast(tables.Table, table) for table in self.tables.values()]

    def table_of_changelog(self, topic: str) -> tables.Table:
        """The table behind a changelog topic."""
        return next(table for table in self.transactional_tables() if table.changelog_topic_name == topic)

    def open_store(self, tp: tuple[str, int], topic_id: str) -> Store:
        """The store of a changelog's partition, below the slot; see `streams_app.store.Store.trusted`."""
        table = self.table_of_changelog(tp[0])
        path = store_path(self.slot.folder, table.name, tp[1])
        return Store.trusted(path, topic_id=topic_id, expires_ms=table.expires_ms)

    def create_topic(self, topic: str, partitions: int, replication: int, config: dict[str, str]) -> None:
        """Create a topic if it is missing; blocks."""
        create_topics(self.kafka, [TopicSpec(topic, partitions, replication, config)])
