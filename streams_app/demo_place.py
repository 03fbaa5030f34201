"""Where a run of the demo leaves its things: a folder, and on a Kafka that was there before, topics under a prefix."""

from __future__ import annotations

import contextlib
import fcntl
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from streams_app.deadlines import COORDINATOR_TIMEOUT_S
from streams_app.embedded import Broker
from streams_app.errors import KafkaUnreachable, NotPermitted
from streams_app.kafka import KafkaAddress
from streams_app.settings import Settings

_ADMIN_TIMEOUT_S = 15.0
_NOT_PERMITTED = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED})


@dataclass
class Place:
    """The folder of a run, and its prefix if it is a guest of a Kafka that was there before."""

    folder: Path
    settings: Settings
    guest_of: KafkaAddress | None = None
    keep: bool = True

    @property
    def text(self) -> str:
        """For people."""
        if self.guest_of is None:
            return f"{self.folder} (logs, tables, Kafka's data)"
        return f"{self.folder} (logs, tables) and the topics {self.settings.kafka_prefix}*"


@contextlib.contextmanager
def place_of(settings: Settings, on_keep: Callable[[str], None], kind: str = "demo") -> Iterator[Place]:
    """A folder of this run alone; kept, and ``on_keep`` told, when the run was not good and left something."""
    settings.datadir.mkdir(parents=True, exist_ok=True)
    _end_orphans(settings.datadir, kind)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=settings.datadir)).absolute()
    own = replace(settings, datadir=folder)
    if settings.kafka_url is not None:
        # Behind the prefix that is ours: a cluster with ACLs permits nothing else.
        own = replace(own, kafka_prefix=f"{settings.kafka_prefix}{kind}-{secrets.token_hex(4)}-")
    place = Place(folder, own)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield place
        except KeyboardInterrupt:
            place.keep = False
            raise
        finally:
            if place.keep and list(folder.glob("*.log")):
                on_keep(place.text)
            else:
                _remove(place, on_keep)


def _remove(place: Place, on_keep: Callable[[str], None]) -> None:
    try:
        if place.guest_of is not None:
            _delete_topics(place.guest_of, place.settings.kafka_prefix)
    except NotPermitted as error:
        on_keep(str(error))
    shutil.rmtree(place.folder)


def _end_orphans(datadir: Path, kind: str) -> None:
    """End the Kafka of earlier runs that were killed themselves, and so could not; their folders stay."""
    for folder in datadir.glob(f"{kind}-*"):
        try:
            lock = open(folder / "lock")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # that run goes on
            for home in folder.glob("kafka/broker-*"):
                Broker(home, int(home.name.removeprefix("broker-"))).stop()


def _delete_topics(address: KafkaAddress, prefix: str) -> None:
    """Leave a Kafka that is not ours as we found it.

    Raises:
        NotPermitted: it does not let us.
        KafkaUnreachable: it does not answer any more.
    """
    admin = AdminClient({**address.librdkafka(), "log_level": 0})
    try:
        topics = [name for name in admin.list_topics(timeout=_ADMIN_TIMEOUT_S).topics if name.startswith(prefix)]
        groups = admin.list_consumer_groups(request_timeout=_ADMIN_TIMEOUT_S).result(_ADMIN_TIMEOUT_S).valid
        members = [group.group_id for group in groups if group.group_id.startswith(prefix)]
        deleting = dict(admin.delete_topics(topics, request_timeout=_ADMIN_TIMEOUT_S)) if topics else {}
        if members:
            deleting |= admin.delete_consumer_groups(members, request_timeout=COORDINATOR_TIMEOUT_S)
        for future in deleting.values():
            future.result(_ADMIN_TIMEOUT_S)
    except (KafkaException, TimeoutError) as error:
        why = error.args[0] if isinstance(error, KafkaException) else KafkaError(KafkaError._TIMED_OUT)
        if why.code() in _NOT_PERMITTED:
            raise NotPermitted(f"the topics {prefix}* (this Kafka does not let us delete them)") from error
        raise KafkaUnreachable(
            f"the demo is through, but its topics {prefix}* could not be deleted: {why.str()}"
        ) from error
