"""The sensors: what counts as a reading, what an average is, what devices send, and what the audit says of it all."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from contextlib import ExitStack
from itertools import islice, pairwise
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import agents.sensors as module
from agents.sensors_check import SensorsCheck
from agents.sensors_input import ILL_FORMED, METRICS, readings
from streams_app.codecs import UndecodableError, struct_codec
from streams_app.generate import Plan
from streams_app.partitioning import partition_of
from streams_app.registry import Facts, Observed, Record
from streams_app.settings import Settings
from tables.sensors import EMPTY, Average, Observation, Reading, average_key
from tests.ledger_world import PARTITIONS, FakeStream, FakeTable, FakeTopic, World

COUNT = 20_000
decode = struct_codec(Reading).decode


def fields(**changes: Any) -> dict[str, Any]:
    return {"device": "boiler", "metric": "pressure", "seq": 3, "value": 1.5, "at": "2024-05-01T12:00:00Z", **changes}


def as_json(**changes: Any) -> bytes:
    # Unlike msgspec's, Python's own writes NaN and Infinity, as other writers do.
    return json.dumps(fields(**changes)).encode()


class Sensors(World):
    """The sensors without Kafka: the agent's own code on topics and a table in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.averages = FakeTable(self)

    def write(self, records: Any) -> None:
        for record in records:
            self.append("sensor-readings", record.key, record.value)

    def reading(self, **changes: Any) -> Observed:
        values = fields(**changes)
        return self.append("sensor-readings", values["device"].encode(), as_json(**changes))

    def run(self, random: Random | None = None) -> None:
        with ExitStack() as stack:
            stack.enter_context(patch.object(module, "observations", FakeTopic(self, "sensor-observations")))
            stack.enter_context(patch.object(module, "averages", self.averages))
            stack.enter_context(patch.object(module, "set_aside", self._set_aside))
            asyncio.run(self._run(random))

    async def _run(self, random: Random | None) -> None:
        for partition, log in enumerate(self.topics["sensor-readings"]):
            for record in log[self.consumed["sensor-readings", partition] :]:
                self.consumed["sensor-readings", partition] += 1
                await self._handle(record)

    async def _handle(self, record: Observed) -> None:
        self.event = SimpleNamespace(value=None, message=SimpleNamespace(**record._asdict()))
        try:
            self.event.value = decode(record.value or b"")
        except UndecodableError as error:
            await self._set_aside(error.code, str(error))
        else:
            await module.observe.fun(FakeStream(self.event))

    def judge(self, *, at_rest: bool = True, settings: Settings | None = None, given_up: int = 0) -> SensorsCheck:
        partitions = dict.fromkeys(SensorsCheck.topics, PARTITIONS)
        check = SensorsCheck(Facts(settings or Settings(), partitions, at_rest, given_up))
        for topic in check.topics:
            for record in self.all(topic):
                check.observe(record)
        check.finish()
        return check

    def replace(self, record: Observed, **changes: Any) -> None:
        """Put other fields into the value of an observation."""
        value = msgspec.json.encode({**msgspec.json.decode(record.value or b""), **changes})
        log = self.topics[record.topic][record.partition]
        log[log.index(record)] = record._replace(value=value)

    def remove(self, record: Observed) -> None:
        self.topics[record.topic][record.partition].remove(record)


class TestForm:
    """What is not of the contract's form must not reach an average."""

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_nan_and_infinity_as_python_writes_them_are_no_json(self, value: float) -> None:
        """One of them in an average, and it would never be a number again."""
        assert b"NaN" in as_json(value=value) or b"Infinity" in as_json(value=value)
        with pytest.raises(UndecodableError) as caught:
            decode(as_json(value=value))
        assert caught.value.code == "malformed"

    @pytest.mark.parametrize("number", [b"1e999", b"-1e999", b"1.8e308", b"9" * 400, b"9" * 5_000, b'"NaN"', b'"1"'])
    def test_a_number_too_large_for_one_is_invalid(self, number: bytes) -> None:
        """Many parsers make an infinity of it, silently."""
        with pytest.raises(UndecodableError) as caught:
            decode(as_json(value=0.125).replace(b"0.125", number))
        assert caught.value.code == "invalid"

    @pytest.mark.parametrize("changes", [{"value": True}, {"seq": True}, {"seq": 1.0}, {"seq": -1}, {"seq": "1"}])
    def test_what_python_takes_for_a_number_is_not_yet_one(self, changes: dict[str, Any]) -> None:
        """In Python ``True`` is 1, and would be averaged."""
        with pytest.raises(UndecodableError) as caught:
            decode(as_json(**changes))
        assert caught.value.code == "invalid"

    @pytest.mark.parametrize("kind", sorted(ILL_FORMED))
    def test_each_kind_of_ill_formed_input_becomes_one_dead_letter_and_nothing_else(self, kind: str) -> None:
        """Nonsense would be averaged, or be lost without a trace."""
        world = Sensors()
        world.write([ILL_FORMED[kind](fields())])
        world.run()
        assert len(world.all("dead-letters")) == 1
        assert not world.all("sensor-observations")
        assert not any(world.averages.rows.values())
        assert not world.judge().findings.list()

    @pytest.mark.parametrize(
        "changes",
        [
            {"value": 1},
            {"value": -0.0},
            {"value": 1.7976931348623157e308},
            {"value": 2**60 + 1},
            {"seq": 0},
            {"seq": 2**70},
            {"device": "d" * 64},
            {"metric": "\u00e4" * 64},
            {"at": "2024-05-01T12:00:00.5+02:00"},
            {"at": "0001-01-01T00:00:00+23:59"},
            {"unknown": [1]},
        ],
    )
    def test_the_limits_of_the_contract_are_accepted(self, changes: dict[str, Any]) -> None:
        """Devices that keep to the contract would be turned away."""
        world = Sensors()
        world.reading(**changes)
        world.run()
        assert len(world.all("sensor-observations")) == 1
        assert not world.judge().findings.list()

    def test_a_value_and_its_observation_keep_all_digits(self) -> None:
        """What was measured would change on its way."""
        reading = decode(as_json(value=0.1 + 0.2))
        observation = Observation(*msgspec.structs.astuple(reading), average=0.0)
        assert msgspec.json.decode(msgspec.json.encode(observation), type=Observation) == observation


class TestAverages:
    """A reading enters the average of its device and metric once, in the order of the numbers."""

    def test_a_number_that_goes_back_is_passed_on_but_not_averaged(self) -> None:
        """A device that sends again, or late, would weigh twice."""
        world = Sensors()
        for seq, value in ((5, 10.0), (7, 20.0), (6, 90.0), (7, 90.0), (0, 90.0), (8, 30.0)):
            world.reading(seq=seq, value=value)
        world.run()
        averages = [each["average"] for each in world.decoded("sensor-observations")]
        assert averages == [10.0, 15.0, 15.0, 15.0, 15.0, 20.0]
        assert world.averages.rows[partition_of(b"boiler", PARTITIONS)] == {
            average_key("boiler", "pressure"): Average(3, 20.0, 8)
        }

    def test_each_metric_has_its_own_last_number(self) -> None:
        """A device that counts over all metrics would have only its newest one averaged."""
        world = Sensors()
        for seq, metric in ((5, "pressure"), (4, "heat"), (6, "heat")):
            world.reading(seq=seq, metric=metric, value=float(seq))
        world.run()
        assert [each["average"] for each in world.decoded("sensor-observations")] == [5.0, 4.0, 5.0]

    def test_a_reading_under_another_key_is_set_aside(self) -> None:
        """Its device would have an average in each of two partitions."""
        world = Sensors()
        world.append("sensor-readings", b"kettle", as_json())
        world.run()
        [letter] = world.all("dead-letters")
        assert letter.headers["dlq.error"] == b"wrong_key"
        assert not world.judge().findings.list()

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
    def test_an_average_of_finite_numbers_is_finite_and_lies_among_them(self, values: list[float]) -> None:
        """Two numbers near the largest would give infinity, for ever."""
        average = EMPTY
        for seq, value in enumerate(values):
            average = average.after(seq, value)
        room = 1e-9 * max(map(abs, values))
        assert min(values) - room <= average.mean <= max(values) + room
        assert (average.count, average.last_seq) == (len(values), len(values) - 1)

    def test_an_average_of_many_equal_numbers_is_that_number(self) -> None:
        """Rounding would add up until the average leaves the only value that there ever was."""
        average = EMPTY
        for seq in range(10_000):
            average = average.after(seq, 0.1)
        assert average.mean == 0.1

    @pytest.mark.parametrize(("first", "second"), [(("a/b", "c"), ("a", "b/c")), (("1:a", "b"), ("1", "a/b"))])
    def test_no_two_devices_share_an_average(self, first: tuple[str, str], second: tuple[str, str]) -> None:
        """Names may hold any character, the separator as well."""
        assert average_key(*first) != average_key(*second)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(Plan("sensor-readings", COUNT, keys=100, seed=7).records())


def well_formed(records: list[Record]) -> list[Reading]:
    found = []
    for record in records:
        try:
            reading = decode(record.value)
        except UndecodableError:
            continue
        if record.key == reading.device.encode():
            found.append(reading)
    return found


class TestInput:
    """What the demo, the lab and newcomers feed the sensors with."""

    def test_the_same_seed_gives_the_same_records_and_another_one_other_devices(self, records: list[Record]) -> None:
        """A failure could not be repeated; a second run on a topic would be nothing but old numbers."""
        assert list(Plan("sensor-readings", COUNT, keys=100, seed=7).records()) == records
        others = well_formed(list(Plan("sensor-readings", 1_000, keys=100, seed=8).records()))
        assert not {each.device for each in others} & {each.device for each in well_formed(records)}

    def test_no_two_readings_of_a_device_have_one_number(self, records: list[Record]) -> None:
        """The audit would take the second one's observation for a repetition."""
        good = well_formed(records)
        assert len({(each.device, each.seq) for each in good}) == len(good)
        assert len({each.device for each in good}) == 100

    def test_the_shares_are_as_said(self, records: list[Record]) -> None:
        """The rare cases would not be rare, or not there at all."""
        good = well_formed(records)
        last: dict[tuple[str, str], int] = {}
        behind = 0
        for each in good:
            behind += each.seq <= last.get((each.device, each.metric), -1)
            last[each.device, each.metric] = max(each.seq, last.get((each.device, each.metric), -1))
        assert (COUNT - len(good)) / COUNT == pytest.approx(0.005, abs=0.002)
        assert behind / COUNT == pytest.approx(0.01, abs=0.003)

    def test_every_kind_of_ill_formed_record_comes(self) -> None:
        """A kind that never comes is never seen to be handled."""
        with patch.dict(ILL_FORMED, {kind: _called(kind) for kind in ILL_FORMED}):
            kinds = Counter(record.value for record in islice(readings(Random(1), 5, ill_formed=1.0), 1_000))
        assert set(kinds) == {kind.encode() for kind in ILL_FORMED}

    def test_devices_have_bursts_silences_and_gaps(self, records: list[Record]) -> None:
        """Evenly spread input is the only one that never surprises anybody."""
        good = well_formed(records)
        at: dict[str, list[int]] = {}
        for number, each in enumerate(good):
            at.setdefault(each.device, []).append(number)
        distances = [later - earlier for each in at.values() for earlier, later in pairwise(each)]
        assert distances.count(1) / len(distances) > 0.1, "bursts"
        assert max(distances) > 1_000, "silences"
        numbers = Counter(each.device for each in good)
        assert any(max(each.seq for each in good if each.device == name) >= numbers[name] for name in numbers), "gaps"
        assert {each.metric for each in good} == set(METRICS)


def _called(kind: str) -> Any:
    return lambda fields: Record(None, kind.encode())


@pytest.fixture
def world(records: list[Record]) -> Sensors:
    """All that was generated, handled faithfully."""
    world = Sensors()
    world.write(records[:3_000])
    world.run()
    return world


def anomalies(check: SensorsCheck) -> dict[str, int]:
    return {finding.anomaly: finding.count for finding in check.findings.list()}


class TestCheck:
    """A check that never finds anything proves nothing."""

    def test_a_faithful_world_passes(self, world: Sensors) -> None:
        """The audit would cry wolf."""
        check = world.judge()
        assert anomalies(check) == {}
        figures = check.figures
        assert (figures["inputs"], figures["lost"], figures["repeated"]) == (3_000, 0, 0)
        assert figures["observed"] + figures["set_aside"] == 3_000
        assert figures["averages_exact"] == figures["observed"]

    def test_losses_up_to_the_reported_are_permitted(self, world: Sensors) -> None:
        """At most once would be judged by a promise that it does not make."""
        for record in world.all("sensor-observations")[100:110]:
            world.remove(record)
        world.remove(world.all("dead-letters")[0])
        check = world.judge(given_up=11)
        assert anomalies(check) == {}
        assert (check.figures["lost"], check.figures["reported"]) == (11, 11)
        assert check.figures["averages_exact"] < check.figures["observed"]

    def test_losses_beyond_the_reported_are_found(self, world: Sensors) -> None:
        """A worker could lose readings and keep silent about it."""
        for record in world.all("sensor-observations")[100:110]:
            world.remove(record)
        world.remove(world.all("dead-letters")[0])
        assert anomalies(world.judge(given_up=10)) == {"lost beyond the reported": 1}
        assert anomalies(world.judge()) == {"lost beyond the reported": 11}
        assert anomalies(world.judge(at_rest=False)) == {}

    def test_a_lost_dead_letter_alone_is_found(self, world: Sensors) -> None:
        """Ill-formed readings would vanish without a trace."""
        world.remove(world.all("dead-letters")[0])
        assert anomalies(world.judge()) == {"lost beyond the reported": 1}

    @pytest.mark.parametrize(
        ("topic", "anomaly"),
        [("sensor-observations", "repeated observation"), ("dead-letters", "repeated dead letter")],
    )
    def test_a_repetition_is_found(self, world: Sensors, topic: str, anomaly: str) -> None:
        """The one promise of at most once would not be looked at."""
        record = world.all(topic)[5]
        world.append(topic, record.key, record.value, record.partition, headers=record.headers)
        check = world.judge()
        assert anomalies(check) == {anomaly: 1}
        assert check.figures["repeated"] == 1

    @pytest.mark.parametrize("changes", [{"value": 1e6}, {"metric": "other"}, {"at": "2023-01-01T00:00:00Z"}])
    def test_an_observation_that_is_not_its_reading_is_found(self, world: Sensors, changes: dict[str, Any]) -> None:
        """What was measured could change on its way."""
        world.replace(world.all("sensor-observations")[50], **changes)
        assert anomalies(world.judge()) == {"wrong observation": 1}

    @pytest.mark.parametrize("changes", [{"device": "nobody"}, {"seq": 10**9}])
    def test_an_observation_from_nowhere_is_found(self, world: Sensors, changes: dict[str, Any]) -> None:
        """Readings could be made up."""
        record = world.all("sensor-observations")[50]
        value = msgspec.json.encode({**msgspec.json.decode(record.value or b""), **changes})
        world.append(record.topic, record.key, value, record.partition)
        assert anomalies(world.judge())["phantom observation"] == 1

    def test_an_average_beyond_all_values_is_found(self, world: Sensors) -> None:
        """The averages could be anything."""
        world.replace(world.all("sensor-observations")[50], average=5_000.0)
        assert anomalies(world.judge()) == {"wrong average": 1}

    def test_an_average_among_the_values_is_only_counted(self) -> None:
        """Best effort: after a crash an average may be one of earlier readings only."""
        world = Sensors()
        for seq in range(10):
            world.reading(seq=seq, value=float(seq))
        world.run()
        world.replace(world.all("sensor-observations")[9], average=8.0)
        check = world.judge()
        assert anomalies(check) == {}
        assert check.figures["averages_exact"] == 9

    def test_another_order_within_a_device_is_found(self) -> None:
        """Readers of a device would go back in time."""
        world = Sensors()
        for seq in range(10):
            world.reading(seq=seq)
        world.run()
        log = world.topics["sensor-observations"][partition_of(b"boiler", PARTITIONS)]
        log[4], log[5] = log[5], log[4]
        assert anomalies(world.judge()) == {"reordered": 1}

    def test_an_observation_in_another_partition_is_found(self, world: Sensors) -> None:
        """Readers of one partition would miss a part of a device."""
        record = world.all("sensor-observations")[50]
        world.remove(record)
        world.append(record.topic, record.key, record.value, (record.partition + 1) % PARTITIONS)
        assert "misplaced" in anomalies(world.judge())

    def test_a_wrong_code_is_found(self, world: Sensors) -> None:
        """Whoever repairs dead letters would look for the wrong fault."""
        record = world.all("dead-letters")[0]
        log = world.topics["dead-letters"][record.partition]
        log[log.index(record)] = record._replace(headers={**record.headers, "dlq.error": b"other"})
        assert anomalies(world.judge()) == {"wrong dead letter": 1}

    def test_a_good_reading_among_the_dead_letters_is_found(self, world: Sensors) -> None:
        """Good readings could be set aside for no reason, and count as handled."""
        observation = world.all("sensor-observations")[50]
        value = msgspec.json.decode(observation.value or b"")
        [source] = [
            record
            for record in world.all("sensor-readings")
            if record.key == observation.key and b'"seq":%d,' % value["seq"] in (record.value or b"")
        ]
        world.remove(observation)
        headers = {
            "dlq.topic": b"sensor-readings",
            "dlq.partition": str(source.partition).encode(),
            "dlq.offset": str(source.offset).encode(),
            "dlq.error": b"agent_error",
        }
        world.append("dead-letters", source.key, source.value, headers=headers)
        assert anomalies(world.judge()) == {"set aside": 1}

    def test_dead_letters_of_other_topics_are_not_looked_at(self, world: Sensors) -> None:
        """The ledger's would be phantoms here."""
        headers = {"dlq.topic": b"transfers", "dlq.partition": b"0", "dlq.offset": b"0", "dlq.error": b"invalid"}
        world.append("dead-letters", b"k", b"v", headers=headers)
        assert anomalies(world.judge()) == {}
        headers = {**headers, "dlq.topic": b"sensor-readings", "dlq.offset": b"1"}
        world.append("dead-letters", b"k", b"v", headers=headers)
        assert anomalies(world.judge()) == {"phantom dead letter": 1}

    def test_a_device_that_sends_again_is_answered_again(self) -> None:
        """Its second observation would be taken for a fault of ours, or its loss not be seen."""
        world = Sensors()
        for seq in (1, 2, 1, 3, 2):
            world.reading(seq=seq)
        world.run()
        assert anomalies(world.judge()) == {}
        # The first ones are lost: nobody can tell which, but that two are, and that the order is right.
        for record in world.all("sensor-observations")[:2]:
            world.remove(record)
        assert anomalies(world.judge(given_up=2)) == {}
        assert anomalies(world.judge(given_up=1)) == {"lost beyond the reported": 1}
