"""What Prometheus reads: well-formed, and true."""

from __future__ import annotations

import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agents import analytics, ledger, sensors  # noqa: F401 - without agents nothing runs here
from streams_app import app
from streams_app.health import Reason
from streams_app.metrics import EngineFigures
from streams_app.store import Store
from tests.rig import PARTITIONS, Rig, free_port, rig, wait_until

#: Prometheus' base units, and what stands for none.
NAME = re.compile(r"(streams_app|kafka|process)_[a-z_]+")
#: What has no unit: states, counts of what there is now, and offsets.
PLAIN = {
    "streams_app_ready",
    "streams_app_assigned_partitions",
    "streams_app_store_keys",
    "streams_app_consumed_offset",
}


class Scraped:
    """One scrape."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            self.content_type = answer.headers["Content-Type"]
            self.text = answer.read().decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}

    def sum(self, name: str, **labels: str) -> float:
        """Of the samples of a name that have these labels."""
        return sum(
            sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


def told(name: str) -> dict[tuple[str, ...], float]:
    """Samples of this process by the values of their labels."""
    [family] = [family for family in EngineFigures(app).collect() if family.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in family.samples if "_created" not in sample.name}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dead_letters", "agent_error"),
        ("dropped_batches", "agent_error"),
        ("dropped_batches", "commit_unconfirmed"),
        ("dropped_batches", "partitions_lost"),
        ("restarts_of_partitions", "kafka_unreachable"),
    ],
)
def test_what_an_alert_waits_for_is_there_before_it_happens(name: str, reason: str) -> None:
    """A counter that is born with its first event has not increased: the first one would wake nobody."""
    assert told(f"streams_app_{name}")["exactly_once", reason] == 0


def test_a_process_that_is_not_ready_is_not_ready_for_any_guarantee(monkeypatch: pytest.MonkeyPatch) -> None:
    """`/readyz` would send it nothing, because of Kafka, and the alert on this metric would stay silent."""
    monkeypatch.setattr(app.health, "reasons_of", lambda _: [])
    assert set(told("streams_app_ready").values()) == {1}
    monkeypatch.setattr(app.health, "_failed_probes", 2)
    assert [reason.reason for reason in app.health.reasons_of_process()] == ["kafka"]
    assert set(told("streams_app_ready").values()) == {0}
    monkeypatch.setattr(app.health, "_failed_probes", 0)
    monkeypatch.setattr(app.health, "reasons_of", lambda _: [Reason("joining", "")])
    assert set(told("streams_app_ready").values()) == {0}


@pytest.fixture
def made(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    with rig(kafka_url, tmp_path) as made:
        made.app = "streams_app"
        yield made


def check_form(scraped: Scraped) -> None:
    """As `promtool check metrics` does, and that no series is there twice."""
    assert scraped.content_type.startswith("text/plain; version=0.0.4")
    for family in scraped.families.values():
        assert family.documentation, family.name
        assert NAME.fullmatch(family.name), family.name
        units = ("_seconds", "_bytes", "_ratio")
        if family.type == "gauge" and family.name.startswith("streams_app"):
            assert family.name in PLAIN or family.name.endswith(units), family.name
        elif family.type == "counter":
            assert all(sample.name.endswith("_total") for sample in family.samples)
        elif family.type == "histogram":
            assert family.name.endswith(units)
            check_histogram(family.samples)
    series = re.findall(r"^([^#\s]+(?:\{.*\})?) ", scraped.text, re.MULTILINE)
    assert len(series) == len(set(series))


def check_histogram(samples: list[object]) -> None:
    """Buckets grow up to the count."""
    by_guarantee = defaultdict(list)
    for sample in samples:
        by_guarantee[sample.labels["guarantee"]].append(sample)  # type: ignore[attr-defined]
    for each in by_guarantee.values():
        buckets = [sample.value for sample in each if sample.name.endswith("_bucket")]
        [count] = [sample.value for sample in each if sample.name.endswith("_count")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == count


def test_the_figures_are_those_of_what_happened(made: Rig) -> None:
    """By guarantee and partition; whoever is called at night relies on them."""
    port = free_port()
    worker = made.worker(PORT=str(port)).wait_started(3)
    check_form(Scraped(port))
    made.generate("transfers", 2_000)
    made.generate("sensor-readings", 1_000)
    made.produce("transfers", b"nobody", b"{")
    wait_until(lambda: Scraped(port).sum("kafka_consumergroup_lag") == 0 and has_all(port), "all is done")
    scraped = Scraped(port)
    check_form(scraped)
    topic, group = f"{made.prefix}transfers", f"{made.prefix}streams-app"
    for partition in range(PARTITIONS):
        place = {"topic": topic, "partition": str(partition)}
        done = sum(message.partition() == partition for message in made.read("transfers"))
        assert scraped.sum("streams_app_events_total", guarantee="exactly_once", **place) == done > 0
        assert scraped.sum("kafka_consumergroup_current_offset", consumergroup=group, **place) == done
        assert scraped.sum("streams_app_consumed_offset", guarantee="exactly_once", **place) == done
        assert scraped.sum("kafka_topic_partition_current_offset", **place) >= done
    of_ledger = {"guarantee": "exactly_once"}
    assert scraped.sum("streams_app_dead_letters_total", reason="malformed", **of_ledger) == 1
    outputs = sum(len(made.read(name)) for name in ("transfer-results", "ledger", "credits", "dead-letters"))
    assert scraped.sum("streams_app_outputs_total") - len(made.read("sensor-observations")) == outputs
    assert scraped.sum("streams_app_outputs_total", guarantee="at_most_once") == 1_000
    batches = scraped.sum("streams_app_batches_total", **of_ledger)
    assert 0 < batches == scraped.sum("streams_app_commit_duration_seconds_count", **of_ledger)
    assert scraped.sum("streams_app_commit_duration_seconds_sum", **of_ledger) > 0
    assert scraped.sum("streams_app_end_to_end_latency_seconds_count", **of_ledger) >= batches
    for guarantee in ("exactly_once", "at_least_once", "at_most_once"):
        assert scraped.sum("streams_app_ready", guarantee=guarantee) == 1
        assert scraped.sum("streams_app_rebalances_total", guarantee=guarantee) >= 1
    assert scraped.sum("streams_app_assigned_partitions", **of_ledger) == 2 * PARTITIONS, "transfers and credits"
    assert scraped.sum("streams_app_store_size_bytes", table="accounts", role="owner") > 0
    assert scraped.sum("streams_app_restore_progress_ratio", **of_ledger) == 1
    assert worker.alive


def has_all(port: int) -> bool:
    scraped = Scraped(port)
    transfers = scraped.sum("streams_app_events_total", guarantee="exactly_once")
    return transfers > 2_001 and scraped.sum("streams_app_events_total", guarantee="at_most_once") == 1_000


def test_what_was_dropped_is_told_with_its_reason(made: Rig, tmp_path: Path) -> None:
    """An agent that fails looks, from outside, like one that is slow."""
    made.app = "tests.apps.balances"
    port = free_port()
    made.worker(PORT=str(port)).wait_started()
    made.send(100, orders={50: "fail"})
    made.wait_drained()
    scraped = Scraped(port)
    assert scraped.sum("streams_app_dropped_batches_total", reason="agent_error") >= 3
    assert scraped.sum("streams_app_dead_letters_total", reason="agent_error") == 1


def test_a_store_tells_its_size_until_it_is_closed(tmp_path: Path) -> None:
    """Asked from another thread than the one that closes it."""
    store = Store(tmp_path / "store", topic_id="id")
    store.publish({b"k%d" % number: b"v" * 1_000 for number in range(1_000)}, [], 999)
    store.write_out()
    size = store.size()
    assert size is not None
    assert size.size_bytes > 100_000
    assert 900 < size.keys < 1_100
    store.close()
    assert store.size() is None
