"""The sensors: the form of their readings, and the running averages.

========== ============================= ===================================================
table      key                           value
========== ============================= ===================================================
averages   device and metric             how many readings there were, their mean, the last one's number
========== ============================= ===================================================

A value is any finite number. JSON has no others, and the decoder takes neither ``NaN`` nor ``1e999``: one of them in an
average, and the average would never be a number again.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from streams_app import at_most_once

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64)]
Seq: TypeAlias = Annotated[int, Meta(ge=0)]
Moment: TypeAlias = Annotated[datetime, Meta(tz=True)]


class Reading(Struct, frozen=True):
    """What a device measured; the input. ``seq`` is its device's own count."""

    device: Name
    metric: Name
    seq: Seq
    value: float
    at: Moment


class Observation(Reading, frozen=True):
    """The reading, with the running average of its device and metric."""

    average: float


class Average(Struct, frozen=True):
    """The mean of ``count`` readings, the last of which was number ``last_seq``."""

    count: int
    mean: float
    last_seq: int

    def after(self, seq: int, value: float) -> Average:
        """The average with one more reading in it."""
        count = self.count + 1
        # Not from a sum, which would lose digits as it grows; and divided before they are subtracted, as the difference
        # of two finite numbers may be too large for one.
        return Average(count, self.mean + (value / count - self.mean / count), seq)


#: Before the first reading; any number is above its last one.
EMPTY = Average(0, 0.0, -1)


def average_key(device: str, metric: str) -> str:
    """The key of an average, such as ``6:boiler/pressure``.

    Both parts may hold any characters, so a mere separator could be a part of either; the length in front settles it.
    """
    return f"{len(device)}:{device}/{metric}"


# Written by the partition of the device, as a reading's key is its device.
averages = at_most_once.Table("averages", key_type=str, value_type=Average)
