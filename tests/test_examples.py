"""Faust's well-known examples, with little more than another import: each keeps its guarantee over a kill."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest

from tests.apps.aggregation import EXPIRES_S, SIZE_S
from tests.rig import Rig, rig, wait_until

Records: TypeAlias = list[tuple[str, dict[str, Any]]]
#: Tables, by name, as they are when all input was counted once.
Tables: TypeAlias = Mapping[str, Mapping[str, float]]
COUNT = 600


class Example(NamedTuple):
    """What an example reads and makes."""

    app: str
    group: str
    #: Topics that it reads; the first gets the input.
    reads: list[str]
    output: str
    records: Callable[[int], Records]
    #: Ids of the outputs that records make, and the tables.
    outputs: Callable[[Records], set[str]]
    tables: Callable[[Records], Tables]
    id_of: Callable[[dict[str, Any]], str] = lambda output: str(output["id"])
    headers: bool = False


def posts(count: int) -> Records:
    return [(f"u{n % 9}", {"id": n, "text": f"w{n % 5} w{n % 7 + 5} w{n % 11 + 12}"}) for n in range(count)]


def words_of(records: Records) -> list[tuple[int, str]]:
    return [(post["id"], word) for _, post in records for word in post["text"].split()]


def views(count: int) -> Records:
    return [
        (f"u{n % 9}", {"id": f"v{n}", "user": f"u{n % 9}", "page": f"/{n % 13}", "at": 1_700_000_000.0 + n})
        for n in range(count)
    ]


def withdrawals(count: int) -> Records:
    return [
        (f"u{n % 9}", {"id": str(n), "user": f"u{n % 9}", "country": "ABCDE"[n % 5], "amount": n % 10 + 0.5})
        for n in range(count)
    ]


def summed(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(int)
    for key, amount in pairs:
        sums[key] += amount
    return sums


def factors(count: int) -> Records:
    return [(f"k{n % 9}", {"id": str(n), "x": n, "y": 3}) for n in range(count)]


WORD_COUNT = Example(
    "word_count",
    "words",
    ["posts", "words"],
    "counted",
    posts,
    lambda records: {f"{post}/{word}" for post, word in words_of(records)},
    lambda records: {"word-counts": Counter(word for _, word in words_of(records))},
)
PAGE_VIEWS = Example(
    "page_views",
    "views",
    ["page-views", "tests.apps.page_views.count_page_views-page-views-PageView.page-repartition"],
    "views",
    views,
    lambda records: {view["id"] for _, view in records},
    lambda records: {"page-views": Counter(view["page"] for _, view in records)},
)
WITHDRAWALS = Example(
    "withdrawals",
    "withdrawals",
    ["withdrawals", "tests.apps.withdrawals.track_country_withdrawal-withdrawals-Withdrawal.country-repartition"],
    "totals",
    withdrawals,
    lambda records: {f"{by} {each['id']}" for _, each in records for by in ("user", "country")},
    lambda records: {
        f"{by}-to-total": summed((each[by], each["amount"]) for _, each in records) for by in ("user", "country")
    },
)
MULTIPLYING = Example(
    "multiplying",
    "multiplying",
    ["questions"],
    "answers",
    factors,
    lambda records: {f"about {each['id']}: {each['x'] * each['y']}" for _, each in records},
    lambda records: {"asked": Counter(key for key, _ in records)},
    lambda answer: f"{answer['correlation_id']}: {answer['value']}",
    headers=True,
)


def send(made: Rig, example: Example, records: Records) -> None:
    if not example.headers:
        made.put(example.reads[0], records)
        return
    for record in records:
        asks = {"Faust-Ag-ReplyTo": example.output, "Faust-Ag-CorrelationId": f"about {record[1]['id']}"}
        made.put(example.reads[0], [record], asks)


def found(made: Rig, example: Example) -> Counter[str]:
    return Counter(example.id_of(json.loads(message.value())) for message in made.read(example.output))


def keeps(kafka_url: str, folder: Path, example: Example, guarantee: str) -> None:
    """Run it, kill it amid its work, let another one go on; then look at outputs and tables."""
    with rig(kafka_url, folder, GUARANTEE=guarantee) as made:
        made.app = f"tests.apps.{example.app}"
        made.create_topics(*example.reads, example.output)
        records = example.records(COUNT)
        worker = made.worker().wait_started()
        send(made, example, records[: COUNT // 2])
        wait_until(lambda: len(made.read(example.output)) > COUNT // 10, "some are done")
        worker.kill()
        made.worker().wait_started()
        send(made, example, records[COUNT // 2 :])
        made.wait_consumed(120, example.reads, example.group)
        made.stop()
        check(made, example, records, guarantee)


def check(made: Rig, example: Example, records: Records, guarantee: str) -> None:
    outputs, expected = found(made, example), example.outputs(records)
    assert not made.read("dead-letters")
    if guarantee == "exactly_once":
        assert outputs == Counter(expected)
    elif guarantee == "at_least_once":
        assert outputs.keys() == expected
    else:
        assert outputs.keys() <= expected
        assert max(outputs.values()) == 1
        assert len(outputs) > len(expected) / 3
    for name, rows in example.tables(records).items():
        changelog = made.changelog(f"{example.group}-{name}-changelog")
        kept = {json.loads(key) if key[:1] == b'"' else key.decode(): float(value) for key, value in changelog.items()}
        if guarantee == "at_most_once":
            assert all(value <= rows[key] for key, value in kept.items())
        else:
            assert kept == rows


@pytest.mark.parametrize(
    ("example", "guarantee"),
    [
        (WORD_COUNT, "at_least_once"),
        (PAGE_VIEWS, "at_most_once"),
        (WITHDRAWALS, "exactly_once"),
        (MULTIPLYING, "exactly_once"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.app,
)
def test_an_example_of_faust_keeps_its_guarantee(
    kafka_url: str, tmp_path: Path, example: Example, guarantee: str
) -> None:
    """What somebody tries first must not be what is broken."""
    keeps(kafka_url, tmp_path, example, guarantee)


@pytest.mark.prove
@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once", "at_most_once"])
@pytest.mark.parametrize("example", [WORD_COUNT, PAGE_VIEWS, WITHDRAWALS, MULTIPLYING], ids=lambda each: each.app)
def test_an_example_of_faust_keeps_each_guarantee(
    kafka_url: str, tmp_path: Path, example: Example, guarantee: str
) -> None:
    """The code is the same; what a crash may do to it is what the app was told."""
    keeps(kafka_url, tmp_path, example, guarantee)


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_a_windowed_aggregation_tells_each_window_that_closes(kafka_url: str, tmp_path: Path, guarantee: str) -> None:
    """Stock Faust loses the windows that were open when a worker died, and those that close during a rebalance."""
    with rig(kafka_url, tmp_path, GUARANTEE=guarantee) as made:
        made.app = "tests.apps.aggregation"
        made.create_topics("raw", "aggregates")
        records = [
            (f"s{n % 3}", {"id": n, "sensor": f"s{n % 3}", "value": n % 50, "at": 1_700_000_000.0 + n / 4})
            for n in range(900)
        ]
        worker = made.worker().wait_started()
        made.put("raw", records[:500])
        wait_until(lambda: len(made.read("aggregates")) > 9, "some windows have closed")
        worker.kill()
        made.worker().wait_started()
        made.put("raw", records[500:])
        made.wait_consumed(120, ["raw"], "aggregation")
        made.stop()
        collected: dict[str, list[int]] = defaultdict(list)
        newest: dict[int, float] = defaultdict(float)
        partition_of = {message.key().decode(): message.partition() for message in made.read("raw")}
        ends: dict[str, tuple[int, float]] = {}
        for sensor, each in records:
            start_s = each["at"] // SIZE_S * SIZE_S
            window = f"{sensor} {start_s:.0f}"
            collected[window].append(each["value"])
            ends[window] = partition_of[sensor], start_s + SIZE_S
            newest[partition_of[sensor]] = each["at"]
        closed = {window for window, (partition, end_s) in ends.items() if end_s + EXPIRES_S <= newest[partition]}
        told = [json.loads(message.value()) for message in made.read("aggregates")]
        assert {each["id"] for each in told} == closed
        assert guarantee == "at_least_once" or len(told) == len(closed)
        for each in told:
            values = collected[each["id"]]
            assert (each["count"], each["mean"]) == (len(values), sum(values) / len(values))
