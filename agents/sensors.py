"""The sensors: readings are handled at most once.

A reading may be lost when a worker dies; the next one comes anyway. None is handled twice, so none weighs twice in an
average::

    sensor-readings, by device ──> `observe` ──> sensor-observations

A device numbers its readings. One that comes late, behind a later one of its metric, is passed on like any other, but
the average stays as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streams_app import at_most_once, set_aside
from tables.sensors import EMPTY, Average, Observation, Reading, average_key, averages

if TYPE_CHECKING:
    from faust.types import StreamT

readings = at_most_once.topic("sensor-readings", key_type=bytes, value_type=Reading)
observations = at_most_once.topic("sensor-observations", key_type=str, value_type=Observation)


def follow(average: Average, reading: Reading) -> Average:
    """The average once ``reading`` was seen: the same one if the reading came too late for it."""
    if reading.seq <= average.last_seq:
        return average
    return average.after(reading.seq, reading.value)


@at_most_once.agent(readings)
async def observe(stream: StreamT[Reading]) -> None:
    """Pass each reading on, with the average of its device and metric."""
    async for event in stream.events():
        reading, key = event.value, event.message.key
        if key != reading.device.encode():
            # It may lie in another partition than the device's others, each of which would keep an average of its own.
            await set_aside("wrong_key", f"the record's key is {key!r}; it must be the device {reading.device!r}")
            continue
        await take(reading)


async def take(reading: Reading) -> None:
    """Take one reading that lies where it belongs."""
    device, metric = reading.device, reading.metric
    key = average_key(device, metric)
    before = averages.get(key) or EMPTY
    after = follow(before, reading)
    if after is not before:
        averages[key] = after
    observation = Observation(device, metric, reading.seq, reading.value, reading.at, after.mean)
    await observations.send(key=device, value=observation)
