"""Faust's settings, as somebody who comes from stock Faust gives them to the app.

Those that have a variable here are taken for it, unless the environment says otherwise; those that nobody would read are
refused, as somebody relies on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from faust.exceptions import ImproperlyConfigured
from mode.utils.imports import symbol_by_name
from mode.utils.times import want_seconds

_ALWAYS = "the guarantee decides it"
_GONE = "what it is about is not there"
_CLIENTS = "the clients are set up as the guarantee needs them"
_STORE = "tables are kept on disk, in RocksDB, and in their changelog"


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
    "aerospike_retries_on_exception": _STORE,
    "aerospike_sleep_seconds_between_retries_on_exception": _STORE,
    "broker_api_version": _CLIENTS,
    "broker_check_crcs": _CLIENTS,
    "broker_consumer": "there is one Kafka, of KAFKA_URL",
    "broker_producer": "there is one Kafka, of KAFKA_URL",
    "broker_credentials": "they stand in KAFKA_URL and KAFKA_CLIENT_CERT",
    "broker_commit_livelock_soft_timeout": _GONE,
    "broker_heartbeat_interval": "it follows from STREAMS_APP_SESSION_TIMEOUT_MS",
    "broker_rebalance_timeout": "it follows from STREAMS_APP_SESSION_TIMEOUT_MS",
    "broker_max_poll_interval": _GONE,
    "ConsumerScheduler": "partitions take turns",
    "consumer_api_version": _CLIENTS,
    "consumer_connections_max_idle_ms": _CLIENTS,
    "consumer_metadata_max_age_ms": _CLIENTS,
    "crash_app_on_aerospike_exception": _STORE,
    "cython_optimizations": _GONE,
    "Event": "the engine makes events, of its own class",
    "GlobalTable": "a global table is a Table, of which an app may have another class",
    "consumer_group_instance_id": "a member that comes back under its old name could not be told from its zombie",
    "producer_acks": _ALWAYS,
    "producer_api_version": _CLIENTS,
    "producer_compression_type": "what is sent is compressed by lz4",
    "producer_linger": _ALWAYS,
    "producer_linger_ms": _ALWAYS,
    "producer_connections_max_idle_ms": _CLIENTS,
    "producer_max_batch_size": _ALWAYS,
    "producer_max_request_size": "a record has at most what brokers take by default, a megabyte",
    "producer_metadata_max_age_ms": _CLIENTS,
    "producer_partitioner": "keys are hashed as Java's clients hash them",
    "producer_threaded": _GONE,
    "recovery_consistency_check": "a store that does not fit its changelog is always restored",
    "SetGlobalTable": "a global table of sets is a SetTable, of which an app may have another class",
    "ssl_context": "it is made of KAFKA_TRUSTED_CERT and KAFKA_CLIENT_CERT",
    "store_check_exists": _STORE,
    "stream_ack_cancelled_tasks": _ALWAYS,
    "stream_ack_exceptions": _ALWAYS,
    "stream_buffer_maxsize": "STREAMS_APP_BATCH_MAX_EVENTS bounds what is in memory",
    "stream_processing_timeout": _GONE,
    "stream_publish_on_commit": _ALWAYS,
    "stream_recovery_delay": _GONE,
    "stream_wait_empty": _GONE,
    "table_cleanup_interval": "windows expire with the batches that move their time on",
    "table_key_index_size": _GONE,
    "tabledir": "tables lie below STREAMS_APP_DATADIR, in a folder for each worker",
}

#: Option of a table to why it is not there.
TABLE_REFUSED: Mapping[str, str] = {
    "on_changelog_event": "a table is restored by RocksDB's own means, record by record nobody looks at it; use on_recover, "
    "or read the changelog with an agent",
    "use_partitioner": "a key lies in the partition of the event that writes it; send an event with that key, and let its "
    "agent write",
    "synchronize_all_active_partitions": "declare it with app.GlobalTable()",
    "is_global": "declare it with app.GlobalTable()",
    "changelog_topic": "a changelog is named after its table, and compacted; give the table another name",
    "options": "all tables of a process share one cache and its bounds",
}
_STORES = ("memory", "rocksdb")
#: What stock Faust still takes under an older name.
_OLDER_NAMES = {
    "client_id": "broker_client_id",
    "commit_interval": "broker_commit_interval",
    "create_reply_topic": "reply_create_topic",
    "num_standby_replicas": "table_standby_replicas",
    "default_partitions": "topic_partitions",
    "replication_factor": "topic_replication_factor",
}


def check_table_options(options: Mapping[str, Any]) -> None:
    """Raise `ImproperlyConfigured` if an option of a table would change nothing."""
    found = [f"{name}: {why}" for name, why in TABLE_REFUSED.items() if options.get(name)]
    store = str(options.get("store") or "memory://").partition(":")[0]
    if store not in _STORES:
        found.append(f"store={store}: {_STORE}")
    if found:
        raise ImproperlyConfigured(f"table {options.get('name')} cannot have\n  " + "\n  ".join(found))


def as_variables(options: dict[str, Any]) -> dict[str, str]:
    """Take from an app's options those that have a variable here, and give these variables."""
    for older, name in _OLDER_NAMES.items():
        if older in options:
            options[name] = options.pop(older)
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


def check_classes(app_id: str, options: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise `ImproperlyConfigured` if a class that an app is given is not made of the one that does the work here."""
    for name, own in ours.items():
        given = symbol_by_name(options[name]) if name in options else None
        if isinstance(given, type) and not issubclass(given, symbol_by_name(own)):
            raise ImproperlyConfigured(
                f"{app_id} has {name}={given.__name__}, without which no guarantee holds: derive it from {own}"
            )
