"""What the page makes of what it is told, in a browser, without Kafka: large numbers, old ones, and nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from streams_app.dashboard import _PAGE
from tests.browser import Page, browser
from tests.test_dashboard import needs_chromium

GUARANTEES = {"exactly_once": "transfers", "at_least_once": "page-views", "at_most_once": "sensor-readings"}
#: What is wider than its box; names are cut, and tables scroll, on purpose.
WIDER = """[...document.querySelectorAll('body *')].filter(e => e.offsetParent && e.clientWidth
  && e.scrollWidth > e.clientWidth + 1 && !e.matches('.cell b, .engines'))
  .map(e => `${e.tagName} ${e.className}: ${e.textContent.slice(0, 40)}`)"""


class Told:
    """What the page is told, once a tenth of a second; tests change it."""

    def __init__(self) -> None:
        self.process = {"worker": "one", "pid": 1, "started_ms": 1, "engines": {}}
        self.judged: dict[str, Any] = {"behind_s": 2.0, "trouble": "", "anomalies": {}}
        self.cards: dict[str, dict[str, Any]] = {name: {} for name in GUARANTEES}
        self.letters: list[dict[str, Any]] = []
        self.reasons: list[tuple[str, str, int]] = []
        self.history: list[Any] = []
        self.url = ""

    def state(self) -> dict[str, Any]:
        """As `Board.document` makes it."""
        now_ms = int(time.time() * 1000)
        judged = {"at_ms": now_ms, "records": 10, "records_per_s": 1.0, "remarks": [], "recent": [], **self.judged}
        return {
            "now_ms": now_ms,
            "seen_ms": now_ms,
            "remark": "",
            "trouble": "",
            "process": self.process,
            "guarantees": [self.card(name) for name in GUARANTEES],
            "marks": [],
            "letters": self.letters,
            "reasons": self.reasons,
            "judged": judged,
        }

    def card(self, name: str) -> dict[str, Any]:
        partition = {"topic": GUARANTEES[name], "worker": "one", "committed": 10, "end": 10}
        member = {"worker": "one", "member_id": "m", "host": "h", "partitions": 4}
        return {
            "guarantee": name, "app_id": name, "title": "Money", "unit": "events", "promise": "Nothing is lost.",
            "rate": 10.0, "lag": 0, "state": "STABLE", "members": [member],
            "partitions": [{**partition, "number": number} for number in range(4)],
            "reported": 0 if name == "at_most_once" else None, "in_hand": 0, "lost": 0, "repeated": 0, "set_aside": 0,
            "latency": {"p50": 20, "p99": 40}, "figures": [], **self.cards[name],
        }  # fmt: skip

    async def events(self, request: web.Request) -> web.StreamResponse:
        """As ``GET /events``."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"event: history\ndata: " + json.dumps(self.history).encode() + b"\n\n")
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(b"event: state\ndata: " + json.dumps(self.state()).encode() + b"\n\n")
                await asyncio.sleep(0.1)
        return response


async def index(_request: web.Request) -> web.StreamResponse:
    return web.FileResponse(_PAGE / "index.html")


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    """A server of the page, and of what it is told."""
    made = Told()
    app = web.Application()
    app.router.add_get("/", index)
    app.router.add_static("/dashboard", _PAGE)
    app.router.add_get("/events", made.events)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
        yield made
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def opened(told: Told, folder: Path, width: int = 1280, *, phone: bool = False) -> AsyncIterator[Page]:
    async with browser(folder / "chromium") as page:
        await page.look_like(width, 900, phone=phone)
        await page.open(told.url)
        await page.wait("document.body.dataset.connection === 'live'", "the page is live")
        yield page


@needs_chromium
@pytest.mark.parametrize(
    "judged",
    [{"trouble": "Kafka does not answer"}, {"behind_s": 600.0}, {"behind_s": None}],
    ids=["troubled", "behind", "not there yet"],
)
async def test_nothing_is_said_to_hold_that_nobody_judges(told: Told, tmp_path: Path, judged: dict[str, Any]) -> None:
    """A green tick is what people look at; words beside it that take it back are read by nobody."""
    good = "document.getElementById('verdict').className === 'verdict good'"
    dimmed = "document.querySelector('.cards.behind')"
    async with opened(told, tmp_path) as page:
        await page.wait(good, "all is well")
        assert await page.ask(f"{dimmed} === null")
        told.judged.update(judged)
        await page.wait(f"!({good}) && {dimmed} !== null", "all was well")
        assert "holds" not in await page.ask("document.getElementById('verdict').innerText")


@needs_chromium
async def test_more_lost_than_reported_is_no_guarantee_that_holds(told: Told, tmp_path: Path) -> None:
    """What a worker has in hand when it dies is reported by its successor: until then it is no breach."""
    told.cards["at_most_once"] = {"lost": 5, "reported": 3, "in_hand": 2}
    box = "document.querySelector('[data-figure=\"at_most_once.lost\"]').parentElement"
    async with opened(told, tmp_path) as page:
        await page.wait("document.getElementById('verdict').className === 'verdict good'", "five may be lost")
        told.cards["at_most_once"]["lost"] = 6
        await page.wait(f"{box}.className === 'broken'", "six may not")
        assert "more than 5 reported" in await page.ask(f"{box}.innerText")
        assert await page.ask("document.getElementById('verdict').className") == "verdict"


@needs_chromium
@pytest.mark.parametrize("phone", [False, True])
async def test_large_numbers_and_long_names_stay_in_their_places(told: Told, tmp_path: Path, phone: bool) -> None:
    """Numbers grow, and hosts of containers have long names; a page that is tried in its first minute shows neither."""
    for card in told.cards.values():
        card.update(
            {"lost": 987_654, "repeated": 164_475, "set_aside": 1_234_567, "rate": 123_456.0, "lag": 98_765_432}
        )
        worker, topic = "3f2a9c1b7d10-and-more", "a-topic-with-a-name"
        card["partitions"] = [
            {"topic": topic, "worker": worker, "committed": 10, "end": 123_456_789, "number": number}
            for number in range(8)
        ]
        card["members"] = [{"worker": worker, "member_id": "m", "host": "h", "partitions": 8}]
    told.cards["exactly_once"]["figures"] = [
        {"name": "All balances", "value": {"EUR": str(-(2**70)), "USD": "0"}, "zero": True}
    ]
    told.reasons = [("transfers", "a-reason-without-a-place-to-break" * 2, 123_456)]
    counts = dict.fromkeys(
        ("events", "batches", "rebalances", "dead_letters", "given_up", "dropped_batches"), 123_456_789
    )
    engine = {"counts": counts, "dropped": {"commit_unconfirmed": 2}, "troubles": {}}
    told.process["engines"] = dict.fromkeys(GUARANTEES, engine)
    async with opened(told, tmp_path, 390 if phone else 1280, phone=phone) as page:
        await page.wait("document.querySelectorAll('.card').length === 3", "three cards")
        assert await page.ask("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls to the side"
        assert await page.ask(WIDER) == []
        value = "document.querySelector('[data-figure=\"exactly_once.set_aside\"]')"
        assert await page.ask(f"{value}.textContent + ' ' + {value}.title") == "1.23M 1,234,567"
        colours = "[...document.querySelectorAll('.figures [data-label]')].map(e => getComputedStyle(e).color)"
        assert len(set(await page.ask(colours))) == 2, "what is 0 is not wrong because something else is"


@needs_chromium
async def test_nonsense_is_shown_as_such_and_stops_nothing(told: Told, tmp_path: Path) -> None:
    """Producers stamp their records; some do it in nanoseconds."""
    letter = {
        "topic": "t",
        "source": "t[0]@0",
        "place": "0@0",
        "key": "",
        "message": "m",
        "attempts": 1,
        "replayed": False,
    }
    told.letters = [{**letter, "at_ms": 1_700_000_000_000_000_000, "error": "ns"}]
    async with opened(told, tmp_path) as page:
        told.process["worker"] = "another"
        await page.wait("document.getElementById('from').innerText.includes('another')", "the page goes on")
        assert "ns" in await page.ask("document.getElementById('letters').innerText")
        told.cards["exactly_once"]["figures"] = [{"name": "broken", "value": "no number", "zero": False}]
        await page.wait("document.getElementById('notice').innerText.includes('reload')", "the page says so")
        told.cards["exactly_once"]["figures"] = []
        await page.wait("document.getElementById('notice').hidden", "it goes on")
        assert page.errors == []


@needs_chromium
async def test_only_the_same_worker_restarts(told: Told, tmp_path: Path) -> None:
    """Behind a router, the next answer may be another process's."""
    restarted = "document.getElementById('happened').innerText.includes('This page’s worker restarted')"
    async with opened(told, tmp_path) as page:
        told.process.update({"worker": "two", "pid": 2})
        await page.wait("document.getElementById('from').innerText.includes('two')", "it is another worker")
        assert not await page.ask(restarted)
        told.process["pid"] = 3
        await page.wait(restarted, "a restart")


@needs_chromium
async def test_what_is_not_known_is_drawn_as_a_gap(told: Told, tmp_path: Path) -> None:
    """A curve that begins with 0 shows a start that there was not."""
    now_ms = int(time.time() * 1000)
    figures = (None, None, None, None), (50.0, 5, 20, 40)
    told.history = [(now_ms - 1_000 * age, dict.fromkeys(GUARANTEES, figures[age <= 20])) for age in range(40, 0, -1)]
    told.cards = {name: {"rate": 50.0, "lag": 5} for name in GUARANTEES}
    async with opened(told, tmp_path) as page:
        path = await page.wait("document.querySelector('.chart .edge').getAttribute('d')", "a curve")
    heights = {float(point.partition(",")[2]) for point in path.replace("M", "L").split("L") if point}
    assert len(heights) == 1, path
