"""Agents that are asked, and answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rig import rig, wait_until


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once", "at_most_once"])
def test_whoever_asks_from_outside_of_agents_gets_an_answer(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """A web view or a timer; under exactly once the answer rides in the transaction of the event that was asked."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee, ASK="yes") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        worker = asking.worker()
        wait_until(lambda: worker.says("answers: [10, 20]") or not worker.alive, "an answer")
        assert worker.says("answers: [10, 20]"), worker.log.read_text()[-3000:]
        asking.stop()


def test_an_agent_that_asks_another_goes_on_with_the_answer(kafka_url: str, tmp_path: Path) -> None:
    """Its batch waits for the event in hand, and the question is in a later one."""
    with rig(kafka_url, tmp_path, GUARANTEE="at_least_once") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        asking.worker().wait_started()
        asking.send(50)
        asking.wait_consumed()
        assert asking.check_at_least_once() == 0
        asking.stop()


def test_an_agent_that_asks_another_exactly_once_is_refused(kafka_url: str, tmp_path: Path) -> None:
    """It would wait for ever: the question leaves with a commit that waits for the answer."""
    with rig(kafka_url, tmp_path, GUARANTEE="exactly_once") as asking:
        asking.app = "tests.apps.asking"
        asking.create_topics("amounts")
        worker = asking.worker().wait_started()
        asking.send(1)
        assert worker.wait() != 0
        assert worker.says("the commit waits for the event")
