"""The documents that others rely on say what the code does."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest

from agents import analytics, ledger, sensors
from streams_app import app, at_least_once, at_most_once, health
from streams_app.dead_letters import TOPIC, dead_letter
from streams_app.errors import ExitCode
from streams_app.metrics import EngineFigures
from streams_app.settings import Settings
from tables.analytics import PageView, PageViewCount
from tables.ledger import Credit, Entry, Result, Transfer
from tables.sensors import Observation, Reading

CHECKOUT = Path(__file__).parent.parent
CONTRACT = (CHECKOUT / "docs" / "contract.md").read_text()
README = (CHECKOUT / "README.md").read_text()
FORMS = {
    "transfers": Transfer,
    "credits": Credit,
    "ledger": Entry,
    "transfer-results": Result,
    "sensor-readings": Reading,
    "sensor-observations": Observation,
    "page-views": PageView,
    "page-view-counts": PageViewCount,
}


def rows(text: str, columns: int) -> list[list[str]]:
    """The rows of a document's tables, by their cells."""
    found = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in found if len(row) == columns]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_topics_and_their_fields_are_those_of_the_contract() -> None:
    """A program of somebody else reads or writes them."""
    table = {names(topic)[0]: names(form) for topic, _, form in rows(CONTRACT, 3)}
    assert set(table) == {topic for each in app.family for topic in each.declared} == set(FORMS)
    for topic, form in FORMS.items():
        assert table[topic] == [field.name for field in msgspec.structs.fields(form)]


def test_each_guarantee_reads_its_inputs_in_a_group_of_its_own() -> None:
    """Whoever watches the lag of a group knows them by name."""
    assert {each.conf.id: each.guarantee for each in app.family} == {
        "streams-app": "exactly_once",
        "streams-app-at-least-once": "at_least_once",
        "streams-app-at-most-once": "at_most_once",
    }
    assert all(f"`{each.conf.id}`" in CONTRACT for each in app.family)
    readers = {ledger.debits: app, sensors.observe: at_most_once, analytics.count: at_least_once}
    assert all(agent.app is each for agent, each in readers.items())


def test_the_headers_of_dead_letters_are_those_of_the_contract() -> None:
    """Whoever repairs and replays them needs to know where they came from."""

    class Message:
        topic, partition, offset, key, value, headers = "t", 0, 1, b"k", b"v", [("own", b"x")]

    output = dead_letter("", Message(), "code", "text \ud800", 1)
    assert output.topic == TOPIC == "dead-letters"
    assert output.headers is not None
    written = [name for name, _ in output.headers]
    assert written[0] == "own"
    assert written[1:] == [name for name in names(CONTRACT) if name.startswith("dlq.")][: len(written) - 1]


def test_a_dead_letter_of_the_largest_record_fits() -> None:
    """It would abort the batch that carries it, for ever."""

    class Message:
        topic, partition, offset, key, value, headers = "t", 0, 1, b"k" * 500, b"v" * 1_000_000, None

    output = dead_letter("", Message(), "code", "text", 1)
    size_bytes = len(output.key or b"") + len(output.value or b"")
    assert 900_000 < size_bytes < 1_000_000
    assert ("dlq.cut", b"key or value") in (output.headers or ())


def test_a_dead_letter_of_a_record_with_huge_headers_fits() -> None:
    """Raised in the middle of a delivery, the error would end the worker, and its successor, and so on."""

    class Message:
        topic, partition, offset, key, value, headers = "t", 0, 1, b"k", b"v", [("h", b"x" * 999_000)]

    headers = dead_letter("", Message(), "code", "text", 1).headers
    assert headers is not None
    assert headers[0] == ("dlq.headers", b"dropped: too large")


def test_the_checks_of_the_ledger_have_the_order_of_the_contract() -> None:
    """Of two reasons the first one counts."""
    transfer = Transfer("id", "same", "same", 5, "EUR")
    assert ledger.decide(transfer, 0, None).reason == "same_account"
    remembered = ledger.decide(transfer, 0, None)
    assert ledger.decide(transfer, 0, remembered).status == "exists"


def test_the_readme_lists_every_setting_with_its_default() -> None:
    """A setting that nobody can find is none."""
    listed = {
        names(name)[0]: default.strip("`") for name, default, _ in rows(README, 3) if "_" in name or name == "`PORT`"
    }
    source = (CHECKOUT / "streams_app" / "settings.py").read_text()
    assert set(listed) == set(re.findall(r'"((?:KAFKA|STREAMS_APP|PORT)[A-Z_]*)"', source))
    defaults = Settings.from_env({})
    for field in fields(Settings):
        variable = f"STREAMS_APP_{field.name.upper()}"
        default = getattr(defaults, field.name)
        if isinstance(default, bool):
            assert listed[variable] == ("yes" if default else "no"), variable
        elif isinstance(default, int):
            assert listed[variable] == str(default), variable


def test_the_page_on_operations_lists_every_metric_reason_and_exit_code() -> None:
    """Whoever is called at night looks there."""
    operations = (CHECKOUT / "docs" / "operations.md").read_text()
    listed = {name for cell, *_ in rows(operations, 3) for name in names(cell)}
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name for family in EngineFigures(app).collect()
    }
    reasons = set(re.findall(r"^``(\w+)``", health.__doc__ or "", re.MULTILINE))
    assert listed == families | reasons
    written = re.findall(r"^\| (\d+) \|", operations, re.MULTILINE)
    assert written == [str(code.value) for code in ExitCode]


def test_the_pages_of_the_contract_exist() -> None:
    """Clients ask for them."""
    import agents.ledger_views  # noqa: F401, PLC0415 - its pages are served by its being there

    listed = {page.split()[1] for cell, _ in rows(CONTRACT, 2) for page in names(cell) if "/" in page}
    served = {resource.canonical for resource in app.web.web_app.router.resources()}
    assert len(listed) == 8
    assert listed <= {
        re.sub(r"{(\w+)}", lambda name: name[1].upper(), each).replace("ACCOUNT", "ID") for each in served
    }


@pytest.mark.parametrize("command", ["worker", "demo", "broker", "provision", "generate", "audit", "dead-letters"])
def test_the_commands_of_the_contract_exist(command: str) -> None:
    """Scripts call them."""
    from faust.cli.faust import cli  # noqa: PLC0415

    assert command in cli.commands
    assert f"`{command}`" in CONTRACT or f"`{command} NAME`" in README


def test_nothing_in_the_engine_knows_an_agent() -> None:
    """Whoever deletes our agents still has a working worker."""
    for module in (CHECKOUT / "streams_app").glob("*.py"):
        text = module.read_text()
        assert not re.search(r"^\s*(from|import) (agents|tables)\b", text, re.MULTILINE), module.name
    for module in (CHECKOUT / "tables").glob("*.py"):
        assert not re.search(r"^\s*(from|import) agents\b", module.read_text(), re.MULTILINE), module.name


@pytest.mark.parametrize(("document", "fewest"), [("traps.md", 20), ("migration.md", 10)])
def test_each_test_that_a_document_names_exists(document: str, fewest: int) -> None:
    """A trap without its test will catch us again."""
    found = re.findall(r"`(test_\w+\.py)::(\w+)", (CHECKOUT / "docs" / document).read_text())
    assert len(found) > fewest
    for file, test in found:
        assert f"def {test}(" in (CHECKOUT / "tests" / file).read_text(), test


def test_each_promise_of_the_readme_names_the_test_that_fails_when_it_is_broken() -> None:
    """Else it is a sentence like any other."""
    table = README[README.index("| | promise | its test |") :].split("\n\n")[0]
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    for row in rows:
        assert len(row) == 4, row
        found = re.findall(r'\[[^]]+\]\(tests/(test_\w+\.py) "(test_\w+)"\)', row[2])
        assert found, f"{row[1]} has no test"
        for file, test in found:
            assert f"def {test}(" in (CHECKOUT / "tests" / file).read_text(), test
    assert {row[0] for row in rows if row[0] != "|"} == {
        f"| **{each}**{of}"
        for each, of in (
            ("exactly once", ", for money"),
            ("at least once", ", for analytics"),
            ("at most once", ", for sensors"),
            ("all three", ""),
        )
    }


def test_no_environment_leaks_into_these_tests() -> None:
    """The app of these tests is the one without a prefix."""
    assert not os.environ.get("KAFKA_PREFIX")
