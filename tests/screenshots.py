"""Pictures of the dashboard for the docs: at rest, under load, during a kill; light, dark, on a phone.

Run by ``scripts/screenshots``. Nothing is staged but the kill: Kafka, workers and input are real, and so are the numbers.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

# They register the input.
import agents.analytics_input
import agents.ledger_input
import agents.sensors_input  # noqa: F401
from streams_app.embedded import EmbeddedKafka, free_port
from streams_app.generate import Feed, Plan
from streams_app.kafka import KafkaAddress
from tests.browser import Page, browser, chromium
from tests.rig import Rig, rig

FOLDER = Path(__file__).parent.parent / "docs" / "dashboard"
INPUTS = ("transfers", "sensor-readings", "page-views")
RATE = 250.0
LOAD_S, DRAINED_S = 50.0, 60.0
MOST_BYTES = 200_000


DONE = "[...document.querySelectorAll('[data-figure$=\".lag\"]')].every(node => node.textContent === '0')"


class View(NamedTuple):
    """A way to look at the page."""

    name: str
    width: int = 1280
    height: int = 980
    dark: bool = False
    phone: bool = False
    #: Where the picture begins.
    at: str = "body"


LIGHT, DARK = View("light"), View("dark", dark=True)
PHONE, PHONE_DARK = View("phone", 390, 844, phone=True), View("phone-dark", 390, 844, dark=True, phone=True)


def below(view: View) -> View:
    """The panels below the cards."""
    return view._replace(name=f"{view.name}-below", height=760, at=".columns")


async def take(page: Page, state: str, *views: View) -> None:
    """Pictures of how the page looks now."""
    for view in views:
        await page.look_like(view.width, view.height, dark=view.dark, phone=view.phone)
        await page.ask(f"document.querySelector({view.at!r}).scrollIntoView()")
        await asyncio.sleep(0.3)
        picture = await page.picture(whole=False)
        assert len(picture) < MOST_BYTES, f"{state}-{view.name} has {len(picture)} bytes"
        name = FOLDER / f"{state}-{view.name}.png"
        name.write_bytes(picture)
        print(f"{name.name}: {len(picture) // 1000} kB", flush=True)


@contextmanager
def flowing(made: Rig) -> Iterator[None]:
    """Input, until the end of the ``with``."""
    stop, address = Event(), KafkaAddress.parse(made.kafka_url)
    feeds = [Feed(Plan(name, rate=RATE, keys=200, seed=7), address, made.prefix) for name in INPUTS]
    threads = [Thread(target=feed.run, args=(stop, lambda *_: None)) for feed in feeds]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


async def tell(made: Rig, ports: dict[str, int], page: Page) -> None:
    """The story."""
    await page.look_like(LIGHT.width, LIGHT.height)
    await page.open(f"http://127.0.0.1:{ports['worker-a']}/")
    with flowing(made):
        await page.wait("document.getElementById('verdict').className === 'verdict good'", "it is judged")
        await asyncio.sleep(LOAD_S)
        await take(page, "load", LIGHT, below(LIGHT), DARK, PHONE, PHONE_DARK)
        made.workers[1].kill()
        await page.wait("document.querySelector('#happened .gone') !== null", "the kill is seen")
        await asyncio.sleep(3)
        await take(page, "kill", LIGHT, below(LIGHT), DARK, PHONE)
        made.worker("worker-b", PORT=str(ports["worker-b"]))
        await page.wait("document.getElementById('happened').innerText.includes('worker-b joined')", "it is back")
        await asyncio.sleep(8)
    await page.wait(DONE, "all is done", DRAINED_S)
    await asyncio.sleep(6)
    await take(page, "rest", LIGHT, DARK, PHONE)
    assert page.errors == []
    made.workers[0].kill()
    await page.wait("document.body.dataset.connection === 'cut'", "it is cut")
    await asyncio.sleep(3)
    await take(page, "cut", LIGHT, PHONE_DARK)


async def main() -> None:
    """Set the stage, and take the pictures."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory()))
        kafka = held.enter_context(EmbeddedKafka.ensure(folder / "kafka", port=free_port()))
        made: Any = held.enter_context(rig(kafka.url, folder))
        made.app, made.prefix = "streams_app", ""
        ports = {name: free_port() for name in ("worker-a", "worker-b")}
        for name, port in ports.items():
            made.worker(name, PORT=str(port))
        for worker in made.workers:
            await asyncio.to_thread(worker.wait_started, 3)
        began_s = time.monotonic()
        async with browser(folder / "chromium") as page:
            await tell(made, ports, page)
        print(f"{time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    if chromium() is None:
        sys.exit("screenshots: no Chromium on this machine: `apt-get install chromium`, or set CHROMIUM to its path")
    asyncio.run(main())
