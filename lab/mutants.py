"""The engine, broken on purpose, once for each way that somebody broke it before; and who must notice.

A check that cannot fail is none. Each mutant is a text in one file, what stands there instead, and those who catch it:

=========== ========================================================================================================
test        the test that fails then (`tests/test_mutants.py`)
simulated   random histories of the commit path (`tests/test_simulation.py`); some break the driver, which repeats the
            engine's loop, instead of the engine
lab         workers under faults, with ``lab --mutant NAME`` (`tests/test_lab_mutants.py`)
=========== ========================================================================================================
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from streams_app.errors import ConfigurationError

CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Simulated:
    """The guarantee under which the simulation notices, after at most so many histories."""

    guarantee: str
    histories: int = 10_000


@dataclass(frozen=True)
class UnderFaults:
    """What brings a mutant to light in the lab; a round lasts ``seconds``."""

    #: Kinds of faults, as ``--faults`` takes them.
    faults: str
    seconds: float = 40.0
    workers: int = 2
    brokers: int = 1
    #: Records/s of each input.
    rate: float = 100.0


@dataclass(frozen=True)
class Mutant:
    """A text in a file, and what stands there instead."""

    name: str
    #: Number in docs/traps.md; empty: it is none of these.
    trap: str
    #: From the top of the checkout.
    file: str
    before: str
    after: str
    #: Below tests/, as pytest names it; empty: no single test is named.
    test: str = ""
    simulated: Simulated | None = None
    lab: UnderFaults | None = None

    def occurs(self) -> int:
        """How often its text stands in its file."""
        return (CHECKOUT / self.file).read_text().count(self.before)

    def copy(self, folder: Path) -> None:
        """A copy of the checkout in ``folder``, which is made, broken by this mutant.

        Raises:
            ConfigurationError: the text is not there just once; the code has changed since.
        """
        if self.occurs() != 1:
            raise ConfigurationError(f"{self.file} does not hold the text of the mutant {self.name!r} just once")
        shutil.copytree(CHECKOUT, folder, ignore=lambda parent, names: _not_copied(Path(parent), names, folder))
        broken = folder / self.file
        broken.write_text(broken.read_text().replace(self.before, self.after))


def _not_copied(parent: Path, names: list[str], folder: Path) -> set[str]:
    """What is no code (``.venv``, ``.git``, caches, data), and where the copy goes."""
    return {
        name
        for name in names
        if name.startswith(".") or name == "__pycache__" or folder.is_relative_to(parent.absolute() / name)
    }


def mutant(name: str) -> Mutant:
    """The mutant of that name.

    Raises:
        ConfigurationError: there is none; the text lists those that there are.
    """
    for each in MUTANTS:
        if each.name == name:
            return each
    known = "\n".join(f"  {each.name}" for each in MUTANTS if each.lab is not None)
    raise ConfigurationError(f"no mutant is named {name!r}; those for the lab are:\n{known}")


MUTANTS = (
    Mutant(
        "commits without the fence of its pin",
        "1",
        "streams_app/session.py",
        "        metadata = group_metadata(pin)\n",
        '        metadata = unfenced_group_metadata(Pin(pin.group_id, -1, ""))\n',
        # A zombie is kept out twice, as its successor fences its producer too; here the pin stands alone.
        test="test_brokers.py::test_a_start_under_an_old_membership_is_refused_by_the_broker",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "lets a question to the coordinator time out before its client is gone",
        "",
        "streams_app/offsets.py",
        "describe_consumer_groups([self._group_id], request_timeout=COORDINATOR_TIMEOUT_S)",
        "describe_consumer_groups([self._group_id], request_timeout=0.5)",
        test="test_brokers.py::test_a_coordinator_that_is_found_late_does_not_end_the_process",
    ),
    Mutant(
        "takes the beginning of 1970 for now",
        "",
        "streams_app/session.py",
        "    return 0 if timestamp_ms is None else timestamp_ms or 1\n",
        "    return timestamp_ms or 0\n",
        test="test_brokers.py::test_the_beginning_of_1970_is_not_now",
    ),
    Mutant(
        "leaves aiokafka's fetcher ended",
        "",
        "streams_app/faust_adapter.py",
        "    if fetcher._closed or not fetcher._fetch_task.done():\n",
        "    if True:\n",
        test="test_brokers.py::test_a_fetcher_that_an_error_has_ended_is_begun_anew",
    ),
    Mutant(
        "asks aiokafka's fetcher to be told once",
        "",
        "streams_app/faust_adapter.py",
        "        if kafka_tp not in records:\n",
        "        if True:\n",
        test="test_brokers.py::test_a_position_that_is_missed_twice_does_not_end_the_fetcher",
    ),
    Mutant(
        "lets others have their turn amid a list that is taken together",
        "",
        "streams_app/faust_adapter.py",
        "                    if not together and turn >= _EVENTS_A_TURN:\n",
        "                    if turn >= _EVENTS_A_TURN:\n",
        test="test_streams.py::test_what_is_taken_together_is_of_one_batch",
    ),
    Mutant(
        "tells nobody that there is room in a channel",
        "",
        "streams_app/faust_adapter.py",
        "                    self._let_put()\n",
        "",
        test="test_streams.py::test_who_puts_into_a_full_channel_goes_on_when_it_is_read",
    ),
    Mutant(
        "takes what was filtered out for the event in hand",
        "",
        "streams_app/faust_adapter.py",
        "                        in_hand.set(last)\n",
        "",
        test="test_streams.py::test_an_agent_that_takes_has_in_hand_what_it_was_given",
    ),
    Mutant(
        "keeps what was collected when a processor raised",
        "",
        "streams_app/faust_adapter.py",
        "            _give_up(together)\n",
        "",
        test="test_streams.py::test_what_was_collected_when_a_processor_raised_is_given_up_at_most_once",
    ),
    Mutant(
        "empties all queues with a batch",
        "",
        "streams_app/faust_adapter.py",
        "if not (isinstance(event, Event) and event.is_over)]\n",
        "if False]\n",
        test="test_streams.py::test_a_batch_that_is_dropped_takes_nothing_with_it_that_came_from_outside",
    ),
    Mutant(
        "lets actors of isolated partitions group",
        "",
        "streams_app/faust_adapter.py",
        "        if self.active_partitions is not None:\n",
        "        if False:\n",
        test="test_streams.py::test_grouping_by_isolated_partitions_is_refused",
    ),
    Mutant(
        "counts an answer that comes twice for two",
        "",
        "streams_app/faust_adapter.py",
        "in self._waiting.pop(reply.correlation_id, ()):\n",
        "in self._waiting[reply.correlation_id]:\n",
        test="test_replies.py::test_an_answer_that_comes_twice_is_that_of_one_question",
    ),
    Mutant(
        "forgets which topics came up during a rebalance",
        "",
        "streams_app/faust_adapter.py",
        "        cast(Conductor, self.topics).look_again()\n",
        "",
        test="test_adapter.py::test_the_end_of_a_rebalance_is_one_more_look_at_the_topics",
    ),
    Mutant(
        "leaves who asks waiting in a batch that was dropped",
        "",
        "streams_app/batch.py",
        "self.dead, self.is_open = True, False\n        for answer in self.questions:\n            answer.cancel()\n",
        "self.dead, self.is_open = True, False\n",
        test="test_batch.py::test_who_waits_for_an_answer_hears_that_the_batch_was_dropped",
    ),
    Mutant(
        "floods who holds an event",
        "",
        "streams_app/engine.py",
        "        unbegun, topics = batch.unbegun, batch.asked\n",
        "        unbegun, topics = set(), batch.asked\n",
        test="test_engine.py::test_who_holds_an_event_is_not_flooded_with_others[False]",
    ),
    Mutant(
        "goes on with a batch for ever for who asks",
        "",
        "streams_app/engine.py",
        "        unbegun, topics = batch.unbegun, batch.asked\n",
        "        unbegun, topics = batch.unbegun, None\n",
        test="test_engine.py::test_who_holds_an_event_is_not_flooded_with_others[True]",
    ),
    Mutant(
        "blames no agent that takes its time to end",
        "",
        "streams_app/engine.py",
        "(batch.dead and batch.failure is None)",
        "batch.dead",
        test="test_engine.py::test_an_agent_that_takes_its_time_to_end_is_blamed_all_the_same",
    ),
    Mutant(
        "shows the table that a start was broken off in",
        "",
        "streams_app/engine.py",
        "                and tp in self._whole\n",
        "",
        test="test_engine.py::test_pages_are_shown_what_is_whole_and_ours",
    ),
    Mutant(
        "shows what others have written meanwhile as if it had not been lost",
        "",
        "streams_app/engine.py",
        "        self._kept = self._kept & assignment.partitions\n",
        "",
        test="test_engine.py::test_pages_are_shown_what_is_whole_and_ours",
    ),
    Mutant(
        "blames no event for the questions that it asks",
        "",
        "streams_app/engine.py",
        '                self._count((tp, offset), f"it asked, and {words}")\n',
        "                pass\n",
        test="test_engine.py::test_an_event_is_blamed_for_the_question_that_it_asks",
    ),
    Mutant(
        "counts an event as held for each reason",
        "",
        "streams_app/batch.py",
        "        if event.holds == 1 and not event.acked:\n",
        "        if not event.acked:\n",
        test="test_batch.py::test_an_event_is_held_once_whatever_for",
    ),
    Mutant(
        "does not look for what is waited for once the rest was taken back",
        "",
        "streams_app/engine.py",
        "assignment.over.is_set() or self._gets_more(batch, assignment)):\n",
        "assignment.over.is_set()):\n",
        test="test_engine.py::test_a_question_after_the_rest_was_taken_back_is_waited_for",
    ),
    Mutant(
        "takes a refusal by the brokers for an unknown end",
        "2",
        "streams_app/session.py",
        "            if code in REFUSED or code == KafkaError._INCONSISTENT:\n",
        "            if code == KafkaError._INCONSISTENT:\n",
        test="test_session.py::test_a_record_that_the_brokers_refuse_is_found_out",
    ),
    Mutant(
        "believes a checkpoint of the future",
        "11",
        "streams_app/start.py",
        "-_CLOCK_LEEWAY_MS <= age_ms <= ",
        "age_ms <= ",
        test="test_store.py::test_a_checkpoint_that_lies_is_not_believed",
    ),
    Mutant(
        "sets aside one of several events in hand",
        "",
        "streams_app/dead_letters.py",
        "    if len(event.undone) > 1:\n",
        "    if False:\n",
        test="test_streams.py::test_one_event_at_a_time_is_set_aside",
    ),
    Mutant(
        "leaves events to wait for that nobody has put",
        "",
        "streams_app/channels.py",
        "                event.ack()  # a time-out",
        "                # a time-out",
        test="test_streams.py::test_who_gives_up_putting_leaves_nothing_to_wait_for",
    ),
    Mutant(
        "reads a global table with holes",
        "",
        "streams_app/table.py",
        "or len(copies.keys() | self.partitions.keys()) < count:\n",
        ":\n",
        test="test_table.py::test_a_global_table_with_a_hole_is_not_read_by_agents",
    ),
    Mutant(
        "reads a copy that is made anew meanwhile",
        "",
        "streams_app/table.py",
        "        if self.copies is not copies or len(",
        "        if len(",
        test="test_table.py::test_a_copy_that_goes_while_it_is_read_is_told",
    ),
    Mutant(
        "waits for an answer for ever",
        "",
        "streams_app/batch.py",
        "        deadline = asyncio.timeout(timeout_s)\n",
        "        deadline = asyncio.timeout(None)\n",
        test="test_batch.py::test_who_gets_no_answer_is_told_so",
    ),
    Mutant(
        "takes what was settled a moment ago for settled",
        "",
        "streams_app/engine.py",
        "        if batch.is_settled or self._gets_more(batch, assignment):\n            return\n",
        "        if not batch.unbegun or self._gets_more(batch, assignment):\n            return\n",
        test="test_engine.py::test_who_goes_on_in_the_moment_when_all_was_settled_is_waited_for",
    ),
    Mutant(
        "loses at most once what lies behind a slow agent",
        "",
        "streams_app/engine.py",
        "        elif batch.pending and batch.redelivers:\n",
        "        elif batch.pending:\n",
        test="test_engine.py::test_at_most_once_what_lies_behind_a_slow_agent_is_given_back",
    ),
    Mutant(
        "sets aside what was made of a record",
        "",
        "streams_app/engine.py",
        "batch.record_of(event.message), ",
        "event.message, ",
        test="test_engine.py::test_what_an_agent_sets_aside_is_the_record_that_came",
    ),
    Mutant(
        "looks for a refused record until it is alone",
        "",
        "streams_app/engine.py",
        "        if len(records) == 1 or (self._one_chunk and self._chunk_events == 1):\n",
        "        if len(records) == 1:\n",
        test="test_engine.py::test_a_refused_record_is_found_among_events_that_go_together",
    ),
    Mutant(
        "ends the search for a refused record at each half",
        "",
        "streams_app/engine.py",
        "        self._one_chunk = any(self._positions.get(tp, end) < end for tp, end in self._refused_below.items())\n",
        "        self._one_chunk = False\n",
        test="test_engine.py::test_a_refused_record_is_looked_for_until_it_is_found",
    ),
    Mutant(
        "makes a repeated transfer again",
        "",
        "agents/ledger.py",
        "    remembered = decisions.get(key)\n",
        "    remembered = None\n",
        test="test_ledger_model.py::test_one_after_the_other_the_ledger_answers_as_the_model_does",
    ),
    Mutant(
        "keeps outputs at least once until the commit",
        "",
        "streams_app/guarantees.py",
        "        return Batch(pin, self._outbox)\n",
        "        return Batch(pin)\n",
        test="test_at_least_once.py::test_outputs_leave_before_their_batch_is_done",
    ),
    Mutant(
        "lets two guarantees read one topic",
        "",
        "streams_app/overlaps.py",
        "        *_topics_read_twice(apps, agents),\n",
        "",
        test="test_overlaps.py::test_a_topic_read_under_two_guarantees_is_refused",
    ),
    Mutant(
        "lets agents write tables of another guarantee",
        "",
        "streams_app/overlaps.py",
        "        *_foreign_writes(apps, agents, source),\n",
        "",
        test="test_overlaps.py::test_an_agent_that_writes_a_table_of_another_guarantee_is_refused",
    ),
    Mutant(
        "breaks off at once when it is asked to end",
        "",
        "streams_app/engine.py",
        "        self._finishing.set()\n        try:\n",
        "        self._finishing.set()\n        self.hurry()\n        try:\n",
        test="test_stopping.py::test_a_clean_stop_under_full_load_loses_and_repeats_nothing",
    ),
    Mutant(
        "ends with the first trouble with the brokers",
        "",
        "streams_app/engine.py",
        "            except (BatchError, KafkaUnreachable, KafkaException, AioKafkaError) as error:\n",
        "            except ZeroDivisionError as error:\n",
        test="test_broker_restart.py::test_a_broker_that_is_killed_and_started_again_ends_no_worker",
    ),
    Mutant(
        "shows a store while it is wiped",
        "",
        "streams_app/start.py",
        "        hide()\n",
        "",
        test="test_store.py::test_a_store_is_hidden_before_it_is_wiped",
    ),
    Mutant(
        "follows a corrupt copy",
        "",
        "streams_app/start.py",
        "    if store.corrupt or checkpoint is None or not",
        "    if checkpoint is None or not",
        test="test_replicas.py::test_a_copy_that_turns_out_corrupt_is_read_anew",
    ),
    Mutant(
        "takes an error of the commit for an abort",
        "2",
        "streams_app/session.py",
        '            raise CommitUnconfirmed(f"{self.transactional_id}: commit: {_text(error)}") from error\n',
        '            raise TransactionAborted(f"{self.transactional_id}: commit: {_text(error)}") from error\n',
        test="test_session.py::test_any_error_out_of_the_end_leaves_the_outcome_unknown",
    ),
    Mutant(
        "goes on with the producer after an error",
        "2",
        "streams_app/session.py",
        "    def _break(self, error: BaseException) -> None:\n        self.broken = True\n",
        "    def _break(self, error: BaseException) -> None:\n",
        test="test_session.py::test_a_broken_session_does_nothing_until_it_is_opened_anew",
    ),
    Mutant(
        "takes what a fence leaves behind for trouble",
        "",
        "streams_app/session.py",
        "KafkaError.INVALID_PRODUCER_EPOCH, KafkaError._FATAL}",
        "KafkaError.INVALID_PRODUCER_EPOCH}",
        test="test_session.py::test_a_fence_is_noticed_by_who_hands_over_records_behind_it",
    ),
    Mutant(
        "does not rewind after a dropped batch",
        "5",
        "streams_app/engine.py",
        "            await self._rewind()\n        elif",
        "        elif",
        test="test_exactly_once.py::test_an_event_whose_agent_raises_is_delivered_again_and_then_set_aside",
    ),
    Mutant(
        "seeks no partition whose offset is 0",
        "5",
        "streams_app/engine.py",
        "        await self.app.input.seek_all(self._positions)\n",
        "        await self.app.input.seek_all({tp: at for tp, at in self._positions.items() if at})\n",
        test="test_exactly_once.py::test_the_first_batch_ever_is_read_again_after_it_was_aborted",
    ),
    Mutant(
        "does not commit where the input starts",
        "6",
        "streams_app/start.py",
        "            self._guarantee.claim(positions, committed, pin)\n",
        "            pass\n",
        test="test_brokers.py::test_the_first_start_is_committed_before_anything_is_delivered",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "restores up to the last stable offset",
        "8",
        "streams_app/offsets.py",
        "        found, unknown = offsets_at(self._reader, partitions, where, _REQUEST_TIMEOUT_S)\n",
        "        found, unknown = offsets_at(self._stable_reader, partitions, where, _REQUEST_TIMEOUT_S)\n",
        test="test_brokers.py::test_a_restore_waits_for_open_transactions_below_its_end",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "publishes over restored values that are not on disk",
        "10",
        "streams_app/store.py",
        "        self._unlogged_writes = True\n",
        "        self._unlogged_writes = False\n",
        test="test_store.py::test_a_kill_after_the_first_publish_loses_no_restored_value",
        simulated=Simulated("exactly_once"),
        lab=UnderFaults("tables deleted,kill", seconds=60),
    ),
    Mutant(
        "shows uncommitted values outside of agents",
        "12",
        "streams_app/table.py",
        "        overlay.writes[key_bytes] = stored\n",
        "        overlay.writes[key_bytes] = stored\n        overlay.store.publish({key_bytes: stored}, [], None)\n",
        test="test_table.py::test_from_outside_only_committed_values_are_seen",
        lab=UnderFaults("kill"),
    ),
    Mutant(
        "counts an event as done whose agent raised",
        "18",
        "streams_app/engine.py",
        "            self._count_askers(event, words)\n            batch.fail(event)\n",
        "            event.ack()\n",
        test="test_exactly_once.py::test_an_event_whose_agent_raises_is_delivered_again_and_then_set_aside",
    ),
    Mutant(
        "has no barrier",
        "",
        "streams_app/engine.py",
        "        for _ in range(_QUICK_TURNS):\n",
        "        batch.pending = 0\n        return\n        for _ in range(_QUICK_TURNS):\n",
        test="test_engine.py::test_nothing_is_taken_back_before_an_agent_has_begun",
        lab=UnderFaults("none"),
    ),
    Mutant(
        "publishes before the end",
        "",
        "streams_app/commit.py",
        '    step("3 end")\n    session.end()\n    step("4 publish")\n    publish(stale, written)\n',
        '    publish(stale, written)\n    step("3 end")\n    session.end()\n    step("4 publish")\n',
        test="test_exactly_once.py::test_a_transaction_that_the_broker_timed_out_is_done_again",
        simulated=Simulated("exactly_once"),
        lab=UnderFaults("transaction timed out", seconds=60),
    ),
    Mutant(
        "fences no dead owner",
        "",
        "streams_app/start.py",
        "        self._fence_the_dead(inputs)\n",
        "",
        test="test_exactly_once.py::test_another_worker_takes_over_what_a_killed_one_left_open[2 offsets]",
    ),
    Mutant(
        "takes part in a batch that is committing",
        "",
        "streams_app/batch.py",
        "        self.sealed, self.is_open = True, False\n",
        "        pass\n",
        test="test_table.py::test_a_task_that_an_agent_left_behind_takes_no_part",
    ),
    Mutant(
        "starts from offsets that are not stable",
        "7",
        "streams_app/offsets.py",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        test="test_brokers.py::test_a_pending_offset_is_waited_for",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "lets two workers have one slot",
        "4",
        "streams_app/slot.py",
        "        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        test="test_exactly_once.py::test_a_second_live_worker_of_a_slot_is_refused",
    ),
    Mutant(
        "confirms a checkpoint without the values that it counts",
        "",
        "streams_app/store.py",
        "        self.write_out()\n        self.checkpoint = self.checkpoint._replace",
        "        self.checkpoint = self.checkpoint._replace",
        test="test_store.py::test_a_confirmed_checkpoint_has_its_values",
    ),
    Mutant(
        "finds what expired again and again",
        "",
        "streams_app/store.py",
        '        start = self._stale[-1] + b"\\0" if self._stale else _TIME\n',
        "        start = _TIME\n",
        test="test_store.py::test_what_expired_once_is_not_looked_at_again",
    ),
    Mutant(
        "believes the checkpoint of another topic",
        "11",
        "streams_app/start.py",
        "checkpoint.topic_id == topic_id and ",
        "",
        test="test_store.py::test_a_checkpoint_that_lies_is_not_believed",
    ),
    Mutant(
        "commits at most once behind the processing",
        "",
        "streams_app/engine.py",
        "            if self._guarantee.claims_first and fetched.messages:\n"
        "                self._check_committable(batch, assignment)\n"
        "                await self._in_thread(self._guarantee.take, batch, self._positions)\n"
        "            chunk_started_s = time.monotonic()\n"
        "            self._deliver(batch, fetched)\n"
        "            await self._settle(batch, assignment, until_s)\n",
        "            chunk_started_s = time.monotonic()\n"
        "            self._deliver(batch, fetched)\n"
        "            await self._settle(batch, assignment, until_s)\n"
        "            if self._guarantee.claims_first:\n"
        "                self._check_committable(batch, assignment)\n"
        "                await self._in_thread(self._guarantee.take, batch, self._positions)\n",
        test="test_at_most_once.py::test_what_a_slow_agent_has_sent_is_not_sent_again",
        lab=UnderFaults("kill", seconds=120),
    ),
    Mutant(
        "commits at least once before the processing",
        "",
        "streams_app/guarantees.py",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n"
        "        self.claims_first = True\n"
        "        self.take = lambda batch, began: self.claim(batch.consumed, {}, batch.pin)\n",
        test="test_at_least_once.py::test_a_kill_at_each_step_loses_nothing_and_counts_once[1 prepare: begin]",
        simulated=Simulated("at_least_once"),
        lab=UnderFaults("kill"),
    ),
    Mutant(
        "commits at least once before the outputs are acknowledged",
        "",
        "streams_app/outbox.py",
        "        if failures:\n",
        "        if False:\n",
        test="test_outbox.py::test_a_failure_fails_the_batch_that_is_about_to_commit",
        simulated=Simulated("at_least_once"),
    ),
    Mutant(
        "forgets what predecessors gave up",
        "",
        "streams_app/guarantees.py",
        "claim.reported(before) if claim else 0",
        "0",
        test="test_at_most_once.py::test_a_kill_at_each_step_repeats_nothing_and_loses_no_more_than_reported[0 claimed]",
        simulated=Simulated("at_most_once"),
        lab=UnderFaults("OffsetCommit lost"),
    ),
    Mutant(
        "takes nothing back from a batch",
        "",
        "streams_app/engine.py",
        "        withdrawn = batch.withdraw()\n",
        "        withdrawn: dict[TP, list[Message]] = {}\n",
        test="test_at_most_once.py::test_a_clean_stop_loses_nothing",
    ),
    Mutant(
        "keeps what it took back for itself",
        "",
        "streams_app/guarantees.py",
        "        self._claimed = dict(positions)\n        self._say",
        "        self._say",
        test="test_at_most_once.py::test_a_clean_stop_loses_nothing",
        simulated=Simulated("at_most_once"),
    ),
    Mutant(
        "takes back what an agent has begun",
        "",
        "streams_app/batch.py",
        "            if event.taken:\n",
        "            if event.acked:\n",
        test="test_batch.py::test_what_no_agent_has_begun_is_taken_back_whole",
    ),
    Mutant(
        "commits offsets under whatever membership it has",
        "13",
        "streams_app/faust_adapter.py",
        "        if not pin.is_valid or pin != self.live_pin():\n",
        "        pin = self.live_pin()\n        if not pin.is_valid:\n",
        test="test_adapter.py::test_a_commit_under_another_membership_is_not_even_sent",
    ),
    Mutant(
        "goes on as the same member after a commit of unknown outcome",
        "13",
        "streams_app/faust_adapter.py",
        "            self.kafka._coordinator.reset_generation()\n",
        "",
        test="test_adapter.py::test_a_commit_of_unknown_outcome_costs_the_membership",
    ),
    Mutant(
        "sends again at most once",
        "",
        "streams_app/outbox.py",
        '"message.send.max.retries": 0',
        '"message.send.max.retries": 5',
        test="test_outbox.py::test_at_most_once_never_sends_again",
    ),
    Mutant(
        "takes a cancellation that nobody asked for for its end",
        "",
        "streams_app/engine.py",
        "                if self.should_stop or (task is not None and task.cancelling()):\n                    raise\n",
        "                raise\n",
        test="test_engine.py::test_trouble_that_looks_like_a_cancellation_does_not_end_the_engine",
    ),
    Mutant(
        "lets the end of a consumer say that it was cancelled",
        "",
        "streams_app/faust_adapter.py",
        "        if task is not None and task.cancelling():\n            raise\n",
        "        raise\n",
        test="test_adapter.py::test_a_consumer_ends_though_a_broker_is_down",
        lab=UnderFaults("terminate,broker,group coordinator,transaction coordinator", seconds=90, brokers=3),
    ),
    Mutant(
        "believes librdkafka's time-outs",
        "",
        "streams_app/session.py",
        "            within(self._timeout_s, send, offsets, metadata, self._timeout_s)\n",
        "            send(offsets, metadata, self._timeout_s)\n",
        test="test_deadlines.py::test_a_session_whose_producer_hangs_before_the_end_is_aborted",
    ),
    Mutant(
        "lets a woken zombie send what it has in hand",
        "",
        "streams_app/guarantees.py",
        "redelivers=False, is_member=self._is_member)",
        "redelivers=False)",
        test="test_at_most_once.py::test_a_zombie_that_wakes_up_amid_a_batch_repeats_nothing",
    ),
    Mutant(
        "takes an unknown end for an end",
        "",
        "streams_app/offsets.py",
        "        if unknown:\n",
        "        if False:\n",
        test="test_brokers.py::test_an_end_that_nobody_knows_is_no_end",
    ),
    Mutant(
        "takes an error of the commit for an abort, and does not ask for stable offsets (driver of the simulation)",
        "2",
        "lab/simulation/worker.py",
        "        except BaseException:\n            batch.drop()\n            self._withheld = []\n            raise\n",
        "        except BatchError:\n            batch.drop()\n            self._rewind()\n"
        "        except BaseException:\n            batch.drop()\n            self._withheld = []\n            raise\n",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "does not see what the batch that commits has written",
        "pipeline",
        "streams_app/batch.py",
        "new(self._below.get((table, partition)))",
        "new(None)",
        test="test_pipeline.py::test_the_next_batch_sees_what_the_one_that_commits_wrote",
        simulated=Simulated("exactly_once"),
        lab=UnderFaults("none"),
    ),
    Mutant(
        "commits a batch though the one before it failed",
        "pipeline",
        "streams_app/pipeline.py",
        "            await asyncio.shield(self._task)\n",
        "            await asyncio.wait([self._task])\n",
        test="test_pipeline.py::test_a_commit_that_failed_is_told_before_the_next_begins",
    ),
    Mutant(
        "commits a batch though the one before it failed (driver of the simulation)",
        "pipeline",
        "lab/simulation/worker.py",
        "        if self._error is not None:\n            raise self._error\n",
        "",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "rewinds before the batch before has ended (driver of the simulation)",
        "pipeline",
        "lab/simulation/worker.py",
        "        self._ended()\n        self._check_committable(batch, assignment)\n",
        "        if batch.failure is None:\n            self._ended()\n        self._check_committable(batch, assignment)\n",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "begins to commit before the batch before has ended",
        "pipeline",
        "streams_app/engine.py",
        "        await self._pipeline.ended()\n        self._check_committable(batch, assignment)\n",
        "        self._check_committable(batch, assignment)\n        self._pipeline._task = None\n",
        lab=UnderFaults("EndTxn lost,EndTxn late,kill", seconds=60),
    ),
    Mutant(
        "opens no new producer after an error",
        "2",
        "streams_app/guarantees.py",
        "    def open(self) -> None:\n        self.session.open()\n",
        "    def open(self) -> None:\n        if self.session._producer is None:\n            self.session.open()\n"
        "        self.session.broken = False\n",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "ends before the offsets",
        "",
        "streams_app/commit.py",
        '    session.send_offsets(batch.offsets(), batch.pin)\n    session.flush()\n    step("3 end")\n    session.end()\n',
        '    session.flush()\n    step("3 end")\n    session.end()\n    session.begin()\n'
        "    session.send_offsets(batch.offsets(), batch.pin)\n    session.end()\n",
        simulated=Simulated("exactly_once"),
        lab=UnderFaults("EndTxn lost"),
    ),
    Mutant(
        "does not rewind after a dropped batch (driver of the simulation)",
        "5",
        "lab/simulation/worker.py",
        "            self._guarantee.forget()\n            self._rewind()\n",
        "            self._guarantee.forget()\n",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "writes a checkpoint of what was fetched, not of what was applied",
        "9",
        "streams_app/restore.py",
        "map(_value, records), timestamps_ms, offset)",
        "map(_value, records), timestamps_ms, offset + 1)",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "restores up to any end, behind which a transaction is open",
        "8",
        "streams_app/restore.py",
        "            if end >= ends[tp]:\n",
        "            if tp in behind:\n",
        test="test_brokers.py::test_a_restore_waits_for_open_transactions_below_its_end[commit]",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "keeps the producer after a suspiciously slow commit",
        "2",
        "streams_app/session.py",
        "        if time.monotonic() - started_s > _SUSPICIOUS_END_S or self._troubled.is_set():\n",
        "        if False:\n",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "does not listen to what librdkafka tells when it is polled",
        "2",
        "streams_app/session.py",
        "        self._producer.poll(0)\n        if time.monotonic() - started_s",
        "        if time.monotonic() - started_s",
        simulated=Simulated("exactly_once"),
    ),
    Mutant(
        "publishes a checkpoint without the values",
        "",
        "streams_app/store.py",
        "            self._put_values(batch, self._unwritten)\n",
        "",
        simulated=Simulated("exactly_once"),
        lab=UnderFaults("none"),
    ),
    Mutant(
        "commits at most once behind the processing (driver of the simulation)",
        "",
        "lab/simulation/worker.py",
        "        if self._guarantee.claims_first:\n"
        "            self._check_committable(batch, assignment)\n"
        "            self._guarantee.take(batch, self._positions)\n"
        "        self._deliver(batch, fetched, assignment)\n",
        "        self._deliver(batch, fetched, assignment)\n"
        "        if self._guarantee.claims_first:\n"
        "            self._check_committable(batch, assignment)\n"
        "            self._guarantee.take(batch, self._positions)\n",
        simulated=Simulated("at_most_once"),
    ),
    Mutant(
        "reads on from what was fetched, at most once, though it was not claimed",
        "13",
        "streams_app/guarantees.py",
        "            self._commit_once(pin, {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()})\n",
        "            try:\n"
        "                self._commit_once(pin, {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()})\n"
        "            except Exception:\n"
        "                pass\n",
        simulated=Simulated("at_most_once"),
    ),
    Mutant(
        "does not fence its tables at least once",
        "",
        "streams_app/commit.py",
        "    session.send_offsets(batch.offsets(), batch.pin)\n    session.flush()\n    step",
        "    session.flush()\n    session.end()\n    session.begin()\n"
        "    session.send_offsets(batch.offsets(), batch.pin)\n    step",
        simulated=Simulated("at_least_once"),
    ),
    Mutant(
        "takes an error of the commit for an abort, and does not ask for stable offsets",
        "2",
        "streams_app/engine.py",
        "            await self._in_thread(self._guarantee.commit, batch)\n",
        "            try:\n"
        "                await self._in_thread(self._guarantee.commit, batch)\n"
        "            except BatchError:\n"
        "                self._drop(batch, 'mutant')\n"
        "                await self._rewind()\n"
        "                return\n",
        lab=UnderFaults("EndTxn lost,EndTxn late", seconds=60),
    ),
    Mutant(
        "does not seek after trouble what it has read already",
        "5",
        "streams_app/faust_adapter.py",
        "            self.kafka.seek(kafka_tp, offset)\n",
        "            if not self.kafka._subscription.subscription.assignment.state_value(kafka_tp).has_valid_position:\n"
        "                self.kafka.seek(kafka_tp, offset)\n",
        lab=UnderFaults("wire cut,wire half-open", seconds=60),
    ),
    Mutant(
        "sends outputs at once, exactly once",
        "",
        "streams_app/guarantees.py",
        "        return Batch(pin)\n",
        '        self._at_once = getattr(self, "_at_once", None) or Outbox(self._config, retries=True)\n'
        "        return Batch(pin, self._at_once)\n",
        lab=UnderFaults("kill"),
    ),
    Mutant(
        "does not restore what its checkpoint lacks",
        "11",
        "streams_app/start.py",
        "    return checkpoint.offset + 1\n",
        "    return end\n",
        lab=UnderFaults("tables rolled back"),
    ),
    Mutant(
        "takes a missing store for an empty table",
        "11",
        "streams_app/start.py",
        "    if checkpoint is None and not store.corrupt:\n        return 0\n",
        "    if checkpoint is None and not store.corrupt:\n        return end\n",
        lab=UnderFaults("add worker,remove worker", workers=3),
    ),
    Mutant(
        "goes on though a table could not be written",
        "",
        "streams_app/store.py",
        "            with self._disk():\n                self._db.write(batch)\n",
        "            with contextlib.suppress(Exception):\n                self._db.write(batch)\n",
        test="test_disk.py::test_a_full_disk_ends_the_worker_with_a_sentence_and_no_event_is_blamed",
    ),
    Mutant(
        "goes on where it was itself, not where its group is",
        "",
        "streams_app/engine.py",
        "        self._positions = {TP(*tp): offset for tp, offset in started.positions.items()}\n",
        "        self._positions = {TP(*tp): self._positions.get(TP(*tp), at) for tp, at in started.positions.items()}\n",
        lab=UnderFaults("zombie"),
    ),
    Mutant(
        "does not count the outputs that were not acknowledged, at most once",
        "",
        "streams_app/guarantees.py",
        "        lost = len(self._outbox.flush()) + batch.given_up\n",
        "        self._outbox.flush()\n        lost = batch.given_up\n",
        test="test_outbox.py::test_at_most_once_what_is_not_acknowledged_is_given_up_and_told",
        lab=UnderFaults("broker", brokers=3),
    ),
)
