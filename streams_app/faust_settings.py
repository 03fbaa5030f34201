"""Faust's settings, as somebody who comes from stock Faust gives them to the app.

Those that have a variable here are taken for it, unless the environment says otherwise; those that nobody would read are
refused, as somebody relies on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from faust.exceptions import ImproperlyConfigured
from mode.utils.times import want_seconds

_ALWAYS = "the guarantee decides it"
_GONE = "what it is about is not there"


def _urls(value: Any) -> str:
    parts = [value] if isinstance(value, str) else [str(each) for each in value]
    return ",".join(part.strip() for each in parts for part in each.replace(";", ",").split(","))


def _milliseconds(value: Any) -> str:
    return str(round(want_seconds(value) * 1000))


#: Option to variable, and how its value is written there.
TRANSLATED: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "broker": ("KAFKA_URL", _urls),
    "url": ("KAFKA_URL", _urls),
    "datadir": ("STREAMS_APP_DATADIR", str),
    "web_port": ("PORT", str),
    "broker_commit_interval": ("STREAMS_APP_COMMIT_INTERVAL_MS", _milliseconds),
    "broker_commit_every": ("STREAMS_APP_BATCH_MAX_EVENTS", str),
    "broker_max_poll_records": ("STREAMS_APP_BATCH_MAX_EVENTS", str),
    "broker_session_timeout": ("STREAMS_APP_SESSION_TIMEOUT_MS", _milliseconds),
    "producer_request_timeout": ("STREAMS_APP_TRANSACTION_TIMEOUT_MS", _milliseconds),
    "topic_partitions": ("STREAMS_APP_TOPIC_PARTITIONS", str),
    "topic_replication_factor": ("STREAMS_APP_TOPIC_REPLICATION", str),
    "table_standby_replicas": ("STREAMS_APP_STANDBY_REPLICAS", str),
}
#: Tables are on disk, in RocksDB, whatever it says.
WITHOUT_EFFECT = frozenset({"store"})
#: Option to why it is not there.
REFUSED: Mapping[str, str] = {
    "broker_credentials": "they stand in KAFKA_URL and KAFKA_CLIENT_CERT",
    "ssl_context": "it is made of KAFKA_TRUSTED_CERT and KAFKA_CLIENT_CERT",
    "broker_consumer": "there is one Kafka, of KAFKA_URL",
    "broker_producer": "there is one Kafka, of KAFKA_URL",
    "broker_commit_livelock_soft_timeout": _GONE,
    "broker_heartbeat_interval": "it follows from STREAMS_APP_SESSION_TIMEOUT_MS",
    "broker_rebalance_timeout": "it follows from STREAMS_APP_SESSION_TIMEOUT_MS",
    "broker_max_poll_interval": _GONE,
    "consumer_group_instance_id": "a member that comes back under its old name could not be told from its zombie",
    "producer_acks": _ALWAYS,
    "producer_compression_type": "what is sent is compressed by lz4",
    "producer_linger": _ALWAYS,
    "producer_linger_ms": _ALWAYS,
    "producer_max_batch_size": _ALWAYS,
    "producer_max_request_size": "a record has at most what brokers take by default, a megabyte",
    "producer_partitioner": "keys are hashed as Java's clients hash them",
    "producer_threaded": _GONE,
    "recovery_consistency_check": "a store that does not fit its changelog is always restored",
    "stream_ack_cancelled_tasks": _ALWAYS,
    "stream_ack_exceptions": _ALWAYS,
    "stream_processing_timeout": _GONE,
    "stream_publish_on_commit": _ALWAYS,
    "stream_recovery_delay": _GONE,
    "stream_wait_empty": _GONE,
    "table_cleanup_interval": "windows expire with the batches that move their time on",
    "table_key_index_size": _GONE,
}


def as_variables(options: dict[str, Any]) -> dict[str, str]:
    """Take from an app's options those that have a variable here, and give these variables."""
    for name in WITHOUT_EFFECT & options.keys():
        del options[name]
    return {variable: write(options.pop(name)) for name, (variable, write) in TRANSLATED.items() if name in options}


def check_options(app_id: str, options: Iterable[str]) -> None:
    """Raise `ImproperlyConfigured` if options would change nothing; it names all of them."""
    found = [f"{name}: {REFUSED[name]}" for name in options if name in REFUSED]
    if found:
        raise ImproperlyConfigured(
            f"settings of {app_id} that would change nothing, take them out:\n  " + "\n  ".join(found)
        )
