"""Dead letters: found by their reasons, and shown with all that is known of them."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from confluent_kafka import Producer
from rich.console import Console

from streams_app.errors import ConfigurationError
from streams_app.letters import Choice, Letters, Listing, Place, parse_moment
from streams_app.letters_view import document, kinds, letter_document, summary, table
from streams_app.settings import Settings
from tests.letters_world import NOW_MS, Came, World

#: Any, but in all processes of a test run the same: it is part of the tests' names.
MOMENT_MS = 1_900_000_000_000


@pytest.fixture
def world(kafka_url: str) -> World:
    return World(kafka_url)


def rendered(listing: Listing, width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table(listing))
    return out.getvalue()


class TestMoments:
    """When somebody says "of the last ten minutes", ten minutes it must be."""

    @pytest.mark.parametrize(
        ("text", "moment_ms"),
        [
            ("90s", MOMENT_MS - 90_000),
            ("10m", MOMENT_MS - 600_000),
            ("2h", MOMENT_MS - 7_200_000),
            ("7d", MOMENT_MS - 604_800_000),
            ("2030-01-31T12:00:00Z", 1_896_091_200_000),
            ("2030-01-31T13:00:00.500+01:00", 1_896_091_200_500),
        ],
    )
    def test_durations_and_times_are_read(self, text: str, moment_ms: int) -> None:
        """The wrong letters would be replayed."""
        assert parse_moment(text, MOMENT_MS) == moment_ms

    @pytest.mark.parametrize(
        "text", ["", "10", "10x", "-5m", "yesterday", "2030-01-31T12:00:00", "2030-13-01T00:00:00Z"]
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        """A time without zone would be read in the zone of whoever runs the command."""
        with pytest.raises(ValueError, match="2030-01-31T12:00:00Z"):
            parse_moment(text, MOMENT_MS)

    @pytest.mark.parametrize("text", ["", "1", "1@", "@1", "-1@2", "1@2@3", "a@b"])
    def test_a_place_is_a_partition_and_an_offset(self, text: str) -> None:
        """Somebody would replay another letter than meant."""
        with pytest.raises(ValueError, match="PARTITION@OFFSET"):
            Place.parse(text)


class TestListing:
    """What was set aside, and why: the first question after a bad night."""

    def test_a_letter_is_shown_with_all_that_is_known(self, world: World) -> None:
        """Whoever mends the agent needs the content and the reason, not a count."""
        headers = [("trace", b"1"), ("trace", b"\xff"), ("none", None)]
        [place] = world.put(world.letter(Came(value=b"\xff\x00", headers=headers), text="no text", attempts=3))
        [letter] = world.list().kept
        shown = json.loads(json.dumps(letter_document(letter)))
        assert shown.pop("time").endswith("Z")
        assert shown["headers"][:3] == [
            {"name": "trace", "value": {"text": "1"}},
            {"name": "trace", "value": {"base64": "/w=="}},
            {"name": "none", "value": None},
        ]
        del shown["headers"]
        assert shown == {
            "letter": {"partition": place.partition, "offset": place.offset},
            "from": {"topic": "transfers", "partition": 1, "offset": 7},
            "error": "invalid",
            "message": "no text",
            "attempts": 3,
            "replayed": False,
            "cut": None,
            "key": {"text": "alice"},
            "value": {"base64": "/wA="},
        }

    def test_filters_choose(self, world: World) -> None:
        """Ten thousand letters of a known trouble would hide the three of an unknown one."""
        old, new = (
            world.letter(Came(key=key), code)._replace(timestamp_ms=timestamp_ms)
            for key, code, timestamp_ms in ((b"old", "late", NOW_MS), (b"new", "invalid", NOW_MS + 60_000))
        )
        places = world.put(old, new, world.letter(Came("page-views"), "late")._replace(timestamp_ms=NOW_MS + 1))

        def chosen(**options: Any) -> list[Place]:
            return [letter.place for letter in world.list(Choice(**options)).kept]

        assert chosen() == [places[0], places[2], places[1]]
        assert chosen(topics=frozenset({"page-views"})) == [places[2]]
        assert chosen(errors=frozenset({"late"})) == [places[0], places[2]]
        assert chosen(errors=frozenset({"late"}), topics=frozenset({"transfers"})) == [places[0]]
        assert chosen(since_ms=NOW_MS + 1) == [places[2], places[1]]
        assert chosen(until_ms=NOW_MS + 1) == [places[0]]
        assert chosen(places=frozenset({places[1], Place(0, 999)})) == [places[1]]

    def test_all_are_counted_and_only_the_newest_kept(self, world: World) -> None:
        """A million letters must not fill the memory, nor hide how many they are."""
        times = [5, 1, 9, 3, 7]
        world.put(*(world.letter(Came(offset=ms), "late")._replace(timestamp_ms=NOW_MS + ms) for ms in times))
        listing = world.list(limit=2)
        assert [letter.timestamp_ms - NOW_MS for letter in listing.kept] == [7, 9]
        assert document(listing)["counts"] == [{"topic": "transfers", "error": "late", "letters": 5, "replayed": 0}]
        assert summary(listing) == "5 letters, the 2 newest shown"
        assert list(kinds(listing)) == ["transfers late: 5 letters, 0 replayed"]

    def test_uncommitted_letters_are_no_letters(self, world: World) -> None:
        """A letter of a batch that was dropped would be replayed although its event was handled."""
        producer = Producer({**world.address.librdkafka(), "transactional.id": f"{world.prefix}other"})
        producer.init_transactions(30)
        producer.begin_transaction()
        output = world.letter(Came())
        producer.produce(output.topic, output.value, output.key, headers=list(output.headers or ()))
        producer.flush(30)
        assert world.list().letters == 0
        producer.abort_transaction(30)
        assert world.list().letters == 0

    @pytest.mark.parametrize("width", [80, 100, 120])
    def test_the_table_fits_and_is_not_steered_by_what_it_shows(self, world: World, width: int) -> None:
        """A key that came from outside could clear the terminal, or forge a line of the table."""
        evil = b"\x1b[2Jkey\n[bold]not markup[/bold]" + b"x" * 500
        world.put(
            world.letter(Came("sensor-readings", offset=10**6, key=evil), "agent_error", "boom [/] \x1b[31m" * 50)
        )
        text = rendered(world.list(), width)
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text
        assert "\\x1b[2Jkey\\n[bold]not" in text
        assert "agent_error, 1 attempt" in text
        assert "sensor-readings[1]@1000000" in text

    def test_other_prefixes_have_other_letters(self, world: World, kafka_url: str) -> None:
        """Two deployments on one cluster would replay each other's letters."""
        world.put(world.letter(Came()))
        assert World(kafka_url).list().letters == 0

    def test_a_missing_topic_is_an_error_that_names_the_prefix(self, world: World) -> None:
        """A mistyped prefix would look like good news: no dead letters."""
        with pytest.raises(ConfigurationError, match="KAFKA_PREFIX"):
            Letters(world.address, Settings(kafka_prefix="absent-"))


class TestCommands:
    """As a person or a script runs them."""

    def test_list_replay_and_list(self, world: World) -> None:
        """The two commands are all that somebody on call has."""
        world.put(world.letter(Came(), "invalid", "amount is 0", 2), world.letter(Came("gone", 2, 9), "late"))
        done = world.run("list", "--json", "--error", "invalid", "--since", "1h")
        assert done.returncode == 0, done.stderr
        [letter] = json.loads(done.stdout)["letters"]
        assert (letter["from"]["topic"], letter["replayed"]) == ("transfers", False)
        done = world.run("replay", "--all", "--dry-run")
        assert "1 letter would be sent back" in done.stdout
        assert (done.returncode, world.read()) == (1, [])
        done = world.run("replay", "--topic", "transfers")
        assert (done.returncode, "1 letter sent back" in done.stdout) == (0, True), done.stdout + done.stderr
        done = world.run("replay", "--all", "--yes")
        assert done.returncode == 1
        assert "nothing to send back" in done.stdout
        assert "the topic it came from does not exist" in done.stdout
        done = world.run("list")
        assert done.returncode == 0
        for text in ("transfers[1]@7", "key alice", "invalid, 2 attempts", "amount is 0", "replayed"):
            assert text in done.stdout
        assert "transfers invalid: 1 letter, 1 replayed\n" in done.stdout
        assert len(world.read()) == 1

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["replay"], "--all"),
            (["replay", "--limit", "5"], "--all"),
            (["replay", "--all", "--error", "late"], "--all"),
            (["replay", "5"], "PARTITION@OFFSET"),
            (["list", "--since", "yesterday"], "how long ago"),
            (["list", "--since", "1m", "--until", "2m"], "no time in between"),
            (["list", "--limit", "0"], "--limit"),
        ],
    )
    def test_wrong_usage_is_said_before_kafka_is_asked(self, world: World, arguments: list[str], says: str) -> None:
        """A forgotten filter would send back everything."""
        world.put(world.letter(Came()))
        done = world.run(*arguments)
        assert (done.returncode, says in done.stderr) == (2, True), done.stdout + done.stderr
        assert world.read() == []
