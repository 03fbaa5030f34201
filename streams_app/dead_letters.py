"""Dead letters: events set aside with the reason, in the transaction of their offset."""

from __future__ import annotations

from typing import Any, Protocol

from streams_app.batch import MAX_RECORD_BYTES
from streams_app.events import current_event
from streams_app.session import Output, header_bytes, header_pairs

TOPIC = "dead-letters"
#: Which letters were sent back to where they came from (letters.py).
REPLAYED_TOPIC = "dead-letters-replayed"
_MESSAGE_CHARS = 500
_ENVELOPE_BYTES = 4_096
_MOST_HEADER_BYTES = 64 * 1024


class Message(Protocol):
    """The parts of a Kafka record that a dead letter keeps."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Any


def dead_letter(prefix: str, message: Message, code: str, text: str, attempts: int) -> Output:
    """The record of the dead-letter topic for ``message``: key, value and headers as they came, and why."""
    came_with = header_pairs(message.headers)
    if header_bytes(came_with) > _MOST_HEADER_BYTES:
        came_with = [("dlq.headers", b"dropped: too large")]
    headers = [
        *came_with,
        ("dlq.topic", message.topic.encode()),
        ("dlq.partition", str(message.partition).encode()),
        ("dlq.offset", str(message.offset).encode()),
        ("dlq.error", code.encode()),
        ("dlq.message", text[:_MESSAGE_CHARS].encode(errors="backslashreplace")),
        ("dlq.attempts", str(attempts).encode()),
    ]
    # A record that fitted as it came may not fit with our headers; a cut one tells more than none.
    room_bytes = max(0, MAX_RECORD_BYTES - _ENVELOPE_BYTES - header_bytes(headers))
    key = None if message.key is None else message.key[:room_bytes]
    value = None if message.value is None else message.value[: room_bytes - len(key or b"")]
    if (key, value) != (message.key, message.value):
        headers.append(("dlq.cut", b"key or value"))
    return Output(prefix + TOPIC, key, value, headers=headers)


async def set_aside(code: str, message: str) -> None:
    """Send the event in hand to the dead letters, as it came; the agent goes on with the next one.

    ``code`` is a short word for programs, ``message`` a sentence for people.

    Raises:
        RuntimeError: there is no event in hand: only an agent sets events aside; or several, which `take` and `noack` give.
        DeadBatchError: its batch is over.
    """
    event = current_event()
    if event is None or event.batch is None:
        raise RuntimeError("set_aside() was called outside of an agent: there is no event to set aside")
    if len(event.undone) > 1:
        raise RuntimeError(
            "set_aside() was called with several events in hand, and does not know which one is meant: raise, and the engine "
            "finds the one at fault, by handing them out one by one"
        )
    event.batch.check_alive()
    app: Any = event.app
    record = event.batch.record_of(event.message)
    event.batch.put_aside(record, dead_letter(app.settings.kafka_prefix, record, code, message, attempts=1))
