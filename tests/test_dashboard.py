"""The dashboard says what is true, goes on when workers die, and says so when it does not know."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import json
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

# They register the input.
import agents.analytics_input
import agents.ledger_input
import agents.sensors_input  # noqa: F401
import streams_app.dashboard
from streams_app import app
from streams_app.audit import AuditedApp
from streams_app.claims import Claim
from streams_app.dashboard import _PAGE, board
from streams_app.dashboard.board import Board
from streams_app.dashboard.cluster import Cluster, Group, Marks, Member, Partition, _reported
from streams_app.figures import Figures
from streams_app.generate import Feed, Plan
from streams_app.kafka import KafkaAddress
from streams_app.latency import Latencies
from tests.browser import Page, browser, chromium
from tests.rig import Rig, Worker, rig, wait_until
from tests.test_http import free_port

CHECKOUT = Path(__file__).parent.parent
INPUTS = ("transfers", "sensor-readings", "page-views")
OUTCOMES = ("lost", "repeated")
needs_chromium = pytest.mark.skipif(
    chromium() is None, reason="no Chromium on this machine: `apt-get install chromium`, or set CHROMIUM to its path"
)


class Site:
    """Workers with web servers."""

    def __init__(self, made: Rig) -> None:
        self.made = made
        self.ports: dict[str, int] = {}
        self.workers: dict[str, Worker] = {}

    def start(self, slot: str) -> Worker:
        """A worker, where it was before if it was."""
        port = self.ports.setdefault(slot, free_port())
        self.workers[slot] = self.made.worker(slot, PORT=str(port))
        return self.workers[slot]

    def url(self, slot: str) -> str:
        return f"http://127.0.0.1:{self.ports[slot]}/"

    def write(self, count: int, seed: int, rate: float | None = None) -> None:
        """Some of each input, at the same time."""
        address = KafkaAddress.parse(self.made.kafka_url)
        feeds = [Feed(Plan(name, count, rate, 200, seed), address, self.made.prefix) for name in INPUTS]
        with ThreadPoolExecutor(len(feeds)) as threads:
            for feed in [threads.submit(feed.run, Event()) for feed in feeds]:
                feed.result()

    def audit(self) -> dict[str, Any]:
        """The audit's verdict, at rest."""
        command = [sys.executable, "-m", "faust", "-A", "streams_app", "audit", "--json", "--wait", "60"]
        done = subprocess.run(command, env=self.made.env, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
        verdict: dict[str, Any] = json.loads(done.stdout)
        assert verdict["at_rest"]
        return verdict

    def figures(self, verdict: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """What the page has to say: by guarantee."""
        sections = {each["name"]: each["figures"] for each in verdict["sections"]}
        guarantees: dict[str, dict[str, Any]] = verdict["guarantees"]
        set_aside = {
            "exactly_once": sections["check ledger"]["ill-formed"],
            "at_least_once": sections["check page-views"]["set_aside"],
            "at_most_once": sections["check sensors"]["set_aside"],
        }
        return {
            name: {**{each: outcome[each] for each in OUTCOMES}, "set_aside": set_aside[name]}
            for name, outcome in guarantees.items()
        }


@pytest.fixture(scope="module")
def site(kafka_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two workers that have started, and something that was done."""
    with rig(kafka_url, tmp_path_factory.mktemp("dashboard")) as made:
        made.app = "streams_app"
        site = Site(made)
        for slot in ("one", "two"):
            site.start(slot)
        for worker in site.workers.values():
            worker.wait_started(3)
        site.write(500, seed=1)
        yield site


def states(port: int, timeout_s: float = 60.0) -> Generator[dict[str, Any]]:
    """What ``/events`` says of how everything stands."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    assert answer.status == HTTPStatus.OK
    assert answer.getheader("Content-Type") == "text/event-stream"
    deadline_s = time.monotonic() + timeout_s
    name = ""
    try:
        while time.monotonic() < deadline_s:
            line = answer.readline().decode().strip()
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: ") and name == "state":
                yield json.loads(line.removeprefix("data: "))
    finally:
        connection.close()


def outcomes(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {card["guarantee"]: {name: card[name] for name in (*OUTCOMES, "set_aside")} for card in state["guarantees"]}


def test_what_the_stream_says_equals_the_audit(site: Site) -> None:
    """Numbers that are nearly right are worse than none: somebody acts on them."""
    verdict = site.audit()
    expected = site.figures(verdict)
    last: dict[str, Any] = {}
    with contextlib.closing(states(site.ports["one"])) as following:
        for last in following:
            if outcomes(last) == expected and last["judged"]["behind_s"] is not None:
                break
    assert outcomes(last) == expected
    cards = {card["guarantee"]: card for card in last["guarantees"]}
    assert cards["at_most_once"]["reported"] == verdict["guarantees"]["at_most_once"]["reported"]
    ledgers = next(each["figures"] for each in verdict["sections"] if each["name"] == "check ledger")
    shown = {each["name"]: each["value"] for each in cards["exactly_once"]["figures"]}
    assert shown["All balances, and credits on their way"] == {name: str(sum) for name, sum in ledgers["sum"].items()}
    assert shown["Transfers posted"] == str(ledgers["posted"])
    assert [card["lag"] for card in last["guarantees"]] == [0, 0, 0]
    # Of all workers, whichever was asked.
    assert {member["worker"] for card in last["guarantees"] for member in card["members"]} == {"one", "two"}
    assert all(each["worker"] for card in last["guarantees"] for each in card["partitions"])
    assert sum(number for _, _, number in last["reasons"]) == sum(each["set_aside"] for each in expected.values())
    newest = last["letters"][0]
    assert newest["error"]
    assert newest["message"]
    assert newest["source"].startswith(newest["topic"])
    assert last["process"]["engines"]["exactly_once"]["counts"]["batches"] > 0


def test_a_process_of_one_guarantee_shows_all_three(site: Site) -> None:
    """The web process of a platform runs no ledger; its users want to see the money."""
    port = free_port()
    worker = site.made.worker("web", PORT=str(port), STREAMS_APP_GUARANTEES="at_most_once")
    wait_until(lambda: answers(port), "the web server answers")
    last: dict[str, Any] = {}
    with contextlib.closing(states(port)) as following:
        for last in following:
            if all(card["lost"] == 0 and card["rate"] is not None for card in last["guarantees"]):
                break
    assert [card["lost"] for card in last["guarantees"]] == [0, 0, 0]
    assert set(last["process"]["engines"]) == {"at_most_once"}
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0


def get(port: int, path: str) -> tuple[int, bytes, str]:
    """Status, body, and what the page is permitted to load."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("Content-Security-Policy") or ""


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return get(port, "/")[0] == HTTPStatus.OK
    return False


def test_an_open_page_does_not_hold_up_the_end_of_its_worker(site: Site) -> None:
    """Each deployment would wait until the platform kills the worker."""
    port = free_port()
    worker = site.made.worker("short", PORT=str(port), STREAMS_APP_GUARANTEES="at_most_once")
    wait_until(lambda: answers(port), "the web server answers")
    with contextlib.closing(states(port)) as following:
        next(following)
        wait_until(lambda: observers(worker.pid), "somebody looks at Kafka for the page")
        [observer] = observers(worker.pid)
        worker.signal(signal.SIGTERM)
        assert worker.wait(30) == 0
        wait_until(lambda: not Path(f"/proc/{observer}").exists(), "the process behind the page has ended", 10)


def observers(pid: int) -> list[int]:
    """The processes behind the page of a worker."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in children if b"observer" in Path(f"/proc/{each}/cmdline").read_bytes()]


def test_the_page_needs_nobody_else(site: Site) -> None:
    """A page that loads from other hosts tells them who looks, and runs what they send."""
    for path in _PAGE.iterdir():
        foreign = re.findall(r"https?://[^\s\"']+", path.read_text())
        assert set(foreign) <= {"http://www.w3.org/2000/svg"}, path
        status, body, policy = get(site.ports["one"], "/" if path.name == "index.html" else f"/dashboard/{path.name}")
        assert (status, body) == (HTTPStatus.OK, path.read_bytes())
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    for beside in ("/dashboard/nothing.js", "/dashboard/..%2f__init__.py"):
        assert get(site.ports["one"], beside)[0] == HTTPStatus.NOT_FOUND


# -- In a browser.


async def number(page: Page, figure: str) -> int | None:
    """A number as it stands on the page, with its separators."""
    text = await page.ask(f"document.querySelector('[data-figure=\"{figure}\"]')?.textContent ?? ''")
    return int(text.replace(",", "")) if re.fullmatch(r"[0-9,]+", text) else None


async def shown(page: Page, expected: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        guarantee: {name: await number(page, f"{guarantee}.{name}") for name in figures}
        for guarantee, figures in expected.items()
    }


@needs_chromium
async def test_the_numbers_on_the_page_equal_the_audits_and_go_on_through_a_kill(site: Site, tmp_path: Path) -> None:
    """The one moment that somebody looks at the page for is the one in which something dies."""
    async with browser(tmp_path / "chromium") as page:
        await page.look_like(1280, 900)
        await page.open(site.url("one"))
        await page.wait("document.body.dataset.connection === 'live'", "the page is live")
        before = (await number(page, "exactly_once.set_aside")) or 0
        writing = asyncio.create_task(asyncio.to_thread(site.write, 3_000, 2, 600.0))
        await asyncio.to_thread(wait_until, lambda: len(site.made.read("transfer-results")) > 600, "work is done")
        site.workers["two"].kill()
        await page.wait("document.querySelector('#happened .gone')?.textContent.includes('two is gone')", "the kill")
        await page.wait("document.querySelector('.chart .mark.worker') !== null", "the kill is marked in the charts")
        assert await page.ask("document.body.dataset.connection") == "live"
        await writing
        expected = site.figures(await asyncio.to_thread(site.audit))
        assert expected["exactly_once"]["set_aside"] > before, "input with something wrong in it"
        deadline_s = time.monotonic() + 60
        while (seen := await shown(page, expected)) != expected:
            assert time.monotonic() < deadline_s, (seen, expected)
            await asyncio.sleep(0.3)
        await page.wait("document.getElementById('verdict').className === 'verdict good'", "the verdict is good")
        sums = await page.ask("[...document.querySelectorAll('.figures .zero [data-label]')].map(e => e.textContent)")
        assert sums
        assert all(text.endswith("0") and "−" not in text for text in sums)
        assert not await page.ask(
            "[...document.querySelectorAll('.cell b')].filter(e => e.textContent !== 'one').length"
        )
        site.start("two")
        await page.wait("document.getElementById('happened').textContent.includes('two joined')", "two is back")
        rows = await page.ask("[...document.querySelectorAll('#engines tbody th')].map(e => e.textContent)")
        assert {"Events handled", "Commits", "Set aside"} <= {*rows}
        failed = await page.ask("[...document.querySelectorAll('#engines .trouble th')].map(e => e.textContent)")
        assert all(row.startswith(("Dropped: ", "Tried anew: ")) for row in failed)
        assert page.errors == []
    site.workers["two"].wait_started(3)


@needs_chromium
async def test_the_page_says_so_when_its_stream_is_cut_and_when_it_is_back(site: Site, tmp_path: Path) -> None:
    """Figures that stand still look like a quiet day."""
    async with browser(tmp_path / "chromium") as page:
        await page.look_like(1280, 900)
        await page.open(site.url("two"))
        await page.wait("document.body.dataset.connection === 'live'", "the page is live")
        assert await page.ask("document.getElementById('notice').hidden")
        known = await number(page, "exactly_once.set_aside")
        site.workers["two"].kill()
        await page.wait("document.body.dataset.connection === 'cut'", "the page says that it is cut")
        said = await page.wait("document.getElementById('notice').innerText", "a notice")
        assert re.search(r"cut since \d\d:\d\d:\d\d .*trying again", said), said
        assert "holds" not in await page.ask("document.getElementById('verdict').innerText"), "nobody knows that now"
        # What was known is still there, and looks stale.
        assert await number(page, "exactly_once.set_aside") == known
        assert float(await page.ask("getComputedStyle(document.querySelector('.outcome')).opacity")) < 1
        site.start("two").wait_started(3)
        await page.wait("document.body.dataset.connection === 'live'", "the page is live again")
        assert await page.ask("document.getElementById('notice').hidden")
        await page.wait(
            "document.getElementById('happened').innerText.includes('This page’s worker restarted')", "a mark"
        )


@needs_chromium
async def test_the_page_is_read_on_a_phone_in_the_dark_and_by_keyboard(site: Site, tmp_path: Path) -> None:
    """Whoever is called at night has a phone in the hand, and no mouse."""
    async with browser(tmp_path / "chromium") as page:
        await page.look_like(390, 844, dark=True, phone=True)
        await page.open(site.url("one"))
        await page.wait("document.body.dataset.connection === 'live'", "the page is live")
        await page.wait("document.querySelectorAll('.card').length === 3", "three cards")
        assert await page.ask("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls to the side"
        lefts = await page.ask("[...document.querySelectorAll('.card')].map(e => e.getBoundingClientRect().left)")
        assert len(set(lefts)) == 1, "one column"
        assert await page.ask("getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 23)"
        await page.press("Tab")
        assert await page.ask("document.activeElement.className") == "skip"
        await page.press("Enter")
        await page.press("Tab")
        assert await page.ask("document.activeElement.getAttribute('class')") == "chart"
        await page.press("ArrowLeft")
        assert re.search(
            r"throughput: \d\d:\d\d:\d\d", await page.ask("document.activeElement.getAttribute('aria-label')")
        )
        for scheme in (True, False):
            await page.look_like(390, 844, dark=scheme, phone=True)
            assert await page.ask(CONTRAST) == []
        assert page.errors == []


#: Texts whose colour is too close to that of their ground (WCAG AA: 4.5 : 1).
CONTRAST = """(() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const linear = (c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = numbers(text).slice(0, 3).map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if ((numbers(color)[3] ?? 1) > 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.offsetParent) continue;
    const [one, other] = [light(getComputedStyle(node).color), light(ground(node))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (other + 0.05);
    if (ratio < 4.5) found.push(`${node.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return found;
})()"""


# -- Without Kafka.


@pytest.fixture
async def lonely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Board]:
    """The board of an app whose Kafka is out of reach."""
    monkeypatch.setattr(board, "_LINGER_S", 0.0)
    monkeypatch.setenv("STREAMS_APP_DATADIR", str(tmp_path))
    nowhere = SimpleNamespace(
        kafka=KafkaAddress.parse(f"kafka://127.0.0.1:{free_port()}"),
        settings=replace(app.settings, datadir=tmp_path),
        family=app.family,
        conf=app.conf,
    )
    made = Board(nowhere, started_ms=0)  # type: ignore[arg-type]
    await made.start()
    yield made
    await made.stop()


async def test_nobody_looks_at_kafka_while_nobody_looks_at_the_page(lonely: Board) -> None:
    """A worker would pay for a page that nobody has open."""
    assert lonely._process is None
    async with contextlib.aclosing(lonely.messages()) as messages:
        assert (await anext(messages)).startswith(b"event: history\ndata: []")
        await until(lambda: lonely._process is not None, "it was started")
        process = lonely._process
    assert process is not None
    await asyncio.wait_for(process.wait(), 20)
    await until(lambda: lonely._process is None, "nobody looks any more")


async def test_kafka_out_of_reach_is_said(lonely: Board) -> None:
    """The page would show dashes, and nobody would know why."""
    async with contextlib.aclosing(lonely.messages()) as messages:
        async for message in messages:
            state = json.loads(message.partition(b"data: ")[2])
            if state and state["trouble"]:
                break
    assert "Kafka does not answer as it should" in state["trouble"]
    assert state["seen_ms"] == 0
    assert {card["lost"] for card in state["guarantees"]} == {None}


async def test_an_observer_that_dies_is_started_again(lonely: Board) -> None:
    """A client library that crashes would leave the page with old figures for ever."""
    async with contextlib.aclosing(lonely.messages()) as messages:
        await anext(messages)
        await until(lambda: lonely._process is not None, "it was started")
        first = lonely._process
        assert first is not None
        first.kill()
        await until(lambda: lonely._process not in {None, first}, "another one was started")


async def test_a_machine_without_room_for_another_process_keeps_its_worker(
    lonely: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To open a page would end what it was to show."""
    tried = []

    async def refused(*_args: Any, **_kwargs: Any) -> None:
        tried.append(1)
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(board, "_RETRY_S", 0.01)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", refused)
    async with contextlib.aclosing(lonely.messages()) as messages:
        await anext(messages)
        await until(lambda: len(tried) > 1, "it was tried again")
        assert lonely.crash_reason is None
        monkeypatch.undo()
        await until(lambda: lonely._process is not None, "it was started at last")


async def test_a_page_that_sleeps_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep its place among those who look, and hold up the end of its worker."""
    monkeypatch.setattr(streams_app.dashboard, "_SLEEPS_S", 0.01)
    cut: list[str] = []
    request: Any = SimpleNamespace(transport=SimpleNamespace(abort=lambda: cut.append("off")))
    response: Any = SimpleNamespace(write=lambda _message: asyncio.Event().wait())
    with pytest.raises(TimeoutError):
        await streams_app.dashboard._write(response, request, b"")
    assert cut == ["off"]


async def until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.02)


def group(state: str = "STABLE", **held: tuple[str, int]) -> Group:
    """Workers with their member ids and numbers of partitions."""
    members = [Member(worker, member_id, "host", count) for worker, (member_id, count) in held.items()]
    owners = [worker for worker, (_, count) in held.items() for _ in range(count)]
    partitions = [Partition("input", number, worker, 0, 0) for number, worker in enumerate(owners)]
    return Group("exactly_once", "app", state, members, partitions, {}, None)


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ([group(a=("a1", 2), b=("b1", 2))], []),
        ([group(a=("a1", 4))], [("left", "b"), ("rebalance", "")]),
        ([group(a=("a1", 2), b=("b1", 1), c=("c1", 1))], [("joined", "c"), ("rebalance", "")]),
        ([group(a=("a1", 2), b=("b2", 2))], [("restarted", "b"), ("rebalance", "")]),
        ([group(a=("a1", 1), b=("b1", 3))], [("rebalance", "")]),
        (
            [
                group("PREPARING_REBALANCING", a=("a1", 0)),
                group("COMPLETING_REBALANCING", a=("a1", 0)),
                group(a=("a1", 4)),
            ],
            [("rebalance", ""), ("left", "b")],
        ),
        (
            [group("EMPTY"), group(a=("a2", 2), b=("b2", 2))],
            [("left", "a"), ("left", "b"), ("rebalance", ""), ("joined", "a"), ("joined", "b"), ("rebalance", "")],
        ),
    ],
)
def test_what_happened_in_a_group_is_told_once(after: list[Group], told: list[tuple[str, str]]) -> None:
    """A chart with too many marks says as little as one without."""
    marks = Marks()
    marks.note([group(a=("a1", 2), b=("b1", 2))], 1)
    for at_ms, each in enumerate(after, 2):
        marks.note([each], at_ms)
        marks.note([each], at_ms)
    assert [(mark.kind, mark.worker) for mark in marks.latest] == told


def test_what_failed_in_an_engine_is_told_by_its_reason_and_nothing_else_is_called_a_failure() -> None:
    """Commits were once shown as failures, as somebody had begun to count outputs."""
    figures = Figures()
    figures["batches"], figures["outputs"] = 7, 9
    figures.drop("partitions_lost")
    figures.troubles["kafka_unreachable"] += 2
    told = board._engine(figures)
    assert told["counts"]["batches"] == 7
    assert told["counts"]["dropped_batches"] == 1
    assert (told["dropped"], told["troubles"]) == ({"partitions_lost": 1}, {"kafka_unreachable": 2})
    words = (_PAGE / "panels.js").read_text().partition("const COUNTED = {")[2].partition("};")[0]
    assert set(re.findall(r"(\w+): \"", words)) == set(told["counts"])


def test_rates_are_of_two_looks_however_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kafka that is slow to answer would be shown as one in which nothing moves, and a topic made anew as a plunge."""
    clock_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock_s)
    cluster = Cluster.__new__(Cluster)
    cluster._samples, cluster._prefix = deque(), "p-"
    told = []
    for clock_s, offset in ((0.0, 10), (5.0, 5_010), (10.0, 10_010), (15.0, 0)):  # noqa: B007 - read by the clock
        told.append(cluster._rates({("p-topic", 0): offset}))
    assert told == [None, {"topic": 1_000.0}, {"topic": 1_000.0}, {"topic": 0.0}]


def test_what_a_member_has_in_hand_is_told_beside_what_was_reported() -> None:
    """When it dies, that is lost before its group knows."""
    audited = AuditedApp("app", (), (), "at_most_once")
    claims = {("t", 0): (30, Claim("alive", 20, 1).text), ("t", 1): (9, Claim("dead", 4, 2).text), ("t", 2): (5, "")}
    assert _reported(audited, claims, {"alive"}) == (1 + 2 + 5, 10)
    assert _reported(audited._replace(guarantee="exactly_once"), claims, {"alive"}) == (None, 0)


def test_latencies_are_those_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that is opened on a long history would call its latencies those of today."""
    monkeypatch.setattr(time, "time", lambda: 100.0)
    latencies = Latencies()
    for answered_ms in (80_000, 95_000, 99_000, 150_000):
        latencies.add(answered_ms - 20 if answered_ms > 90_000 else 0, answered_ms)
    assert latencies.figures() == {"p50": 20, "p99": 20}


def test_amounts_of_any_size_keep_their_digits() -> None:
    """JavaScript's numbers end at 2^53: a sum beyond it would be shown as another one."""
    assert board._as_text({"EUR": 2**70}) == {"EUR": str(2**70)}
    assert msgspec.json.decode(msgspec.json.encode(board._as_text(-(2**64)))) == str(-(2**64))
