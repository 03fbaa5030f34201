"""A headless Chromium, spoken to by its DevTools protocol; nothing but aiohttp is needed for that."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

#: What Chromium is called where; the variable CHROMIUM names another one.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_START_TIMEOUT_S = 60.0
_FLAGS = (
    "--headless=new",
    "--remote-debugging-port=0",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--disable-lcd-text",
    # Where tests run as root, Chromium's own sandbox refuses to. The only page it opens is ours.
    "--no-sandbox",
)


def chromium() -> str | None:
    """Path of a Chromium; None: there is none on this machine."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0
        #: What the page wrote to its console as errors, and what it threw.
        self.errors: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol."""
        self._count += 1
        number = self._count
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=30)
            self._note(message)
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result

    def _note(self, message: dict[str, Any]) -> None:
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.errors.append(str(message["params"]["entry"]["text"]))

    async def open(self, url: str) -> Page:
        """Go there."""
        for domain in ("Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete' && location.href !== 'about:blank'", f"{url} is loaded")
        return self

    async def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def wait(self, expression: str, what: str, timeout_s: float = 60.0) -> Any:
        """Wait until an expression is true; gives its value."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := await self.ask(expression)):
            text = (await self.ask("document.body?.innerText") or "")[:1_500]
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}\n{text}\n{self.errors}"
            await asyncio.sleep(0.1)
        return value

    async def press(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    async def look_like(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """The size of the window, and what its user prefers."""
        scale = 2 if phone else 1
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        motion = {"name": "prefers-reduced-motion", "value": "reduce"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme, motion])

    async def picture(self, *, whole: bool = True) -> bytes:
        """A PNG of the page, down to its end."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])


_KEYS = {"Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, "Enter": 13}


def _port_file(folder: Path) -> Path:
    """Where Chromium writes which port it took."""
    folder.mkdir(parents=True, exist_ok=True)
    port_file = folder / "DevToolsActivePort"
    port_file.unlink(missing_ok=True)
    return port_file


@contextlib.asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A tab of a Chromium that is started, and ended with the ``with``; ``folder`` is for what it keeps."""
    program = chromium()
    assert program is not None, "no Chromium is installed"
    port_file = _port_file(folder)
    process = subprocess.Popen(  # noqa: ASYNC220 - it is awaited by its file
        [program, *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not (port_file.exists() and port_file.read_text().count("\n")):
            assert process.poll() is None, "Chromium does not start"
            assert time.monotonic() < deadline_s, "Chromium did not start in time"
            await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{address}/json/new?about:blank") as answer:
                target = await answer.json(content_type=None)
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
