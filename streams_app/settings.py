"""The environment, read once.

Every setting of ours is an environment variable (the README lists them); this is the only module that reads them. What
injects faults for tests and the lab is none, and is read in `streams_app.faults`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from streams_app.errors import ConfigurationError

#: In the order in which they cost.
GUARANTEES = ("exactly_once", "at_least_once", "at_most_once")
#: Of a process that runs no agents: it answers by HTTP.
NO_GUARANTEE = "none"
SASL_MECHANISMS = ("SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN")
#: ``auto``: for people where stderr is a terminal, JSON elsewhere.
LOG_FORMATS = ("auto", "json", "text")


@dataclass(frozen=True)
class Settings:
    """All settings with their defaults; units stand at the end of the names."""

    #: Not shown, as it may have a password; neither are the other secrets.
    kafka_url: str | None = field(default=None, repr=False)
    kafka_prefix: str = ""
    kafka_trusted_cert: str | None = field(default=None, repr=False)
    kafka_client_cert: str | None = field(default=None, repr=False)
    kafka_client_cert_key: str | None = field(default=None, repr=False)
    kafka_sasl_mechanism: str = SASL_MECHANISMS[0]
    #: None: unless ``kafka_trusted_cert`` is given; see kafka.py.
    kafka_check_host_names: bool | None = None
    #: Whether to start one where ``kafka_url`` is missing: on a platform, what it holds would be gone with its container.
    embedded_kafka: bool = True
    #: Those that this process runs; a process runs all agents of a guarantee or none.
    guarantees: tuple[str, ...] = GUARANTEES
    slot: str | None = None
    #: Of the web server; None: 6066 or the next free one.
    port: int | None = None
    #: Whoever writes by HTTP must know it; None: only this machine may.
    web_token: str | None = field(default=None, repr=False)
    datadir: Path = Path(".streams-app")
    #: Length of a transaction under load. Kafka Streams' default for exactly once; shorter costs the broker more.
    commit_interval_ms: int = 100
    #: Bound of one batch, so that a slow agent holds a bounded amount of work (and of memory) in hand.
    batch_max_events: int = 20_000
    #: The same of at most once: the most that one crash can lose.
    at_most_once_batch_max_events: int = 1_000
    #: Whether at least once commits tables and offsets in a transaction; unfenced only where a cluster permits none.
    at_least_once_fenced: bool = True
    #: Deliveries of one event before the one that raised is set aside.
    max_attempts: int = 3
    #: Of a question that an agent asks another one with an event in hand: nothing of the batch commits before it is answered.
    answer_timeout_ms: int = 60_000
    #: Below the broker's transaction time-out, so that we give up before it does.
    transaction_timeout_ms: int = 10_000
    #: That long nobody works on a killed worker's partitions (Faust's default of 60 s is a minute of silence).
    session_timeout_ms: int = 8_000
    #: A revoked batch may finish and commit within this time; then it is dropped.
    revoke_timeout_ms: int = 2_000
    topic_partitions: int = 4
    topic_replication: int = 1
    #: Other workers that follow each table's partition, to take it over without a restore. As many as Faust has.
    standby_replicas: int = 1
    #: An event loop or a commit that has not moved for so long hangs, and the process is ended; 0: never.
    hang_timeout_ms: int = 60_000
    #: `LOG_FORMATS`.
    log_format: str = "auto"
    #: Ids of transfers are remembered that long of the partition's record time.
    remember_ids_s: int = 24 * 60 * 60

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Settings:
        """Read the settings from ``env``.

        Raises:
            ConfigurationError: a number is not a number, or not positive.
        """
        defaults = cls()

        def number(name: str, default: int, least: int = 1) -> int:
            text = env.get(name)
            if text is None:
                return default
            if not text.strip().isdigit() or int(text) < least:
                raise ConfigurationError(f"{name} is {text!r}; it must be a whole number of at least {least}")
            return int(text)

        return cls(
            kafka_url=env.get("KAFKA_URL") or None,
            kafka_prefix=env.get("KAFKA_PREFIX", ""),
            kafka_trusted_cert=env.get("KAFKA_TRUSTED_CERT") or None,
            kafka_client_cert=env.get("KAFKA_CLIENT_CERT") or None,
            kafka_client_cert_key=env.get("KAFKA_CLIENT_CERT_KEY") or None,
            kafka_sasl_mechanism=_sasl_mechanism(env.get("STREAMS_APP_KAFKA_SASL_MECHANISM")),
            kafka_check_host_names=_switch(env, "STREAMS_APP_KAFKA_CHECK_HOST_NAMES", None),
            embedded_kafka=_switch(env, "STREAMS_APP_EMBEDDED_KAFKA", "DYNO" not in env),
            guarantees=_guarantees(env.get("STREAMS_APP_GUARANTEES")),
            slot=env.get("STREAMS_APP_SLOT") or env.get("DYNO") or None,
            port=number("PORT", 0) or None,
            # Files with secrets end with a line break, which no header can have.
            web_token=env.get("STREAMS_APP_WEB_TOKEN", "").strip() or None,
            datadir=Path(env.get("STREAMS_APP_DATADIR") or defaults.datadir),
            commit_interval_ms=number("STREAMS_APP_COMMIT_INTERVAL_MS", defaults.commit_interval_ms),
            batch_max_events=number("STREAMS_APP_BATCH_MAX_EVENTS", defaults.batch_max_events),
            at_most_once_batch_max_events=number(
                "STREAMS_APP_AT_MOST_ONCE_BATCH_MAX_EVENTS", defaults.at_most_once_batch_max_events
            ),
            at_least_once_fenced=_switch(env, "STREAMS_APP_AT_LEAST_ONCE_FENCED", defaults.at_least_once_fenced),
            max_attempts=number("STREAMS_APP_MAX_ATTEMPTS", defaults.max_attempts),
            answer_timeout_ms=number("STREAMS_APP_ANSWER_TIMEOUT_MS", defaults.answer_timeout_ms),
            transaction_timeout_ms=number("STREAMS_APP_TRANSACTION_TIMEOUT_MS", defaults.transaction_timeout_ms),
            session_timeout_ms=number("STREAMS_APP_SESSION_TIMEOUT_MS", defaults.session_timeout_ms),
            revoke_timeout_ms=number("STREAMS_APP_REVOKE_TIMEOUT_MS", defaults.revoke_timeout_ms),
            topic_partitions=number("STREAMS_APP_TOPIC_PARTITIONS", defaults.topic_partitions),
            topic_replication=number("STREAMS_APP_TOPIC_REPLICATION", defaults.topic_replication),
            standby_replicas=number("STREAMS_APP_STANDBY_REPLICAS", defaults.standby_replicas, least=0),
            hang_timeout_ms=number("STREAMS_APP_HANG_TIMEOUT_MS", defaults.hang_timeout_ms, least=0),
            log_format=_one_of(env, "STREAMS_APP_LOG_FORMAT", LOG_FORMATS),
            remember_ids_s=number("STREAMS_APP_REMEMBER_IDS_S", defaults.remember_ids_s),
        )


def _one_of(env: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    """One of ``choices``; the first is the default."""
    text = env.get(name, "").strip().lower() or choices[0]
    if text not in choices:
        raise ConfigurationError(f"{name} is {text!r}; it must be one of {', '.join(choices)}")
    return text


S = TypeVar("S", bool, bool | None)


def _switch(env: Mapping[str, str], name: str, default: S) -> S | bool:
    text = env.get(name, "").strip().lower()
    if text not in {"", "yes", "no"}:
        raise ConfigurationError(f"{name} is {text!r}; it must be yes or no")
    return text == "yes" if text else default


def _sasl_mechanism(text: str | None) -> str:
    mechanism = (text or SASL_MECHANISMS[0]).strip().upper()
    if mechanism not in SASL_MECHANISMS:
        raise ConfigurationError(
            f"STREAMS_APP_KAFKA_SASL_MECHANISM is {text!r}; it must be one of {', '.join(SASL_MECHANISMS)}"
        )
    return mechanism


def _guarantees(text: str | None) -> tuple[str, ...]:
    if (text or "").strip() == NO_GUARANTEE:
        return ()
    named = {each.strip() for each in (text or "").split(",") if each.strip()}
    unknown = named - set(GUARANTEES)
    if unknown:
        raise ConfigurationError(
            f"STREAMS_APP_GUARANTEES names {', '.join(sorted(unknown))}; "
            f"it is a comma list of {', '.join(GUARANTEES)}, or {NO_GUARANTEE}"
        )
    return tuple(each for each in GUARANTEES if not named or each in named)
