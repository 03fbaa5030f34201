"""Input for the sensors, as devices send it: in bursts and with silences, with numbers left out, some of which come late.

No two well-formed readings of a device have the same number. The same seed gives the same records, and another seed
other devices: runs can follow each other on one topic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, NamedTuple, TypeAlias

import msgspec

from streams_app.registry import Record, generator

Fields: TypeAlias = dict[str, Any]

#: Metric to its usual value, and how far the next reading tends to be from the last one.
METRICS = {
    "temperature_c": (21.0, 0.2),
    "humidity_percent": (45.0, 0.8),
    "pressure_hpa": (1_013.0, 0.5),
    "voltage_v": (230.0, 1.5),
    "vibration_mm_per_s": (2.0, 0.1),
}
#: Any moment does; a fixed one keeps the records the same.
_EPOCH = datetime(2024, 1, 1, tzinfo=UTC)
#: Shares of the readings after which their device sends many in a row, falls silent, or leaves numbers out.
_BURSTS, _SILENCES, _GAPS = 0.01, 0.01, 0.03
#: How many of the numbers that were left out may still come late; the others never do.
_MOST_OWED = 100
#: Devices asked before one that is silent sends nevertheless: with few devices, all may be.
_TRIES = 10


@generator("sensor-readings", topic="sensor-readings")
def readings(random: Random, keys: int, *, behind: float = 0.01, ill_formed: float = 0.005) -> Iterator[Record]:
    """Readings of ``keys`` devices. ``behind`` is the share of those that come late, behind a later one of their metric."""
    source = _Source(random, keys)
    while True:
        dice = random.random()
        if dice < ill_formed:
            yield source.ill_formed()
        elif dice < ill_formed + behind and source.owed:
            yield _record(source.late())
        else:
            yield _record(source.fresh())


class _Device:
    """What is remembered of a device."""

    __slots__ = ("name", "seq", "silent_until", "values")

    def __init__(self, name: str, values: dict[str, float]) -> None:
        self.name = name
        #: Metric to the last value.
        self.values = values
        self.seq = -1
        #: In records of all devices.
        self.silent_until = 0


class _Owed(NamedTuple):
    """A number that was left out, and the metric of the reading in whose place it was."""

    device: _Device
    metric: str
    seq: int


class _Source:
    """The state behind the records."""

    def __init__(self, random: Random, keys: int) -> None:
        self._random = random
        self._keys = keys
        self._prefix = f"{random.getrandbits(32):08x}"
        self._devices: dict[int, _Device] = {}
        self._count = 0
        self._bursting: _Device | None = None
        self._burst_left = 0
        self.owed: deque[_Owed] = deque(maxlen=_MOST_OWED)

    def fresh(self) -> Fields:
        """The next reading of some device."""
        device = self._next_device()
        metric = self._random.choice(list(device.values))
        dice = self._random.random()
        if dice < _GAPS:
            left_out = self._random.randint(1, 3)
            self.owed.extend(_Owed(device, metric, device.seq + 1 + number) for number in range(left_out))
            device.seq += left_out
        elif dice < _GAPS + _SILENCES:
            device.silent_until = self._count + self._keys * self._random.randint(2, 20)
        elif dice < _GAPS + _SILENCES + _BURSTS and not self._burst_left:
            self._bursting, self._burst_left = device, self._random.randint(5, 50)
        device.seq += 1
        return self._reading(device, metric, device.seq)

    def late(self) -> Fields:
        """A reading that was left out, now that a later one of its device and metric was sent."""
        return self._reading(*self.owed.popleft())

    def ill_formed(self) -> Record:
        """A record that must become a dead letter, of one of the kinds in `ILL_FORMED`."""
        kind = self._random.choice(sorted(ILL_FORMED))
        return ILL_FORMED[kind](self.fresh())

    def _next_device(self) -> _Device:
        if self._bursting is not None and self._burst_left:
            self._burst_left -= 1
            return self._bursting
        for _ in range(_TRIES):
            device = self._device(1 + int(self._keys * self._random.random()))
            if device.silent_until <= self._count:
                break
        return device

    def _device(self, number: int) -> _Device:
        device = self._devices.get(number)
        if device is None:
            some = self._random.sample(sorted(METRICS), self._random.randint(1, 3))
            values = {metric: METRICS[metric][0] for metric in some}
            device = self._devices[number] = _Device(f"device-{self._prefix}-{number:05d}", values)
        return device

    def _reading(self, device: _Device, metric: str, seq: int) -> Fields:
        self._count += 1
        usual, step = METRICS[metric]
        # Pulled back a little, so that it wanders around the usual value and never leaves for good.
        value = device.values[metric] * 0.99 + usual * 0.01 + self._random.gauss(0.0, step)
        device.values[metric] = value
        at = _EPOCH + timedelta(milliseconds=self._count)
        return {"device": device.name, "metric": metric, "seq": seq, "value": round(value, 3), "at": at.isoformat()}


def _record(fields: Fields) -> Record:
    return Record(fields["device"].encode(), msgspec.json.encode(fields))


def _with(**changes: Any) -> Callable[[Fields], Record]:
    return lambda fields: Record(fields["device"].encode(), msgspec.json.encode({**fields, **changes}))


def _without(name: str) -> Callable[[Fields], Record]:
    return lambda fields: Record(
        fields["device"].encode(), msgspec.json.encode({key: value for key, value in fields.items() if key != name})
    )


def _raw(change: Callable[[bytes], bytes]) -> Callable[[Fields], Record]:
    return lambda fields: Record(fields["device"].encode(), change(msgspec.json.encode(fields)))


def _value(text: str) -> Callable[[Fields], Record]:
    """With ``text`` as the value, as other JSON writers may put it there."""
    return lambda fields: Record(
        fields["device"].encode(), msgspec.json.encode({**fields, "value": msgspec.Raw(text.encode())})
    )


#: Every way in which a reading can be ill-formed, by name.
ILL_FORMED: dict[str, Callable[[Fields], Record]] = {
    "json_cut_off": _raw(lambda value: value[:-1]),
    "json_empty": _raw(lambda value: b""),
    "json_not_an_object": _raw(lambda value: b"[" + value + b"]"),
    "json_not_utf8": _raw(lambda value: value.replace(b'"metric":"', b'"metric":"\xff', 1)),
    "value_nan": _value("NaN"),
    "value_infinity": _value("Infinity"),
    "value_minus_infinity": _value("-Infinity"),
    "value_too_large": _value("1e999"),
    "value_too_small": _value("-1e999"),
    "value_too_long": _value("9" * 400),
    "value_nan_as_text": _with(value="NaN"),
    "value_text": lambda fields: _with(value=str(fields["value"]))(fields),
    "value_true": _with(value=True),
    "value_null": _with(value=None),
    "value_missing": _without("value"),
    "seq_negative": lambda fields: _with(seq=-1 - fields["seq"])(fields),
    "seq_fraction": lambda fields: _with(seq=fields["seq"] + 0.5)(fields),
    "seq_float": lambda fields: _with(seq=float(fields["seq"]))(fields),
    "seq_text": lambda fields: _with(seq=str(fields["seq"]))(fields),
    "seq_true": _with(seq=True),
    "seq_missing": _without("seq"),
    "device_empty": lambda fields: _record({**fields, "device": ""}),
    "device_oversized": lambda fields: _record({**fields, "device": fields["device"].ljust(65, "x")}),
    "device_number": _with(device=7),
    "device_missing": _without("device"),
    "metric_empty": _with(metric=""),
    "metric_oversized": _with(metric="m" * 65),
    "metric_null": _with(metric=None),
    "metric_missing": _without("metric"),
    "at_not_a_time": _with(at="yesterday"),
    "at_without_zone": _with(at="2024-01-01T00:00:00"),
    "at_number": _with(at=1_704_067_200),
    "at_missing": _without("at"),
    "key_missing": lambda fields: Record(None, msgspec.json.encode(fields)),
    "key_of_another": lambda fields: Record(fields["device"].encode() + b"?", msgspec.json.encode(fields)),
    "key_not_utf8": lambda fields: Record(b"\xff" + fields["device"].encode(), msgspec.json.encode(fields)),
}
