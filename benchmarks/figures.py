"""Figures of several rounds, and of many events."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


def rotated(contenders: Sequence[T], number: int) -> Sequence[T]:
    """The order of round ``number``: nobody is always the first, nor always behind the same one."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]


class Spread(NamedTuple):
    """Median, lowest and highest of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        return cls(statistics.median(figures), min(figures), max(figures))


def ratios(ours: Sequence[float], base: Sequence[float]) -> Spread:
    """Of the pairs that were measured in the same round."""
    return Spread.of([a / b for a, b in zip(ours, base, strict=True)])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest figure that ``share`` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
