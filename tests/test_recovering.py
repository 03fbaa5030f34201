"""What a worker does with its tables when it starts: on_recover, without any, and with the wrong number of partitions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.rig import rig, wait_until


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once", "at_most_once"])
def test_who_waits_for_a_table_is_called_when_it_is_restored(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """Before the first event; what is committed is there, whether from the disk or from the changelog."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee) as made:
        made.app = "tests.apps.recovering"
        worker = made.worker().wait_started()
        assert worker.says("recovered: 0 in all")
        made.send(200)
        made.wait_consumed()
        total = sum(json.loads(message.value())["amount"] for message in made.read("entries"))
        made.stop()
        for removed in False, True:
            if removed:
                shutil.rmtree(made.folder / "data")
            assert made.worker().wait_started().says(f"recovered: {total} in all")
            made.stop()


def test_an_app_without_tables_and_standbys_starts(kafka_url: str, tmp_path: Path) -> None:
    """Stock Faust's own assignor is not asked then, exactly once, and the worker crashes."""
    with rig(kafka_url, tmp_path, WITHOUT_TABLE="yes", STREAMS_APP_STANDBY_REPLICAS="0") as made:
        made.app = "tests.apps.recovering"
        made.worker().wait_started()
        made.send(100)
        wait_until(lambda: len(made.read("balances")) == 100, "all are done")
        made.stop()


def test_a_table_of_another_number_of_partitions_is_refused(kafka_url: str, tmp_path: Path) -> None:
    """With more of them than the topic has, nothing would fail: a key that comes from two topics would lie in two places."""
    with rig(kafka_url, tmp_path, TABLE_PARTITIONS="8") as made:
        made.app = "tests.apps.recovering"
        worker = made.worker().wait_started()
        made.send(1)
        assert worker.wait() != 0
        assert worker.says("with the same number of partitions a key lies in one place")
