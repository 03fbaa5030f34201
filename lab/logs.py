"""What workers said around a record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from streams_app.audit import Log

_AT = re.compile(r"(\S+)\[(\d+)\]@(\d+)")
#: A line of Faust's log; its time is this machine's.
_LINE = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\] ")
#: What aiokafka says again and again while a broker is away.
_NOISE = re.compile(r"Unable (connect|to)|Failed fetch|rdkafka#|Coordinator Request failed|Heartbeat send request")
_AROUND = timedelta(seconds=4)
_MOST_LINES = 80


def moment(log: Log, examples: Iterable[str]) -> int | None:
    """When the first record that the examples name was written, ms since 1970; None: they name none that is there."""
    for example in examples:
        for topic, partition, offset in _AT.findall(example):
            tp, at = (topic, int(partition)), int(offset)
            if tp[1] >= log.partitions().get(topic, 0):
                continue
            for message in log.read({tp: at}):
                return int(message.timestamp()[1])
    return None


def lines_around(logs: Sequence[Path], at_ms: int) -> list[str]:
    """Lines of all logs within some seconds, in the order of their times, each with the log's name."""
    at = datetime.fromtimestamp(at_ms / 1000)
    found: list[tuple[datetime, str]] = []
    for path in logs:
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            stamp = _LINE.match(line)
            if stamp is None or _NOISE.search(line):
                continue
            said = datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S,%f")
            if abs(said - at) < _AROUND:
                found.append((said, f"{path.stem}: {line}"))
    return [line for _, line in sorted(found)][:_MOST_LINES]


def last_error(log: Path) -> str:
    """The last error that a log tells, on one line: what ended the worker comes last."""
    errors = [
        line
        for line in log.read_text(errors="replace").splitlines()
        if ("[ERROR]" in line or "Crashed" in line) and not _NOISE.search(line)
    ]
    return errors[-1] if errors else "its log tells no error"
