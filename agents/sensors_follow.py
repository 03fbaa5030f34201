"""Whether readings are handled at most once, judged while they come (``audit --follow``); what was lost is a figure.

Independent of the agent on purpose.

======== ==========================================================================================================
repeated an observation, or a dead letter, more than there are readings of that device and number
======== ==========================================================================================================
"""

from __future__ import annotations

import msgspec

from streams_app.evidence import read
from streams_app.pairs import Pairs
from streams_app.registry import Observed, Panel, follower, panel
from tables.sensors import Observation, Reading

panel(
    Panel(
        topic="sensor-readings",
        title="Sensors",
        unit="readings",
        promise="Nothing is done twice. What a crash may lose is bounded, counted and told.",
        figures={"readings.answers_total": "Observations passed on"},
    )
)


@follower("readings")
class ReadingsFollower(Pairs):
    """See the module."""

    topics = ("sensor-readings", "sensor-observations", "dead-letters")
    may_lose = True
    # The offset goes first. A batch is through in a fraction of a second; a worker that was frozen may be late.
    settle_s = 5.0

    def input_key(self, record: Observed) -> str | None:
        """Device and number."""
        reading = read(_readings, record.value)
        if reading is None or record.key != reading.device.encode():
            return None
        return f"{reading.seq} {reading.device}"

    def answer_key(self, record: Observed) -> str | None:
        """As the observation says."""
        observation = read(_observations, record.value)
        return None if observation is None else f"{observation.seq} {observation.device}"


_readings = msgspec.json.Decoder(Reading)
_observations = msgspec.json.Decoder(Observation)
