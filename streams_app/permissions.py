"""What a cluster with ACLs has to permit, and which of it is missing.

Asked for without effect: topics tell what we may do with them; a group takes, or refuses, the offset of a topic that does not
exist; a transactional id lets a producer begin, or not. Only `try_transaction`, of the command ``provision``, writes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AclOperation, AdminClient, TopicDescription

from streams_app.deadlines import COORDINATOR_TIMEOUT_S, discard, within
from streams_app.errors import KafkaUnreachable, NotPermitted
from streams_app.kafka import KafkaAddress
from streams_app.session import Pin, unfenced_group_metadata

if TYPE_CHECKING:
    from streams_app.application import App

TIMEOUT_S = 30.0
#: Of a worker, which starts anyhow. A cluster that never had a group before gives no answer about one for a while.
_QUICK_S, _TRANSACTION_S = 3.0, 10.0
#: As Kafka's tools write them.
_OPERATIONS = {AclOperation.READ: "Read", AclOperation.WRITE: "Write"}
_OPTIONS = {"Topic": "topic", "Group": "group", "TransactionalId": "transactional-id"}
#: What is refused, by the code that says so, and the operations that are needed.
_REFUSALS = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: ("Topic", ("Read", "Write")),
    KafkaError.GROUP_AUTHORIZATION_FAILED: ("Group", ("Read",)),
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: ("TransactionalId", ("Write", "Describe")),
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: ("Cluster", ("IdempotentWrite",)),
}
_FENCED = frozenset({KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH})
log = logging.getLogger(__name__)
#: A refusal is an answer here, no error.
_quiet = logging.getLogger(f"{__name__}.trial")
_quiet.propagate = False
_quiet.addHandler(logging.NullHandler())


class Acl(NamedTuple):
    """A permission that is missing."""

    resource: str
    operations: tuple[str, ...]
    name: str
    #: Whether it is needed for all names that begin so.
    prefixed: bool = False

    @property
    def text(self) -> str:
        """For people."""
        operations = " and ".join(self.operations)
        if self.resource == "Cluster":
            return f"Cluster: {operations}"
        return f"{self.resource}: {operations} on {self.name}{'* (pattern type prefixed)' if self.prefixed else ''}"

    def command(self, servers: str) -> str:
        """For whoever runs the cluster."""
        what = "--cluster" if self.resource == "Cluster" else f"--{_OPTIONS[self.resource]} '{self.name}'"
        pattern = " --resource-pattern-type prefixed" if self.prefixed else ""
        operations = " ".join(f"--operation {operation}" for operation in self.operations)
        return (
            f"kafka-acls.sh --bootstrap-server {servers} --command-config admin.properties --add "
            f"--allow-principal 'User:NAME' {operations} {what}{pattern}"
        )


def transactional_apps(app: App) -> list[App]:
    """Those of the family that run here and commit in transactions."""
    unfenced = set() if app.settings.at_least_once_fenced else {"at_least_once"}
    return [each for each in app.family if each.runs_here and each.guarantee not in {"at_most_once", *unfenced}]


def check_permissions(app: App, topics: Iterable[str]) -> None:
    """Before a worker starts: all that its agents need, of these ``topics`` and of their groups and transactions.

    A guarantee that the cluster does not permit is refused, and nothing is run under a lesser one. Brokers that give no
    answer in time refuse nothing: the engine waits for them.

    Raises:
        NotPermitted: something is not; the text says what.
    """
    running = [each for each in app.family if each.runs_here]
    admin = admin_of(app.kafka)
    known = described(admin, topics, _QUICK_S)
    missing = [acl for acl in itertools.starmap(missing_of_topic, known.items()) if acl is not None]
    missing += missing_of_groups(admin, [each.conf.id for each in running], _QUICK_S)
    if missing:
        raise NotPermitted(f"the cluster does not permit what the agents need: {_listed(missing)}; see `provision`")
    for each in transactional_apps(app):
        refused = None
        try:
            refused = missing_of_transactions(app.kafka, each.conf.id, _TRANSACTION_S)
        except KafkaUnreachable as error:
            log.warning("%s", error)
        if refused is not None:
            raise NotPermitted(
                f"the agents of {each.conf.id} ({each.guarantee}) need transactions, and the cluster permits none: "
                f"{refused.text} is missing. {_way_out(each)}"
            )


def _way_out(app: App) -> str:
    without = "run the others alone with STREAMS_APP_GUARANTEES"
    if app.guarantee == "at_least_once":
        return (
            f"Grant it, or accept the limit of STREAMS_APP_AT_LEAST_ONCE_FENCED=no (docs/guarantees.md), or {without}"
        )
    return f"Grant it, or {without}"


def _listed(missing: Sequence[Acl]) -> str:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return ", ".join(acl.text for acl in missing[:3]) + more


def missing_of_topic(name: str, found: TopicDescription | KafkaError) -> Acl | None:
    """What we may not do with a topic; of one that does not exist, nothing is said."""
    needed = (AclOperation.READ, AclOperation.WRITE)
    if isinstance(found, KafkaError):
        permitted: tuple[object, ...] = () if found.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED else needed
    else:
        # Brokers that do not say what is permitted have no ACLs.
        permitted = needed if found.authorized_operations is None else tuple(found.authorized_operations)
    lacking = tuple(_OPERATIONS[each] for each in needed if each not in permitted)
    return Acl("Topic", lacking, name) if lacking else None


def admin_of(kafka: KafkaAddress) -> AdminClient:
    """A client for the questions below."""
    return AdminClient({**kafka.librdkafka(), "log_level": 0})


def described(
    admin: AdminClient, names: Iterable[str], timeout_s: float = TIMEOUT_S
) -> dict[str, TopicDescription | KafkaError]:
    """Topics with what we may do with them, or why they are not to be seen."""
    wanted = sorted(names)
    if not wanted:
        return {}
    collection = TopicCollection(wanted)
    futures = admin.describe_topics(collection, include_authorized_operations=True, request_timeout=timeout_s)
    return {name: _answer(future) for name, future in futures.items()}


def _answer(future: Future[Any], timeout_s: float | None = None) -> Any:
    """What was asked for, or the error, of librdkafka's own time-out for one.

    Raises:
        TimeoutError: nothing came in ``timeout_s``.
    """
    try:
        return future.result(timeout_s)
    except KafkaException as error:
        return error.args[0]


def missing_of_groups(admin: AdminClient, groups: Iterable[str], timeout_s: float = TIMEOUT_S) -> list[Acl]:
    """Groups that we may not join: they refuse an offset before they look whether its topic exists."""
    missing = []
    for group in groups:
        nowhere = ConsumerGroupTopicPartitions(group, [TopicPartition(f"{group}-no-such-topic", 0, 0)])
        [future] = admin.alter_consumer_group_offsets([nowhere], request_timeout=COORDINATOR_TIMEOUT_S).values()
        with contextlib.suppress(TimeoutError):
            answer = _answer(future, timeout_s)
            if isinstance(answer, KafkaError) and answer.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                missing.append(Acl("Group", ("Read",), group))
    return missing


def missing_of_transactions(kafka: KafkaAddress, app_id: str, timeout_s: float = TIMEOUT_S) -> Acl | None:
    """What keeps a producer from beginning under a transactional id of the app.

    Raises:
        KafkaUnreachable: the brokers do not let it begin, and do not say that they never will.
    """
    producer = _producer(kafka, f"{app_id}-provision")
    try:
        within(timeout_s, producer.init_transactions, timeout_s)
    except TimeoutError as error:
        raise KafkaUnreachable(_no_answer(app_id, timeout_s)) from error
    except KafkaException as error:
        code = error.args[0].code()
        if code in _FENCED:
            return None  # by another worker that asks the same
        refused = refusal(code, app_id, "", app_id)
        if refused is None:
            raise KafkaUnreachable(f"{_no_answer(app_id, timeout_s)}: {error.args[0].str()}") from error
        return refused
    finally:
        discard(producer)
    return None


def _no_answer(app_id: str, timeout_s: float) -> str:
    return (
        f"the brokers let no transaction of {app_id} begin within {timeout_s:g} s; "
        "is transaction.state.log.replication.factor more than the number of brokers?"
    )


def try_transaction(kafka: KafkaAddress, app_id: str, topic: str) -> str | Acl:
    """A real transaction, under an id and a group of its own; nobody sees its record, nobody reads its group's offset.

    Returns:
        what is missing; or why it failed otherwise, which is empty if it did not.
    """
    name = f"{app_id}-provision"
    producer = _producer(kafka, f"{name}-{uuid4().hex[:8]}")
    delivered: list[KafkaError | None] = []
    group = unfenced_group_metadata(Pin(name, -1, ""))
    try:
        within(TIMEOUT_S, producer.init_transactions, TIMEOUT_S)
        producer.begin_transaction()
        producer.produce(topic, b"{}", partition=0, on_delivery=lambda error, _: delivered.append(error))
        within(TIMEOUT_S, producer.flush, TIMEOUT_S)
        refused = delivered[0] if delivered else KafkaError(KafkaError._TIMED_OUT)
        if refused is not None:
            return _why(refused, app_id, topic, name)
        within(TIMEOUT_S, producer.abort_transaction, TIMEOUT_S)
        producer.begin_transaction()
        offsets = [TopicPartition(topic, 0, 0)]
        within(TIMEOUT_S, producer.send_offsets_to_transaction, offsets, group, TIMEOUT_S)
        within(TIMEOUT_S, producer.commit_transaction, TIMEOUT_S)
    except TimeoutError:
        return _no_answer(app_id, TIMEOUT_S)
    except KafkaException as error:
        return _why(error.args[0], app_id, topic, name)
    finally:
        discard(producer)
    return ""


def _producer(kafka: KafkaAddress, transactional_id: str) -> Producer:
    own = {"transactional.id": transactional_id, "log_level": 0, "logger": _quiet}
    return Producer({**kafka.librdkafka(), **own})


def _why(error: KafkaError, app_id: str, topic: str, group: str) -> Acl | str:
    return refusal(error.code(), app_id, topic, group) or str(error.str())


def refusal(code: int, app_id: str, topic: str, group: str) -> Acl | None:
    """The ACL that a code of Kafka's asks for; None: it is about something else."""
    if code not in _REFUSALS:
        return None
    resource, operations = _REFUSALS[code]
    name = {"Topic": topic, "Group": group}.get(resource, app_id)
    return Acl(resource, operations, name, prefixed=resource == "TransactionalId")
