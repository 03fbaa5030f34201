"""The dashboard: ``GET /``, and ``GET /events`` (server-sent events) behind it.

::

    cluster.py    what Kafka knows of the groups           observer.py  a process: groups, dead letters, followers
    letters.py    dead letters                             board.py     what a page is told, once a second
    page/         the page: HTML, CSS, ES modules; nothing is built, nothing comes from other hosts

It knows no agent. An agent brings words (`streams_app.registry.Panel`) and figures (`streams_app.registry.Follower`).
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from streams_app.dashboard.board import Board
from streams_app.dashboard.observer import now_ms
from streams_app.web import Problem

if TYPE_CHECKING:
    from streams_app.application import App

_PAGE = Path(__file__).parent / "page"
_MOST_VIEWERS = 100
#: A page that was cut off asks again after so long.
_RETRY_MS = 2_000
#: A page that takes nothing for so long sleeps; it would keep its place, and hold up the end of the worker.
_SLEEPS_S = 10.0
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def register(app: App) -> None:
    """Serve the page of ``app`` and its siblings."""
    files = {path.name: path for path in _PAGE.iterdir()}
    boards: list[Board] = []
    started_ms = now_ms()

    async def board() -> Board:
        if not boards:
            boards.append(Board(app, started_ms=started_ms, beacon=app.beacon, loop=app.loop))
            await app.add_runtime_dependency(boards[0])
            # An app that is still starting would leave that for later.
            await boards[0].maybe_start()
        return boards[0]

    @app.page("/", name="dashboard")
    async def index(view: Any, request: Any) -> Any:
        return web.FileResponse(files["index.html"], headers=_HEADERS)

    @app.page("/dashboard/{name}", name="dashboard-file")
    async def file(view: Any, request: Any, name: str) -> Any:
        if name not in files:
            raise Problem(HTTPStatus.NOT_FOUND, "there is no such page")
        return web.FileResponse(files[name], headers=_HEADERS)

    @app.page("/events", name="dashboard-events")
    async def events(view: Any, request: Any) -> Any:
        told = await board()
        if told.viewers >= _MOST_VIEWERS:
            raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are open", retry_s=30)
        headers = {
            **_HEADERS,
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        # A page that is closed is no error, and neither is one that sleeps.
        with contextlib.suppress(ConnectionError, TimeoutError):
            await response.write(b"retry: %d\n\n" % _RETRY_MS)
            async with contextlib.aclosing(told.messages()) as messages:
                async for message in messages:
                    await _write(response, request, message)
        return response


async def _write(response: web.StreamResponse, request: web.Request, message: bytes) -> None:
    """Write, and cut off who does not read; raises TimeoutError then."""
    try:
        async with asyncio.timeout(_SLEEPS_S):
            await response.write(message)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise
