"""How to reach Kafka: the address from the environment, as configuration for both client libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from streams_app.errors import ConfigurationError, KafkaUnreachable

DEFAULT_PORT = 9092


@dataclass(frozen=True)
class KafkaAddress:
    """The brokers of one cluster."""

    #: ``host:port``, comma-separated.
    servers: str

    @classmethod
    def parse(cls, url: str) -> KafkaAddress:
        """Read ``KAFKA_URL``: a comma list of ``kafka://host:port``.

        Raises:
            ConfigurationError: no address in it, or a scheme that is not known.
        """
        servers = []
        for part in filter(None, (part.strip() for part in url.split(","))):
            address = urlsplit(part if "://" in part else f"kafka://{part}")
            if address.scheme != "kafka" or not address.hostname:
                raise ConfigurationError(f"KAFKA_URL has {part!r}; each address must read kafka://host:port")
            host = f"[{address.hostname}]" if ":" in address.hostname else address.hostname
            servers.append(f"{host}:{address.port or DEFAULT_PORT}")
        if not servers:
            raise ConfigurationError(
                "KAFKA_URL is empty; write kafka://host:port, or leave it unset for the embedded Kafka"
            )
        return cls(",".join(servers))

    @property
    def urls(self) -> list[str]:
        """For Faust's ``broker`` setting."""
        return [f"kafka://{server}" for server in self.servers.split(",")]

    def librdkafka(self) -> dict[str, Any]:
        """Configuration for confluent-kafka's clients."""
        # Errors only: a broker that restarts is news to nobody here, and every client would tell it.
        return {"bootstrap.servers": self.servers, "log_level": 3}

    def aiokafka(self) -> dict[str, Any]:
        """Configuration for aiokafka's clients."""
        return {"bootstrap_servers": self.servers}

    def check(self, timeout_s: float = 10.0) -> None:
        """Raise `KafkaUnreachable` if no broker answers within ``timeout_s``."""
        from confluent_kafka import KafkaException  # noqa: PLC0415 - only commands ask
        from confluent_kafka.admin import AdminClient  # noqa: PLC0415

        admin = AdminClient({**self.librdkafka(), "log_level": 0})
        try:
            admin.list_topics(timeout=timeout_s)
        except KafkaException as error:
            raise KafkaUnreachable(
                f"no Kafka broker answers at {self.servers} within {timeout_s:g} s: {error.args[0].str()}"
            ) from error
