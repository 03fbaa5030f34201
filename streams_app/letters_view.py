"""Dead letters, and what became of them, as people and programs see them: tables, sentences, plain values for JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from streams_app.letters import Letter, Listing
from streams_app.replay import Replay

_SHOWN_KINDS = 20
_SHOWN_KEY_CHARS = 40
_SHOWN_MESSAGE_CHARS = 200


def document(listing: Listing) -> dict[str, Any]:
    """The listing as plain values, for JSON."""
    return {
        "letters": [letter_document(letter) for letter in listing.kept],
        "shown": len(listing.kept),
        "found": listing.letters,
        "counts": [
            {"topic": topic, "error": error, "letters": count.letters, "replayed": count.replayed}
            for (topic, error), count in sorted(listing.counts.items())
        ],
    }


def letter_document(letter: Letter) -> dict[str, Any]:
    """The letter as plain values, for JSON."""
    place, origin = letter.place, letter.origin
    return {
        "letter": {"partition": place.partition, "offset": place.offset},
        "time": _rfc3339(letter.timestamp_ms),
        "from": origin and {"topic": letter.topic, "partition": origin.partition, "offset": origin.offset},
        "error": letter.error,
        "message": letter.message,
        "attempts": letter.attempts,
        "replayed": letter.replayed,
        "cut": letter.cut,
        "key": _content(letter.key),
        "value": _content(letter.value),
        "headers": [{"name": name, "value": _content(value)} for name, value in letter.headers],
    }


def _content(content: bytes | None) -> dict[str, str] | None:
    """Text where it is UTF-8, else base64, under a name that says which."""
    if content is None:
        return None
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}


def _rfc3339(timestamp_ms: int) -> str:
    return datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def table(listing: Listing) -> Table:
    """The letters that were kept, for people."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("letter", no_wrap=True)
    table.add_column("time (UTC)", no_wrap=True)
    table.add_column("from, key", overflow="fold", max_width=34)
    table.add_column("error, attempts, message", overflow="fold", ratio=1)
    for letter in listing.kept:
        table.add_row(*_row(letter))
    return table


def _row(letter: Letter) -> tuple[Text, Text, Text, Text]:
    time_ = datetime.fromtimestamp(letter.timestamp_ms / 1000, UTC)
    attempts = "" if letter.attempts is None else f", {letter.attempts} attempt{'' if letter.attempts == 1 else 's'}"
    why = Text(_printable(letter.error) or "no error", "bold")
    why.append(f"{attempts}\n{_shortened(_printable(letter.message), _SHOWN_MESSAGE_CHARS)}", "not bold")
    if letter.cut:
        why.append(f"\nnot whole: {_shortened(_printable(letter.cut), _SHOWN_KEY_CHARS)}", "yellow")
    place = Text(str(letter.place), "bold")
    if letter.replayed:
        place.append("\nreplayed", "not bold green")
    source = Text(_printable(letter.source))
    key = "no key" if letter.key is None else f"key {_shortened(_text(letter.key), _SHOWN_KEY_CHARS)}"
    source.append(f"\n{key}", "dim")
    return place, Text(f"{time_:%Y-%m-%d\n%H:%M:%S}"), source, why


def summary(listing: Listing) -> str:
    """How many letters there are, the newest of which were kept, for people."""
    if not listing.letters:
        return "no dead letters, or none that the filters choose"
    shown = len(listing.kept)
    return f"{_letters(listing.letters)}, {'all' if shown == listing.letters else f'the {shown} newest'} shown"


def kinds(listing: Listing) -> Iterator[str]:
    """How many there are of each topic and error, for people: the most frequent first."""
    by_number = sorted(listing.counts.items(), key=lambda each: -each[1].letters)
    for (topic, error), count in by_number[:_SHOWN_KINDS]:
        where, why = _printable(topic) or "unknown topic", _printable(error) or "no error"
        yield f"{where} {why}: {_letters(count.letters)}, {count.replayed} replayed"
    rest = by_number[_SHOWN_KINDS:]
    if rest:
        yield f"{len(rest)} further kinds: {_letters(sum(count.letters for _, count in rest))}"


def outcome(work: Replay) -> Iterator[str]:
    """What became of the letters, for people."""
    if work.sent is not None:
        yield f"{_letters(work.sent)} sent back"
    else:
        yield f"{_letters(work.due)} would be sent back" if work.due else "nothing to send back"
    if work.already:
        yield f"{_letters(work.already)} left alone: replayed before (--again sends such letters once more)"
    rest = work.pending.letters - work.due
    if rest:
        yield f"{_letters(rest)} beyond the limit: replay again for more"
    for finding in work.findings.list():
        examples = ", ".join(_printable(each) for each in finding.examples)
        yield f"{_letters(finding.count)} NOT sent: {_printable(finding.anomaly)} ({examples})"


def _letters(number: int) -> str:
    return f"{number} letter{'' if number == 1 else 's'}"


def _printable(text: str) -> str:
    """Without control characters: what others wrote must not steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _text(content: bytes) -> str:
    return _printable(content.decode(errors="backslashreplace"))


def _shortened(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"
