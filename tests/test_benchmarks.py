"""The figures of the benchmarks; scripts/bench takes them."""

from __future__ import annotations

import json

import pytest

from benchmarks.bench import Sample
from benchmarks.engines import KAFKA_STREAMS, OURS
from benchmarks.entries import Completeness, Entries, amount_of, check, missing_and_repeated
from benchmarks.figures import percentile, ratios, rotated
from benchmarks.goals import FEW, verdicts
from benchmarks.progress import Look, summary
from benchmarks.table import Samples
from streams_app.partitioning import partition_of

FOUR = 4


def outputs_of(entries: Entries) -> list[tuple[int, bytes]]:
    """Partition and value of what a right engine writes."""
    balances: dict[str, int] = {}
    outputs = []
    for key, value in entries.records():
        entry = json.loads(value)
        account = entry["account"]
        assert account.encode() == key
        balances[account] = balances.get(account, 0) + entry["amount"]
        output = {"id": entry["id"], "account": account, "balance": balances[account]}
        outputs.append((partition_of(key, FOUR), json.dumps(output).encode()))
    return outputs


def test_missing_and_repeated_outputs_are_told_apart() -> None:
    """A benchmark that counted outputs only would call an engine exact that loses one event and repeats another."""
    values = [json.dumps({"id": number, "account": "a", "balance": 0}).encode() for number in (0, 1, 1, 1, 3)]
    assert missing_and_repeated(values, Entries(5, 10)) == (2, 2)


def test_complete_outputs_are_found_complete() -> None:
    """Accounts, balances and partitions follow from the number of an entry alone, so every output can be compared."""
    entries = Entries(500, 50)
    assert check(outputs_of(entries), entries, FOUR) == Completeness(0, 0, 0)


def test_a_lost_entry_is_noticed_even_if_the_number_of_outputs_is_right() -> None:
    """An engine that loses one and repeats another is not complete, nor are the balances behind the lost one."""
    entries = Entries(500, 50)
    outputs = outputs_of(entries)
    outputs[499] = outputs[0]
    assert check(outputs, entries, FOUR) == Completeness(1, 1, 0)


def test_a_wrong_balance_counts_once() -> None:
    """One addition that was forgotten is one mistake, however many entries of the account follow."""
    entries = Entries(500, 1)
    outputs = []
    for partition, value in outputs_of(entries):
        output = json.loads(value)
        output["balance"] -= amount_of(100) * (output["id"] >= 100)
        outputs.append((partition, json.dumps(output).encode()))
    assert check(outputs, entries, FOUR) == Completeness(0, 0, 1)


def test_an_output_in_another_partition_is_wrong() -> None:
    """Who scatters an account's outputs spares itself the work of keeping their order."""
    entries = Entries(500, 50)
    outputs = outputs_of(entries)
    partition, value = outputs[7]
    outputs[7] = (partition + 1) % FOUR, value
    assert check(outputs, entries, FOUR).wrong > 0


def test_entries_are_spread_over_all_accounts() -> None:
    """The size of the table that is measured is the one that is said."""
    entries = Entries(100_000, 1_000)
    assert len({entries.account_of(number) for number in range(entries.count)}) == entries.accounts
    in_turn = Entries(10, 30, first=20, in_turn=True)
    assert [key for key, _ in in_turn.records()] == [b"account-%d" % number for number in range(20, 30)]


def test_the_time_of_the_warm_up_does_not_count() -> None:
    """Start-up, or the compiler of a Java engine, would weigh the more the faster an engine is."""
    looks = [Look(0, 10, 0, 0, 100), Look(50, 30, 5, 2, 300), Look(60, 110, 9, 3, 200), Look(61, 110, 10, 4, 200)]
    drained = summary(looks, events=100, before=10)
    assert drained == (80, 10, 4, 1, 300)
    assert drained.figures == {"events_per_s": 8, "worker_us": 50_000, "broker_us": 12_500, "rss_mb": 0.0003}


def test_markers_of_transactions_are_no_events() -> None:
    """Offsets that markers took would make an engine the faster the more often it commits."""
    looks = [Look(0, 0, 0, 0, 0), Look(1, 60, 0, 0, 0), Look(5, 120, 0, 0, 0)]
    assert summary(looks, events=100, before=0)[:2] == (50, 4)


def test_all_at_once_is_timed_from_the_beginning() -> None:
    """A run that is too short to be looked at in the middle says something slow, not something infinite."""
    assert summary([Look(0, 0, 0, 0, 0), Look(4, 100, 0, 0, 0)], events=100, before=0)[:2] == (100, 4)


def test_a_percentile_is_a_figure_that_was_measured() -> None:
    """The 99th of 100 is not the worst one, and that of a single one is that one."""
    hundred = [float(number) for number in range(1, 101)]
    assert percentile(hundred, 0.5) == 50
    assert percentile(hundred, 0.99) == 99
    assert percentile([7.0], 0.99) == 7


def test_ratios_are_taken_within_a_round() -> None:
    """A slow moment of the machine hits both of a pair, and leaves their ratio as it is."""
    assert ratios([10, 1, 30], [5, 0.5, 10]) == (2, 2, 3)


def test_every_contender_is_first_once() -> None:
    """The first run of a round meets another machine than the last."""
    assert [rotated("abc", number) for number in range(3)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


@pytest.mark.parametrize(("ours_per_s", "reached"), [(120_000, True), (105_000, False)])
def test_a_goal_is_judged_by_the_median_of_the_ratios(ours_per_s: float, reached: bool) -> None:
    """What was not measured is not judged, and what was is not judged by another round's base."""
    samples = [
        Sample("throughput", FEW, engine.name, number, {"events_per_s": per_s * (number + 1)})
        for number in range(3)
        for engine, per_s in ((OURS, ours_per_s), (KAFKA_STREAMS, 100_000))
    ]
    assert [verdict.reached for verdict in verdicts(Samples(samples))] == [reached]


def test_a_flaw_is_found_whatever_the_figures_are() -> None:
    """The fastest engine is the one that leaves something out."""
    fine, flawed = (
        Sample("throughput", FEW, OURS.name, 0, {"events_per_s": 1, "missing": missing, "wrong": 0})
        for missing in (0, 1)
    )
    assert Samples([fine, flawed]).flawed() == [flawed]
