"""Workers that are killed, frozen and rebalanced, against a real Kafka: every entry takes effect exactly once."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer

from streams_app.errors import ExitCode
from streams_app.offsets import Offsets
from tests.rig import PARTITIONS, Rig, rig, wait_until

STEPS = [
    "1 prepare: begin",
    "1 prepare: outputs produced",
    "2 offsets",
    "3 end",
    "4 publish",
    "4 publish: a store",
    "5 published",
]


@pytest.fixture
def balances(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    """A rig for the balances app."""
    with rig(kafka_url, tmp_path) as made:
        yield made


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step_of_the_commit_leaves_all_or_nothing(balances: Rig, step: str) -> None:
    """A crash in the middle of a commit would double or lose a transfer."""
    balances.send(300)
    worker = balances.worker(STREAMS_APP_FAULT=f"kill {step}@3").wait_started()
    balances.send(300, rate=300)
    assert worker.wait() == -signal.SIGKILL
    balances.worker()
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    balances.check()
    balances.check_stores()


def test_the_first_batch_ever_is_read_again_after_it_was_aborted(balances: Rig) -> None:
    """Without a committed start the first events would be skipped after a crash."""
    balances.send(200)
    assert balances.worker(STREAMS_APP_FAULT="kill 2 offsets@1").wait() == -signal.SIGKILL
    balances.worker()
    balances.wait_drained()
    balances.stop()
    balances.check()


@pytest.mark.parametrize("step", ["2 offsets", "3 end"])
def test_another_worker_takes_over_what_a_killed_one_left_open(balances: Rig, step: str) -> None:
    """An open transaction of a dead worker would hold up its partitions until the broker times it out."""
    balances.settings["STREAMS_APP_TRANSACTION_TIMEOUT_MS"] = "60000"
    balances.worker("one", STREAMS_APP_FAULT=f"kill {step}@4")
    first = balances.workers[0].wait_started()
    second = balances.worker("two").wait_started()
    balances.send(600, rate=300)
    assert first.wait() == -signal.SIGKILL
    killed_s = time.monotonic()
    times = second.count("partitions started")
    second.wait_started(times + 1)
    assert time.monotonic() - killed_s < 45, "well before the broker would have ended the transaction"
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    balances.check()


@pytest.mark.parametrize("step", ["2 offsets", "3 end"])
def test_a_zombie_that_wakes_up_in_its_commit_changes_nothing(balances: Rig, step: str) -> None:
    """A paused worker that commits after its successor began would double what both did."""
    # Long enough that the broker does not end the zombie's transaction: the pin has to keep it out.
    balances.settings["STREAMS_APP_TRANSACTION_TIMEOUT_MS"] = "60000"
    zombie = balances.worker("zombie", STREAMS_APP_FAULT=f"stop {step}@4").wait_started()
    balances.send(600, rate=300)
    wait_until(lambda: zombie.frozen, "the worker froze")
    successor = balances.worker("successor").wait_started()
    balances.send(200)
    balances.wait_drained()
    zombie.signal(signal.SIGCONT)
    balances.send(200, rate=200)
    wait_until(lambda: zombie.count("partitions started") >= 2, "the zombie rejoined")
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    assert successor.says("revoked")
    balances.check()


def test_a_zombie_that_froze_while_its_partitions_were_revoked_changes_nothing(balances: Rig) -> None:
    """Between revoke and rejoin a worker may still commit, but not after its session is over."""
    zombie = balances.worker("zombie", SLEEP_S="1.0").wait_started()
    balances.send(40, orders=dict.fromkeys(range(5, 40), "sleep"))
    successor = balances.worker("successor", SLEEP_S="0")
    wait_until(lambda: zombie.says("is revoked"), "the revoke callback runs")
    zombie.signal(signal.SIGSTOP)
    successor.wait_started()
    balances.wait_drained()
    zombie.signal(signal.SIGCONT)
    wait_until(lambda: zombie.count("partitions started") >= 2, "the zombie rejoined")
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    balances.check()


@pytest.mark.parametrize("step", ["2 offsets", "3 end"])
def test_a_transaction_that_the_broker_timed_out_is_done_again(balances: Rig, step: str) -> None:
    """The worker is still a member, but its producer is fenced: it has to go on with a new one, not to stop."""
    balances.settings |= {"STREAMS_APP_TRANSACTION_TIMEOUT_MS": "1000", "STREAMS_APP_SESSION_TIMEOUT_MS": "45000"}
    worker = balances.worker(STREAMS_APP_FAULT=f"stop {step}@3").wait_started()
    balances.send(300, rate=300)
    wait_until(lambda: worker.frozen, "the worker froze")
    # The broker looks for transactions past their time every 10 s: the open one ends as aborted.
    wait_until(lambda: balances.last_stable() == balances.ends(), "the broker ended the transaction")
    worker.signal(signal.SIGCONT)
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    assert worker.says("TransactionAborted") or worker.says("CommitUnconfirmed")
    balances.check()
    balances.check_stores()


def test_workers_that_come_and_go_amid_transactions_change_nothing(balances: Rig) -> None:
    """Each rebalance revokes partitions that have a batch in hand."""
    balances.come_and_go(3)
    balances.wait_drained()
    balances.stop()
    balances.check()


def test_a_slow_agent_does_not_hold_up_a_rebalance(balances: Rig) -> None:
    """One event that takes a minute would keep the whole group from working for as long."""
    slow = balances.worker("slow", SLEEP_S="600").wait_started()
    balances.send(1, orders={0: "sleep"})
    wait_until(lambda: slow.says("sleeps"), "the agent sleeps")
    balances.worker("other", SLEEP_S="0").wait_started()
    slow.kill()
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    balances.check()


def test_a_lost_table_folder_is_restored_from_the_changelog(balances: Rig) -> None:
    """On platforms with ephemeral disks every restart is one without tables."""
    worker = balances.worker().wait_started()
    balances.send(300)
    balances.wait_drained()
    worker.kill()
    shutil.rmtree(balances.folder / "data")
    balances.send(100)
    balances.worker()
    balances.wait_drained()
    balances.stop()
    balances.check()
    balances.check_stores()


def test_a_changelog_created_anew_is_not_continued_by_the_old_store(balances: Rig) -> None:
    """The store's checkpoint would point into a topic that is not the one it was written to."""
    worker = balances.worker().wait_started()
    balances.send(300)
    balances.wait_drained()
    worker.signal(signal.SIGTERM)
    worker.wait()
    changelog = f"{balances.prefix}balances-balance-changelog"
    balances.admin.delete_topics([changelog])[changelog].result(30)
    wait_until(lambda: changelog not in balances.admin.list_topics(timeout=10).topics, "the changelog is gone")
    balances.worker().wait_started()
    balances.send(50)
    balances.wait_drained()
    balances.stop()
    assert len(balances.changelog()) > 0
    balances.check_stores()


def test_an_event_whose_agent_raises_is_delivered_again_and_then_set_aside(balances: Rig) -> None:
    """A poison event would stop its partition, be lost, or leave half of its work behind."""
    balances.worker()
    balances.send(300, orders={0: "fail", 7: "fail once", 150: "fail", 151: "fail", 299: "fail"})
    balances.wait_drained()
    balances.stop()
    dead = balances.read("dead-letters")
    assert sorted(dict(message.headers())["dlq.attempts"] for message in dead) == [b"3"] * 4
    assert {dict(message.headers())["dlq.error"] for message in dead} == {b"agent_error"}
    balances.check(set_aside=4)


def test_actors_that_fail_together_do_not_end_the_worker(balances: Rig) -> None:
    """One raises, and the others find their batch dropped: eight restarts at once, which mode takes for too many."""
    worker = balances.worker(CONCURRENCY="8", SLEEP_S="0.2")
    orders = dict.fromkeys(range(0, 100, 5), "sleep") | {52: "fail"}
    balances.send(100, orders=orders)
    wait_until(lambda: len(balances.read("dead-letters")) == 1, "the event is set aside", 120)
    balances.wait_drained()
    assert worker.alive
    balances.stop()


def test_an_event_that_no_agent_can_do_anything_with_harms_no_other(balances: Rig) -> None:
    """A record that no broker takes aborts its whole batch, again and again, unless its event is found and set aside."""
    balances.worker()
    orders = {10: "bad header", 90: "cancelled", 150: "no such partition", 210: "too far ahead"}
    balances.send(300, orders=orders)
    balances.wait_drained(120)
    balances.stop()
    balances.check(set_aside=len(orders))


def test_idle_input_is_committed_behind_the_markers_of_transactions(balances: Rig) -> None:
    """One marker short, and with its records gone by retention, it looks as if events had been lost: no start."""
    producer = Producer({**balances.config, "transactional.id": f"{balances.prefix}input"})
    producer.init_transactions(30)
    for number in range(3):
        producer.begin_transaction()
        for partition in range(PARTITIONS):
            entry = json.dumps({"id": balances.sent, "amount": number}).encode()
            producer.produce(f"{balances.prefix}entries", entry, b"k%d" % partition, partition)
            balances.sent += 1
        producer.commit_transaction(30)
    balances.worker()
    balances.wait_drained()
    offsets = Offsets(balances.config, f"{balances.prefix}balances")
    partitions = [(f"{balances.prefix}entries", partition) for partition in range(PARTITIONS)]
    ends = offsets.high_watermarks(partitions)
    assert set(ends.values()) == {6}
    wait_until(
        lambda: {tp: at.offset for tp, at in offsets.stable(partitions, lambda _: None).items()} == ends,
        "committed behind the markers",
    )
    balances.stop()
    balances.check()


def test_a_terminated_worker_commits_and_leaves_the_group(balances: Rig) -> None:
    """A deployment would repeat work, and its partitions would stand still until the session is over."""
    first = balances.worker("first").wait_started()
    balances.send(300, rate=600)
    first.signal(signal.SIGTERM)
    assert first.wait(30) == 0
    assert first.says("LeaveGroup request succeeded")
    balances.worker("second").wait_started()
    balances.wait_drained()
    balances.stop()
    balances.check()


def test_a_second_live_worker_of_a_slot_is_refused(balances: Rig) -> None:
    """Two workers under one transactional id would fence each other for ever."""
    balances.worker("same").wait_started()
    other = balances.worker("same")
    assert other.wait() == ExitCode.SLOT_LOST
    assert other.says("is held by another live worker")
