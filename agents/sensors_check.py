"""Whether the sensors' readings were handled at most once, judged from the committed records alone.

Independent of the agent on purpose: no rule is imported from it. Each reading, by its device and number, has one
observation or one dead letter, or is lost. What does not fit is named:

=========================== ===========================================================================================
repeated observation        of one reading; ``repeated dead letter`` likewise
lost beyond the reported    more readings are lost than the workers reported to have given up
phantom observation         of a reading that nobody sent; ``phantom dead letter`` likewise
wrong observation           with other content than its reading
wrong average               below, or above, all values that were read so far of its device and metric
wrong dead letter           with another code than the reading deserves
reordered                   observations of a device in another order than its readings
misplaced                   an observation in a partition, or under a key, that is not its device's
set aside                   a well-formed reading among the dead letters
=========================== ===========================================================================================

An average is what is left after losses, of events and of table writes alike, so none is demanded to the digit; how many
are exactly what the observations read before them give is counted.
"""

from __future__ import annotations

from array import array
from math import inf, isclose

import msgspec

from streams_app.evidence import letter_from, read, read_input
from streams_app.partitioning import partition_of
from streams_app.registry import Check, Facts, Observed, check
from tables.sensors import Observation, Reading

#: By how much, of the numbers involved, an average may differ from another way to compute it: some rounding steps.
_TOLERANCE = 1e-9


class _Metric:
    """One metric of a device: the values read so far, and the average that the observations give."""

    __slots__ = ("count", "highest", "last_seq", "lowest", "mean")

    def __init__(self) -> None:
        self.lowest, self.highest = inf, -inf
        self.count, self.mean, self.last_seq = 0, 0.0, -1

    @property
    def tolerance(self) -> float:
        return _TOLERANCE * max(abs(self.lowest), abs(self.highest))

    def holds(self, average: float) -> bool:
        """Whether ``average`` lies among the values read so far."""
        return self.lowest - self.tolerance <= average <= self.highest + self.tolerance

    def follow(self, seq: int, value: float) -> float:
        """The average after one more observation."""
        if seq > self.last_seq:
            self.count, self.last_seq = self.count + 1, seq
            # Not as the agent computes it, and not from a sum, which may be too large for a number.
            self.mean = self.mean * ((self.count - 1) / self.count) + value / self.count
        return self.mean


class _Device:
    """The well-formed readings of a device, in columns, as there may be millions; in the order in which they lie."""

    __slots__ = ("again", "ats", "by_seq", "metric_of", "metrics", "next", "passed", "places", "seen", "values")

    def __init__(self) -> None:
        self.values = array("d")
        #: In seconds since 1970.
        self.ats = array("d")
        self.metric_of = array("L")
        #: Whether each has its observation, or its dead letter.
        self.seen = bytearray()
        self.by_seq: dict[int, int] = {}
        #: Number to the further readings that have it: a device that sends again.
        self.again: dict[int, list[int]] = {}
        self.metrics: dict[int, _Metric] = {}
        #: Partitions in which it was seen, one bit each. Of a device in several of them, the order is not known.
        self.places = 0
        #: Up to where the values were looked at.
        self.passed = 0
        #: Behind the last reading that was observed.
        self.next = 0

    def add(self, reading: Reading, metric: int, partition: int) -> None:
        """Take note of a reading."""
        index = len(self.values)
        self.values.append(reading.value)
        self.ats.append(reading.at.timestamp())
        self.metric_of.append(metric)
        self.seen.append(0)
        self.places |= 1 << partition
        if self.by_seq.setdefault(reading.seq, index) != index:
            self.again.setdefault(reading.seq, []).append(index)

    def with_seq(self, seq: int) -> list[int]:
        """Indexes of the readings that have this number."""
        first = self.by_seq.get(seq)
        return [] if first is None else [first, *self.again.get(seq, ())]

    @property
    def in_order(self) -> bool:
        return self.places.bit_count() == 1

    def metric(self, number: int) -> _Metric:
        """One metric of the device."""
        found = self.metrics.get(number)
        if found is None:
            found = self.metrics[number] = _Metric()
        return found

    def look_up_to(self, index: int) -> None:
        """Look at the values up to and with the reading at ``index``."""
        while self.passed <= index:
            metric, value = self.metric(self.metric_of[self.passed]), self.values[self.passed]
            metric.lowest, metric.highest = min(metric.lowest, value), max(metric.highest, value)
            self.passed += 1


@check("sensors")
class SensorsCheck(Check):
    """See the module."""

    # The readings first: the others are judged by them.
    topics = ("sensor-readings", "sensor-observations", "dead-letters")

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._devices: dict[str, _Device] = {}
        self._metrics: dict[str, int] = {}
        #: Partition and offset of each ill-formed reading to the code that it deserves; and of those that have a letter.
        self._ill: dict[tuple[int, int], str] = {}
        self._letters: set[tuple[int, int]] = set()
        self._observed = 0
        self._exact = 0

    def observe(self, record: Observed) -> None:
        """Take note of a record; see `topics` for the order."""
        match record.topic:
            case "sensor-readings":
                self._observe_reading(record)
            case "sensor-observations":
                self._observe_observation(record)
            case "dead-letters":
                self._observe_dead_letter(record)

    # -- readings

    def _observe_reading(self, record: Observed) -> None:
        where = record.partition, record.offset
        reading, code = read_input(_readings, record.value)
        if reading is None:
            self._ill[where] = code
            return
        if record.key != reading.device.encode():
            self._ill[where] = "wrong_key"
            return
        device = self._devices.get(reading.device)
        if device is None:
            device = self._devices[reading.device] = _Device()
        device.add(reading, self._metrics.setdefault(reading.metric, len(self._metrics)), record.partition)

    # -- observations

    def _observe_observation(self, record: Observed) -> None:
        self._observed += 1
        observation = read(_observations, record.value)
        if observation is None:
            self.findings.add("phantom observation", f"{record} is not of the form that we write")
            return
        key = observation.device.encode()
        belongs = partition_of(key, self.facts.partitions.get(record.topic, 1))
        if record.key != key or record.partition != belongs:
            self.findings.add("misplaced", f"{record}: of {observation.device}, key {record.key!r}, not in {belongs}")
        device = self._devices.get(observation.device)
        candidates = device.with_seq(observation.seq) if device else []
        if device is None or not candidates:
            self.findings.add("phantom observation", f"{record}: {_name(observation)} was never sent")
            return
        waiting = [index for index in candidates if not device.seen[index]]
        if not waiting:
            self.findings.add("repeated observation", f"{record}: {_name(observation)}")
            return
        equal = [index for index in waiting if self._equals(device, index, observation)]
        if not equal:
            self.findings.add("wrong observation", f"{record}: {_name(observation)} is not what was sent")
            device.seen[waiting[0]] = 1
            return
        # Of a reading that was sent again, the one before the last observation is taken for the lost one.
        index = next((index for index in equal if index >= device.next), equal[0])
        device.seen[index] = 1
        self._judge(device, index, observation, record)

    def _equals(self, device: _Device, index: int, observation: Observation) -> bool:
        return (
            device.values[index] == observation.value
            and device.ats[index] == observation.at.timestamp()
            and device.metric_of[index] == self._metrics.get(observation.metric)
        )

    def _judge(self, device: _Device, index: int, observation: Observation, record: Observed) -> None:
        if not device.in_order:
            return
        if index < device.next:
            self.findings.add("reordered", f"{record}: {_name(observation)}")
        device.next = max(device.next, index + 1)
        device.look_up_to(index)
        metric = device.metric(device.metric_of[index])
        if not metric.holds(observation.average):
            text = f"{record}: {observation.average} of values from {metric.lowest} to {metric.highest}"
            self.findings.add("wrong average", text)
        expected = metric.follow(observation.seq, observation.value)
        self._exact += isclose(observation.average, expected, rel_tol=0.0, abs_tol=metric.tolerance)

    # -- dead letters

    def _observe_dead_letter(self, record: Observed) -> None:
        letter = letter_from(self.facts.settings.kafka_prefix + "sensor-readings", record)
        if letter is None:
            return
        where, code, text = letter
        if where in self._letters:
            self.findings.add("repeated dead letter", text)
            return
        self._letters.add(where)
        deserved = self._ill.get(where)
        if deserved is None:
            self._observe_other_letter(record, text)
        elif code != deserved:
            self.findings.add("wrong dead letter", f"{text}, not as {deserved}")

    def _observe_other_letter(self, record: Observed, letter: str) -> None:
        """A dead letter of something that was not ill-formed."""
        reading = read(_readings, record.value)
        device = self._devices.get(reading.device) if reading else None
        if reading is None or device is None or not device.with_seq(reading.seq):
            self.findings.add("phantom dead letter", letter)
            return
        index = next((index for index in device.with_seq(reading.seq) if not device.seen[index]), None)
        if index is None:
            self.findings.add("repeated dead letter", f"{letter}, which has an observation as well")
            return
        device.seen[index] = 1
        self.findings.add("set aside", letter)

    # -- conclusions

    def finish(self) -> None:
        """Count what is missing, and sum up."""
        readings = sum(len(device.seen) for device in self._devices.values())
        missing = sum(device.seen.count(0) for device in self._devices.values())
        missing += len(self._ill.keys() - self._letters)
        # Not lost as long as they may yet be consumed; that they are not is the audit's own finding.
        lost = missing if self.facts.at_rest else 0
        if lost > self.facts.given_up:
            text = f"{lost} readings are lost, {self.facts.given_up} were reported; for example {self._example()}"
            self.findings.add("lost beyond the reported", text, lost - self.facts.given_up)
        found = self.findings.list()
        self.figures = {
            "inputs": readings + len(self._ill),
            "observed": self._observed,
            "devices": len(self._devices),
            "ill-formed": len(self._ill),
            "set_aside": len(self._letters),
            "lost": lost,
            "reported": self.facts.given_up,
            "repeated": sum(each.count for each in found if each.anomaly.startswith("repeated")),
            "averages_exact": self._exact,
        }

    def _example(self) -> str:
        for name, device in self._devices.items():
            index = device.seen.find(0)
            if index >= 0:
                return f"number {next(seq for seq in device.by_seq if index in device.with_seq(seq))} of {name}"
        return "sensor-readings[{}]@{}".format(*min(self._ill.keys() - self._letters))


def _name(observation: Observation) -> str:
    return f"number {observation.seq} of {observation.device}"


_readings = msgspec.json.Decoder(Reading)
_observations = msgspec.json.Decoder(Observation)
