"""What all tests share: one real Kafka for the whole run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from streams_app.embedded import EmbeddedKafka, free_port


@pytest.fixture(scope="session")
def kafka_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``kafka://127.0.0.1:PORT`` of a broker of this run alone, or what the variable KAFKA_URL says."""
    given = os.environ.get("KAFKA_URL")
    if given:
        yield given
        return
    with EmbeddedKafka.ensure(tmp_path_factory.mktemp("kafka"), port=free_port()) as kafka:
        yield kafka.url
