"""How checks read what they judge: values in their form, and dead letters. No rule of an agent stands here."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import msgspec

from streams_app.registry import Observed

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def read(decoder: msgspec.json.Decoder[T], value: bytes | None) -> T | None:
    """The value in its form; None: it does not have that form."""
    if value is None:
        return None
    try:
        return decoder.decode(value)
    except _UNREADABLE:
        return None


def read_input(decoder: msgspec.json.Decoder[S], value: bytes | None) -> tuple[S | None, str]:
    """The value in its form; or None, and the code that its dead letter must have."""
    try:
        return decoder.decode(value or b""), ""
    except msgspec.ValidationError:
        return None, "invalid"
    except _UNREADABLE:
        return None, "malformed"


class Letter(NamedTuple):
    """A dead letter, as its headers tell."""

    #: Partition and offset that it came from; (-1, -1): they are no numbers.
    where: tuple[int, int]
    code: str
    #: For people.
    text: str


def letter_from(topic: str, record: Observed) -> Letter | None:
    """The dead letter, if it came from ``topic`` (with KAFKA_PREFIX)."""
    came_from, partition, offset, code = (
        record.headers.get(f"dlq.{name}", b"").decode(errors="replace")
        for name in ("topic", "partition", "offset", "error")
    )
    if came_from != topic:
        return None
    where = (int(partition), int(offset)) if partition.isdecimal() and offset.isdecimal() else (-1, -1)
    return Letter(where, code, f"{record}: {topic}[{partition}]@{offset} as {code}")
