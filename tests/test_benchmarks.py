"""The figures of the benchmarks; scripts/bench takes them."""

from __future__ import annotations

import json

from benchmarks.common import missing_and_repeated, ratios, rotated
from benchmarks.latency import percentile


def test_missing_and_repeated_outputs_are_told_apart() -> None:
    """A benchmark that counted outputs only would call an engine exact that loses one event and repeats another."""
    values = [json.dumps({"id": number}).encode() for number in (0, 1, 1, 1, 3)]
    assert missing_and_repeated(values, 5) == (2, 2)


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
