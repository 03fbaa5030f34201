"""Kafka dies and comes back under workers: none of them ends, and each guarantee holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams_app.embedded import EmbeddedKafka, free_port
from tests.rig import rig


@pytest.mark.parametrize(
    "guarantee",
    ["exactly_once", *(pytest.param(each, marks=pytest.mark.prove) for each in ("at_least_once", "at_most_once"))],
)
def test_a_broker_that_is_killed_and_started_again_ends_no_worker(tmp_path: Path, guarantee: str) -> None:
    """Asked for a group's offsets at that moment, librdkafka's admin client ended the process; and nobody rejoined."""
    with (
        EmbeddedKafka.ensure(tmp_path / "kafka", port=free_port()) as kafka,
        rig(kafka.url, tmp_path, GUARANTEE=guarantee) as made,
    ):
        workers = [made.worker(slot).wait_started() for slot in ("one", "two")]
        for _ in range(2):
            made.send(200, rate=400)
            [broker] = kafka.brokers
            broker.kill()
            broker.start()
            made.send(200, rate=400)
        made.wait_consumed(150)
        assert all(worker.alive for worker in workers)
        made.stop()
        if guarantee == "exactly_once":
            made.check()
        elif guarantee == "at_least_once":
            made.check_at_least_once()
        else:
            made.check_at_most_once()
