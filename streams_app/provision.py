"""What the app needs of its Kafka: topics as it knows them, and permissions (permissions.py).

Topics that we may not create are not created another way: whoever may is told the exact commands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, TopicDescription

from streams_app.dead_letters import REPLAYED_TOPIC
from streams_app.dead_letters import TOPIC as DEAD_LETTERS
from streams_app.errors import ConfigurationError, KafkaUnreachable, NotPermitted, StreamsAppError
from streams_app.faust_adapter import leader_topic
from streams_app.kafka import KafkaAddress
from streams_app.permissions import (
    Acl,
    admin_of,
    described,
    missing_of_groups,
    missing_of_topic,
    missing_of_transactions,
    transactional_apps,
    try_transaction,
)

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
#: Of CreateTopics: neither we nor a retry can change it.
_NOT_PERMITTED = frozenset(
    {KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED, KafkaError.POLICY_VIOLATION}
)
#: Of DescribeTopics: answers about the topic. All others are about the brokers.
_ABOUT_A_TOPIC = frozenset(
    {KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_EXCEPTION}
)
_WRONGLY_ASKED = frozenset({KafkaError.INVALID_REPLICATION_FACTOR, KafkaError.INVALID_PARTITIONS})
#: Heroku's own bound.
_LEAST_REPLICATION_ON_HEROKU = 3
log = logging.getLogger(__name__)


class TopicSpec(NamedTuple):
    """A topic as the app needs it."""

    name: str
    partitions: int
    replication: int
    config: dict[str, str]


class TopicsNotPermitted(NotPermitted):
    """Topics are missing, and we may not create them."""

    def __init__(self, specs: list[TopicSpec], created: dict[str, bool]) -> None:
        names = ", ".join(spec.name for spec in specs)
        super().__init__(
            f"topics are missing that this cluster does not let us create: {names}. "
            "`faust -A streams_app provision` prints the commands that create them"
        )
        self.specs = specs
        #: What `create_topics` would have returned of the others.
        self.created = created


class Finding(NamedTuple):
    """One line of the report: what was looked at, how it stands, and whether that is good enough."""

    subject: str
    state: str
    good: bool
    acl: Acl | None = None


class Report(NamedTuple):
    """What `provision` found, and commands that mend what it could not."""

    findings: list[Finding]
    commands: list[str]

    @property
    def good(self) -> bool:
        """Whether all of it is."""
        return all(finding.good for finding in self.findings)


def required_topics(app: App) -> list[TopicSpec]:
    """All topics of the app and its siblings: declared ones, changelogs, and those for dead letters."""
    specs = {spec.name: spec for each in app.family for spec in topics_of(each)}
    return list(specs.values())


def topics_of(app: App) -> list[TopicSpec]:
    settings = app.settings

    def spec(name: str, partitions: int | None, config: dict[str, str]) -> TopicSpec:
        return TopicSpec(name, partitions or settings.topic_partitions, settings.topic_replication, config)

    specs = [spec(name, topic.partitions, {}) for name, topic in app.declared.items()]
    specs += [
        spec(table.changelog_topic_name, table.partitions, {"cleanup.policy": "compact", **table.extra_topic_configs})
        for table in app.tables.values()
    ]
    leader = leader_topic(app)
    specs += [spec(leader, 1, {})] if leader else []
    replayed = spec(settings.kafka_prefix + REPLAYED_TOPIC, 1, {"cleanup.policy": "compact"})
    # For ever: a letter may be all that is left of an event, and brokers would delete it after 7 days.
    letters = spec(settings.kafka_prefix + DEAD_LETTERS, None, {"retention.ms": "-1"})
    return [*specs, letters, replayed]


def create_topics(kafka: KafkaAddress, specs: Iterable[TopicSpec]) -> dict[str, bool]:
    """Create what is missing; blocks. A cluster of which some brokers are just being restarted is waited for.

    Returns:
        each topic's name, and whether it was created now.

    Raises:
        KafkaUnreachable: the brokers did not answer for a long time.
        TopicsNotPermitted: they do not let us; all others are created.
        ConfigurationError: they have not so many brokers, or partitions.
    """
    wanted, deadline_s = list(specs), time.monotonic() + _PATIENCE_S
    while True:
        try:
            return _create_topics(kafka, wanted) if wanted else {}
        except (KafkaException, TimeoutError) as error:
            if isinstance(error, KafkaException) and error.args[0].code() not in _MAY_PASS:
                raise _never_created(error.args[0]) from error
            if time.monotonic() > deadline_s:
                raise KafkaUnreachable(f"the brokers do not create topics: {error!r}") from error
            log.warning("topics could not be created, trying again: %r", error)
            time.sleep(_PAUSE_S)


def _never_created(error: KafkaError) -> StreamsAppError:
    text = f"the topics could not be created: {error.str()}"
    if error.code() in _WRONGLY_ASKED:
        return ConfigurationError(f"{text}; see STREAMS_APP_TOPIC_REPLICATION and STREAMS_APP_TOPIC_PARTITIONS")
    return KafkaUnreachable(text)


def _create_topics(kafka: KafkaAddress, specs: Iterable[TopicSpec]) -> dict[str, bool]:
    admin = admin_of(kafka)
    # Looked at first: who may not create topics is told so, too, of those that exist.
    existing = admin.list_topics(timeout=_TIMEOUT_S / 3).topics
    created = {spec.name: False for spec in specs if spec.name in existing}
    missing = {spec.name: spec for spec in specs if spec.name not in existing}
    refused = []
    new = [NewTopic(spec.name, spec.partitions, spec.replication, config=spec.config) for spec in missing.values()]
    futures = admin.create_topics(new, request_timeout=_TIMEOUT_S / 3) if new else {}
    for name, future in futures.items():
        try:
            future.result(timeout=_TIMEOUT_S / 2)
            created[name] = True
        except KafkaException as error:
            if error.args[0].code() in _NOT_PERMITTED:
                refused.append(missing[name])
            elif error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
            else:
                created[name] = False
    _wait_known(admin, set(created))
    if refused:
        raise TopicsNotPermitted(refused, created)
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


def provision(app: App, *, check: bool = False) -> Report:
    """Create what is missing, compare what exists, try transactions. With ``check`` nothing is created.

    Raises:
        KafkaUnreachable: the brokers did not say how the topics stand.
    """
    specs = required_topics(app)
    try:
        created = {} if check else create_topics(app.kafka, specs)
    except TopicsNotPermitted as error:
        created = error.created
    admin = admin_of(app.kafka)
    known = described(admin, (spec.name for spec in specs))
    _check_answered(known)
    there = [spec.name for spec in specs if not isinstance(known[spec.name], KafkaError)]
    in_force = _settings_in_force(admin, there)
    topics = [
        _compare(spec, known[spec.name], in_force.get(spec.name), created.get(spec.name, False)) for spec in specs
    ]
    missing = [spec for spec in specs if spec.name not in there]
    findings = [*topics, *_groups(app, admin), *_transactions(app, there)]
    acls = dict.fromkeys(finding.acl for finding in findings if finding.acl is not None)
    commands = [*_commands_to_create(app, missing), *(acl.command(app.kafka.servers) for acl in acls)]
    return Report(findings, commands)


def _check_answered(known: Mapping[str, TopicDescription | KafkaError]) -> None:
    """Raise `KafkaUnreachable` if nobody knows of a topic whether it exists: "missing" would be a guess."""
    for name, found in known.items():
        if isinstance(found, KafkaError) and found.code() not in _ABOUT_A_TOPIC:
            raise KafkaUnreachable(f"the brokers do not say whether there is a topic {name}: {found.str()}")


def _settings_in_force(admin: AdminClient, names: Iterable[str]) -> dict[str, dict[str, str] | None]:
    """The settings of topics; None: an ACL hides them.

    Raises:
        KafkaUnreachable: the brokers did not say.
    """
    resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    futures = admin.describe_configs(resources, request_timeout=_TIMEOUT_S) if resources else {}
    found: dict[str, dict[str, str] | None] = {}
    for resource, future in futures.items():
        try:
            found[resource.name] = {name: each.value for name, each in future.result(timeout=_TIMEOUT_S).items()}
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise _unsaid(resource.name, error.args[0].str()) from error
            found[resource.name] = None
        except TimeoutError as error:
            raise _unsaid(resource.name, f"no answer within {_TIMEOUT_S:g} s") from error
    return found


def _unsaid(name: str, why: str) -> KafkaUnreachable:
    return KafkaUnreachable(f"the brokers do not say which settings the topic {name} has: {why}")


def _compare(
    spec: TopicSpec, found: TopicDescription | KafkaError, in_force: dict[str, str] | None, created: bool
) -> Finding:
    if isinstance(found, KafkaError):
        if found.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            acl = Acl("Topic", ("Read", "Write"), spec.name)
            return Finding(spec.name, f"missing, or hidden from us: {acl.text} is", False, acl)
        return Finding(spec.name, "missing", False)
    if len(found.partitions) != spec.partitions:
        return Finding(spec.name, f"has {len(found.partitions)} partitions, not {spec.partitions}", False)
    lacking = missing_of_topic(spec.name, found)
    if lacking is not None:
        return Finding(spec.name, f"not permitted: {lacking.text} is missing", False, lacking)
    copies = min(len(partition.replicas) for partition in found.partitions)
    if copies < spec.replication:
        return Finding(spec.name, f"is kept {copies} times, not {spec.replication}", False)
    return _compare_config(spec, in_force, copies, created)


def _compare_config(spec: TopicSpec, in_force: dict[str, str] | None, copies: int, created: bool) -> Finding:
    if in_force is None:
        acl = Acl("Topic", ("DescribeConfigs",), spec.name)
        # It works without: tables are then restored from the beginning of their changelogs at every start.
        return Finding(spec.name, f"there, its settings hidden from us: {acl.text} is missing", True, acl)
    for name, value in spec.config.items():
        if in_force[name] == value:
            continue
        if name == "retention.ms":
            # It works without, but for whoever looks later than that.
            advice = f"kafka-configs.sh --alter --topic '{spec.name}' --add-config {name}={value}"
            return Finding(
                spec.name, f"there, but has {name}={in_force[name]}; to keep letters for ever: {advice}", True
            )
        return Finding(spec.name, f"has {name}={in_force[name]}, not {value}", False)
    if copies > 1 and in_force.get("min.insync.replicas") == "1":
        # Whether that is enough is for whoever runs the cluster to say.
        return Finding(spec.name, "there, but min.insync.replicas is 1: a commit counts with one copy of it", True)
    return Finding(spec.name, f"created with {spec.partitions} partitions" if created else "as it should be", True)


def _groups(app: App, admin: AdminClient) -> Iterator[Finding]:
    running = [each.conf.id for each in app.family if each.runs_here]
    missing = {acl.name: acl for acl in missing_of_groups(admin, running)}
    for group in running:
        acl = missing.get(group)
        state = "may be joined" if acl is None else f"may not be joined: {acl.text} is missing"
        yield Finding(f"group {group}", state, acl is None, acl)


def _transactions(app: App, there: Collection[str]) -> Iterator[Finding]:
    """Those of each app that commits in transactions are tried: the ids and groups of one say nothing of another's."""
    topic = app.settings.kafka_prefix + DEAD_LETTERS
    for each in transactional_apps(app):
        if topic in there:
            failed = try_transaction(app.kafka, each.conf.id, topic)
        else:
            failed = missing_of_transactions(app.kafka, each.conf.id) or f"{topic} is missing, to try one with"
        subject = f"transactions of {each.conf.id}"
        if isinstance(failed, Acl):
            yield Finding(subject, f"not permitted: {failed.text} is missing", False, failed)
        else:
            yield Finding(subject, f"not possible: {failed}" if failed else "possible", not failed)


def _commands_to_create(app: App, specs: Iterable[TopicSpec]) -> Iterator[str]:
    """Of Kafka's own tools, and of Heroku's, whose names have no prefix: it adds that itself."""
    specs, prefix = list(specs), app.settings.kafka_prefix
    for spec in specs:
        config = "".join(f" --config {name}={value}" for name, value in spec.config.items())
        yield (
            f"kafka-topics.sh --bootstrap-server {app.kafka.servers} --command-config admin.properties --create "
            f"--topic '{spec.name}' --partitions {spec.partitions} --replication-factor {spec.replication}{config}"
        )
    for spec in specs:
        compacted = " --compaction" if "compact" in spec.config.get("cleanup.policy", "") else ""
        replication = max(spec.replication, _LEAST_REPLICATION_ON_HEROKU)
        yield (
            f"heroku kafka:topics:create '{spec.name.removeprefix(prefix)}' --partitions {spec.partitions} "
            f"--replication-factor {replication}{compacted}"
        )
    if specs:
        for each in app.family:
            for group in (each.conf.id, f"{each.conf.id}-provision")[: 1 + (each in transactional_apps(app))]:
                yield f"heroku kafka:consumer-groups:create '{group.removeprefix(prefix)}'"
