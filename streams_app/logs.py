"""The log of a worker: for people on a terminal, one JSON object a line elsewhere (``STREAMS_APP_LOG_FORMAT``).

Every line of JSON has ``time``, ``level``, ``logger``, ``message`` and ``pid``, and as far as they are known ``guarantee``,
``generation``, ``topic``, ``partition``, ``offset`` and ``id``: of what the running agent has in hand, or the line is about.
``id`` is that of the event's value, where it has one; for the ledger that is the transfer's. ``error`` has a stack.

Whoever logs adds to a line by ``extra={"data": {...}}``, as everywhere in Faust; what holds for all that a task or a thread
does is said once, by `about`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, cast

import msgspec

from streams_app.events import current_event

_about: ContextVar[dict[str, Any] | None] = ContextVar("about", default=None)
#: What mode writes in front of a service's messages: its depth in the tree of services, and its name.
_SERVICE = re.compile(r"\[\^-*([^]]*)\]: ")
#: An id longer than this is none of ours, and would make lines of any length.
_ID_CHARS = 200


def about(**data: Any) -> None:
    """What is logged from here on, in this task or thread, is about that."""
    _about.set({**(_about.get() or {}), **data})


def wants_json(setting: str) -> bool:
    """Whether to write JSON; ``auto``: where stderr is no terminal."""
    return setting == "json" or (setting == "auto" and not sys.stderr.isatty())


def configuration(level: str | int | None, logfile: Any) -> dict[str, Any]:
    """For mode's set-up of logging: everything to stderr, or to the file that was asked for, as JSON."""
    number = logging.getLevelName(level.upper()) if isinstance(level, str) else level
    target: dict[str, Any] = (
        {"class": "logging.FileHandler", "filename": logfile}
        if isinstance(logfile, str)
        else {"class": "logging.StreamHandler", "stream": logfile or "ext://sys.stderr"}
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter}},
        "handlers": {"default": {**target, "formatter": "json", "level": number or logging.NOTSET}},
        "root": {"level": number or logging.WARNING, "handlers": ["default"]},
    }


class JsonFormatter(logging.Formatter):
    """One object a line. It never raises, and never writes two lines."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module."""
        text = record.getMessage()
        service = _SERVICE.match(text)
        line: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": text[service.end() :] if service else text,
            "pid": record.process,
            **({"service": service[1]} if service else {}),
            **(_about.get() or {}),
            **_in_hand(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return encode(line)


def encode(line: dict[str, Any]) -> str:
    """As JSON, whatever is in it."""
    return msgspec.json.encode(_plain(line), enc_hook=repr).decode()


def critical_line(message: str) -> str:
    """A line for whoever can use no logger."""
    return encode(
        {"time": _time(time.time()), "level": "CRITICAL", "logger": __name__, "message": message, "pid": os.getpid()}
    )


def id_of(value: Any) -> str | None:
    """The id of an event's value, decoded or as it came; None: it has none."""
    if isinstance(value, bytes):
        try:
            value = msgspec.json.decode(value, type=_Named)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
    found = getattr(value, "id", None)
    return found[:_ID_CHARS] if isinstance(found, str) else None


class _Named(msgspec.Struct):
    id: str | None = None


def _in_hand() -> dict[str, Any]:
    event = current_event()
    if event is None:
        return {}
    message = event.message
    place: dict[str, Any] = {"topic": message.topic, "partition": message.partition, "offset": message.offset}
    if event.batch is not None:
        place |= {"guarantee": cast(Any, event.app).guarantee, "generation": event.batch.pin.generation}
    known = id_of(event.value)
    return place if known is None else {**place, "id": known}


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    """Text that is no UTF-8 (a key, a path) is written with escapes."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(each) for key, each in value.items()}
    return value
