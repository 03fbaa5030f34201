"""What the app needs of its Kafka: topics, and the permission for transactions."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from streams_app.dead_letters import REPLAYED_TOPIC
from streams_app.dead_letters import TOPIC as DEAD_LETTERS
from streams_app.errors import KafkaUnreachable
from streams_app.kafka import KafkaAddress

if TYPE_CHECKING:
    from streams_app.application import App

_TIMEOUT_S = 30.0
#: A broker that is restarted is back within this time.
_PATIENCE_S, _PAUSE_S = 90.0, 1.0
#: What brokers say, or do not say, while some of them are away.
_MAY_PASS = frozenset(
    {
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NOT_CONTROLLER,
        KafkaError.BROKER_NOT_AVAILABLE,
    }
)
log = logging.getLogger(__name__)


class TopicSpec(NamedTuple):
    """A topic as the app needs it."""

    name: str
    partitions: int
    replication: int
    config: dict[str, str]


class Finding(NamedTuple):
    """One line of the report: what was looked at, how it stands, and whether that is good enough."""

    subject: str
    state: str
    good: bool


def required_topics(app: App) -> list[TopicSpec]:
    """All topics of the app and its siblings: declared ones, changelogs, and those for dead letters."""
    specs = {spec.name: spec for each in app.family for spec in _topics_of(each)}
    return list(specs.values())


def _topics_of(app: App) -> list[TopicSpec]:
    settings = app.settings

    def spec(name: str, partitions: int | None, config: dict[str, str]) -> TopicSpec:
        return TopicSpec(name, partitions or settings.topic_partitions, settings.topic_replication, config)

    specs = [spec(name, topic.partitions, {}) for name, topic in app.declared.items()]
    specs += [
        spec(table.changelog_topic_name, table.partitions, {"cleanup.policy": "compact", **table.extra_topic_configs})
        for table in app.tables.values()
    ]
    replayed = spec(settings.kafka_prefix + REPLAYED_TOPIC, 1, {"cleanup.policy": "compact"})
    return [*specs, spec(settings.kafka_prefix + DEAD_LETTERS, None, {}), replayed]


def create_topics(kafka: KafkaAddress, specs: Iterable[TopicSpec]) -> dict[str, bool]:
    """Create what is missing; blocks. A cluster of which some brokers are just being restarted is waited for.

    Returns:
        each topic's name, and whether it was created now.

    Raises:
        KafkaUnreachable: the brokers did not answer for a long time.
        KafkaException: they do not permit it.
    """
    wanted, deadline_s = list(specs), time.monotonic() + _PATIENCE_S
    while True:
        try:
            return _create_topics(kafka, wanted) if wanted else {}
        except (KafkaException, TimeoutError) as error:
            if isinstance(error, KafkaException) and error.args[0].code() not in _MAY_PASS:
                raise
            if time.monotonic() > deadline_s:
                raise KafkaUnreachable(f"the brokers do not create topics: {error!r}") from error
            log.warning("topics could not be created, trying again: %r", error)
            time.sleep(_PAUSE_S)


def _create_topics(kafka: KafkaAddress, specs: Iterable[TopicSpec]) -> dict[str, bool]:
    admin = AdminClient(kafka.librdkafka())
    new = [NewTopic(name, partitions, replication, config=config) for name, partitions, replication, config in specs]
    created = {}
    for name, future in admin.create_topics(new, request_timeout=_TIMEOUT_S / 3).items():
        try:
            future.result(timeout=_TIMEOUT_S / 2)
            created[name] = True
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
            created[name] = False
    _wait_known(admin, set(created))
    return created


def _wait_known(admin: AdminClient, names: set[str]) -> None:
    """A worker that joins before its topics are known everywhere gets none of their partitions, until it looks again."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        topics = admin.list_topics(timeout=_TIMEOUT_S).topics
        if all(name in topics and topics[name].error is None and topics[name].partitions for name in names):
            return
        time.sleep(0.05)
    raise KafkaUnreachable(f"the topics {sorted(names)} were created, but are not known after {_TIMEOUT_S:g} s")


def provision(app: App, *, check: bool = False) -> list[Finding]:
    """Create what is missing, compare what exists, try a transaction. With ``check`` nothing is created."""
    specs = required_topics(app)
    created = {} if check else create_topics(app.kafka, specs)
    return [*_compare(app.kafka, specs, created), _try_transaction(app)]


def _compare(kafka: KafkaAddress, specs: list[TopicSpec], created: dict[str, bool]) -> Iterable[Finding]:
    admin = AdminClient(kafka.librdkafka())
    existing = admin.list_topics(timeout=_TIMEOUT_S).topics
    for spec in specs:
        topic = existing.get(spec.name)
        if created.get(spec.name):
            yield Finding(spec.name, f"created with {spec.partitions} partitions", True)
        elif topic is None or topic.error is not None:
            yield Finding(spec.name, "missing", False)
        elif len(topic.partitions) != spec.partitions:
            yield Finding(spec.name, f"has {len(topic.partitions)} partitions, not {spec.partitions}", False)
        else:
            yield _compare_config(admin, spec)


def _compare_config(admin: AdminClient, spec: TopicSpec) -> Finding:
    resource = ConfigResource(ConfigResource.Type.TOPIC, spec.name)
    [future] = admin.describe_configs([resource], request_timeout=_TIMEOUT_S).values()
    in_force = future.result(timeout=_TIMEOUT_S)
    for name, value in spec.config.items():
        if in_force[name].value != value:
            return Finding(spec.name, f"has {name}={in_force[name].value}, not {value}", False)
    return Finding(spec.name, "as it should be", True)


def _try_transaction(app: App) -> Finding:
    """A transaction without effect, under an id and a group of its own."""
    from streams_app.session import Pin, unfenced_group_metadata  # noqa: PLC0415

    transactional_id = f"{app.conf.id}-provision-{uuid4().hex[:8]}"
    topic = app.settings.kafka_prefix + DEAD_LETTERS
    producer = Producer({**app.kafka.librdkafka(), "transactional.id": transactional_id, "log_level": 0})
    try:
        producer.init_transactions(_TIMEOUT_S)
        producer.begin_transaction()
        metadata = unfenced_group_metadata(Pin(f"{app.conf.id}-provision", -1, ""))
        producer.send_offsets_to_transaction([TopicPartition(topic, 0, 0)], metadata, _TIMEOUT_S)
        producer.abort_transaction(_TIMEOUT_S)
    except KafkaException as error:
        return Finding("transaction", f"not possible as {transactional_id}: {error.args[0].str()}", False)
    return Finding("transaction", "possible", True)
