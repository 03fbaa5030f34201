"""The engine, broken on purpose, once for each way that somebody broke it before; and the test that must notice.

`tests/test_mutants.py` applies them to a copy of the checkout. The numbers of the traps are those of docs/traps.md.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A text in a module, what stands there instead, and the test that fails then."""

    name: str
    trap: str
    file: str
    before: str
    after: str
    test: str


MUTANTS = [
    Mutant(
        "commits without the fence of its pin",
        "1",
        "session.py",
        "        metadata = group_metadata(pin)\n",
        '        metadata = unfenced_group_metadata(Pin(pin.group_id, -1, ""))\n',
        # A zombie is kept out twice, as its successor fences its producer too; here the pin stands alone.
        "test_brokers.py::test_a_start_under_an_old_membership_is_refused_by_the_broker",
    ),
    Mutant(
        "takes an error of the commit for an abort",
        "2",
        "session.py",
        '            raise CommitUnconfirmed(f"{self.transactional_id}: commit: {_text(error)}") from error\n',
        '            raise TransactionAborted(f"{self.transactional_id}: commit: {_text(error)}") from error\n',
        "test_session.py::test_any_error_out_of_the_end_leaves_the_outcome_unknown",
    ),
    Mutant(
        "goes on with the producer after an error",
        "2",
        "session.py",
        "    def _break(self, error: BaseException) -> None:\n        self.broken = True\n",
        "    def _break(self, error: BaseException) -> None:\n",
        "test_session.py::test_a_broken_session_does_nothing_until_it_is_opened_anew",
    ),
    Mutant(
        "does not rewind after a dropped batch",
        "5",
        "engine.py",
        "            await self._rewind()\n        elif",
        "        elif",
        "test_exactly_once.py::test_an_event_whose_agent_raises_is_delivered_again_and_then_set_aside",
    ),
    Mutant(
        "seeks no partition whose offset is 0",
        "5",
        "engine.py",
        "        await self.app.input.seek_all(self._positions)\n",
        "        await self.app.input.seek_all({tp: at for tp, at in self._positions.items() if at})\n",
        "test_exactly_once.py::test_the_first_batch_ever_is_read_again_after_it_was_aborted",
    ),
    Mutant(
        "does not commit where the input starts",
        "6",
        "start.py",
        "            self._guarantee.claim(positions, committed, pin)\n",
        "            pass\n",
        "test_brokers.py::test_the_first_start_is_committed_before_anything_is_delivered",
    ),
    Mutant(
        "restores up to the last stable offset",
        "8",
        "offsets.py",
        "OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED",
        "OffsetSpec.latest(), IsolationLevel.READ_COMMITTED",
        "test_brokers.py::test_a_restore_waits_for_open_transactions_below_its_end",
    ),
    Mutant(
        "publishes over restored values that are not on disk",
        "10",
        "store.py",
        "        self._unlogged_writes = True\n",
        "        self._unlogged_writes = False\n",
        "test_store.py::test_a_kill_after_the_first_publish_loses_no_restored_value",
    ),
    Mutant(
        "shows uncommitted values outside of agents",
        "12",
        "table.py",
        "        overlay.writes[key_bytes] = stored\n",
        "        overlay.writes[key_bytes] = stored\n        overlay.store.publish({key_bytes: stored}, [], None)\n",
        "test_table.py::test_from_outside_only_committed_values_are_seen",
    ),
    Mutant(
        "counts an event as done whose agent raised",
        "18",
        "engine.py",
        "            batch.fail(event)\n",
        "            event.ack()\n",
        "test_exactly_once.py::test_an_event_whose_agent_raises_is_delivered_again_and_then_set_aside",
    ),
    Mutant(
        "has no barrier",
        "barrier",
        "engine.py",
        "        if not batch.pending or batch.failure:\n            return\n        settled",
        "        batch.pending = 0\n        return\n        settled",
        "test_exactly_once.py::test_a_terminated_worker_commits_and_leaves_the_group",
    ),
    Mutant(
        "publishes before the end",
        "publish",
        "commit.py",
        '    step("3 end")\n    session.end()\n    step("4 publish")\n    publish(stale, written)\n',
        '    publish(stale, written)\n    step("3 end")\n    session.end()\n    step("4 publish")\n',
        "test_exactly_once.py::test_a_kill_at_each_step_of_the_commit_leaves_all_or_nothing[3 end]",
    ),
    Mutant(
        "fences no dead owner",
        "quick take-over",
        "start.py",
        "        self._fence_the_dead(inputs)\n",
        "",
        "test_exactly_once.py::test_another_worker_takes_over_what_a_killed_one_left_open[2 offsets]",
    ),
    Mutant(
        "takes part in a batch that is committing",
        "sealed",
        "batch.py",
        "        self.sealed = True\n",
        "        pass\n",
        "test_table.py::test_a_task_that_an_agent_left_behind_takes_no_part",
    ),
    Mutant(
        "forgets what its predecessor left open",
        "quick take-over",
        "offsets.py",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        "test_brokers.py::test_a_pending_offset_is_waited_for",
    ),
    Mutant(
        "lets two workers have one slot",
        "4",
        "slot.py",
        "        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        "test_exactly_once.py::test_a_second_live_worker_of_a_slot_is_refused",
    ),
    Mutant(
        "believes the checkpoint of another topic",
        "11",
        "start.py",
        "checkpoint.topic_id != store.topic_id or ",
        "",
        "test_store.py::test_a_checkpoint_that_lies_is_not_believed",
    ),
    Mutant(
        "commits at most once behind the processing",
        "at most once",
        "engine.py",
        "            if self._guarantee.claims_first:\n"
        "                self._check_committable(batch, assignment)\n"
        "                await self._in_thread(self._guarantee.take, batch, self._positions)\n"
        "            self._deliver(batch, fetched)\n"
        "            await self._settle(batch, fetched, assignment, until_s)\n",
        "            self._deliver(batch, fetched)\n"
        "            await self._settle(batch, fetched, assignment, until_s)\n"
        "            if self._guarantee.claims_first:\n"
        "                self._check_committable(batch, assignment)\n"
        "                await self._in_thread(self._guarantee.take, batch, self._positions)\n",
        "test_at_most_once.py::test_what_a_slow_agent_has_sent_is_not_sent_again",
    ),
    Mutant(
        "commits at least once before the processing",
        "at least once",
        "guarantees.py",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n"
        "        self.claims_first = True\n"
        "        self.take = lambda batch, began: self.claim(batch.consumed, {}, batch.pin)\n",
        "test_at_least_once.py::test_a_kill_at_each_step_loses_nothing_and_counts_once[1 prepare: begin]",
    ),
    Mutant(
        "commits at least once before the outputs are acknowledged",
        "at least once",
        "outbox.py",
        "        if failures:\n",
        "        if False:\n",
        "test_outbox.py::test_a_failure_fails_the_batch_that_is_about_to_commit",
    ),
    Mutant(
        "forgets what predecessors gave up",
        "at most once",
        "guarantees.py",
        "claim.reported(before) if claim else 0",
        "0",
        "test_at_most_once.py::test_a_kill_at_each_step_repeats_nothing_and_loses_no_more_than_reported[0 claimed]",
    ),
    Mutant(
        "takes nothing back from a batch",
        "at most once",
        "engine.py",
        "        withdrawn = batch.withdraw()\n",
        "        withdrawn: dict[TP, list[Message]] = {}\n",
        "test_at_most_once.py::test_a_clean_stop_loses_nothing",
    ),
    Mutant(
        "keeps what it took back for itself",
        "at most once",
        "guarantees.py",
        "        self._claimed = dict(positions)\n        self._say",
        "        self._say",
        "test_at_most_once.py::test_a_clean_stop_loses_nothing",
    ),
    Mutant(
        "takes back what an agent has begun",
        "barrier",
        "batch.py",
        "            if event.taken:\n",
        "            if event.acked:\n",
        "test_batch.py::test_what_no_agent_has_begun_is_taken_back_whole",
    ),
    Mutant(
        "commits offsets under whatever membership it has",
        "13",
        "faust_adapter.py",
        "        if not pin.is_valid or pin != self.live_pin():\n",
        "        pin = self.live_pin()\n        if not pin.is_valid:\n",
        "test_adapter.py::test_a_commit_under_another_membership_is_not_even_sent",
    ),
    Mutant(
        "goes on as the same member after a commit of unknown outcome",
        "13",
        "faust_adapter.py",
        "            self.kafka._coordinator.reset_generation()\n",
        "",
        "test_adapter.py::test_a_commit_of_unknown_outcome_costs_the_membership",
    ),
    Mutant(
        "sends again at most once",
        "at most once",
        "outbox.py",
        '"message.send.max.retries": 0',
        '"message.send.max.retries": 5',
        "test_outbox.py::test_at_most_once_never_sends_again",
    ),
    Mutant(
        "takes a cancellation that nobody asked for for its end",
        "cancelled",
        "engine.py",
        "                if self.should_stop or (task is not None and task.cancelling()):\n                    raise\n",
        "                raise\n",
        "test_engine.py::test_trouble_that_looks_like_a_cancellation_does_not_end_the_engine",
    ),
    Mutant(
        "lets the end of a consumer say that it was cancelled",
        "cancelled",
        "faust_adapter.py",
        "        if task is not None and task.cancelling():\n            raise\n",
        "        raise\n",
        "test_adapter.py::test_a_consumer_ends_though_a_broker_is_down",
    ),
    Mutant(
        "believes librdkafka's time-outs",
        "time-outs",
        "session.py",
        "            within(self._timeout_s, send, offsets, metadata, self._timeout_s)\n",
        "            send(offsets, metadata, self._timeout_s)\n",
        "test_deadlines.py::test_a_session_whose_producer_hangs_before_the_end_is_aborted",
    ),
    Mutant(
        "lets a woken zombie send what it has in hand",
        "at most once",
        "guarantees.py",
        "redelivers=False, is_member=self._is_member)",
        "redelivers=False)",
        "test_at_most_once.py::test_a_zombie_that_wakes_up_amid_a_batch_repeats_nothing",
    ),
    Mutant(
        "takes an unknown end for an end",
        "no leader",
        "offsets.py",
        "        if unknown:\n",
        "        if False:\n",
        "test_brokers.py::test_an_end_that_nobody_knows_is_no_end",
    ),
]
