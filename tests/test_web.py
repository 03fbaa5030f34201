"""The web server without Kafka: who may ask it, what it says, and that no client holds up its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from faust.web import View

from streams_app import health, metrics
from streams_app.application import App
from streams_app.errors import NotHere
from streams_app.settings import Settings
from streams_app.web import json_body

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what a platform binds to, here in words only
LOCAL = "Host: localhost\r\n"
HALF = LOCAL + "Content-Type: application/json\r\nContent-Length: 1000\r\n"


def site(web_token: str | None = None, web_bind: str = "127.0.0.1") -> App:
    """An app with pages of every kind."""
    settings = Settings(kafka_url="kafka://127.0.0.1:1", web_token=web_token)
    app = App("site", settings=settings, web_bind=web_bind, autodiscover=False)
    health.register(app)
    metrics.register(app)
    table = app.Table("secrets", key_type=str, value_type=str)

    @app.page("/write")
    class Write(View):
        async def post(self, request: web.Request) -> Any:
            return self.json(await json_body(request))

    @app.page("/endless")
    async def endless(view: Any, request: Any) -> Any:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)

    @app.page("/none")
    async def none(view: Any, request: Any) -> Any:
        raise view.NotFound("there is none", sought="it")

    @app.page("/later")
    async def later(view: Any, request: Any) -> Any:
        raise NotHere("ask again soon")

    @app.page("/own")
    class Own(View):
        async def get(self, request: web.Request) -> Any:
            raise self.NotFound

        async def on_request_error(self, request: Any, exc: Any) -> Any:
            return self.text("mine", status=exc.code)

    @app.page("/secret/{name}")
    async def secret(view: Any, request: Any, name: str) -> Any:
        return view.json(table.committed(name))

    return app


@contextlib.asynccontextmanager
async def served(app: App) -> AsyncIterator[int]:
    """Its web server alone, on loopback whatever it takes itself to be bound to; gives the port."""
    server: Any = app.web
    server.init_server()
    runner: web.AppRunner = server._runner
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await server.stop_server()


async def ask(
    port: int, line: str, headers: str | bytes = LOCAL, version: str = "1.1"
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = headers if isinstance(headers, bytes) else headers.encode()
    writer.write(f"{line} HTTP/{version}\r\nConnection: close\r\n".encode() + head + b"\r\n")
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    await writer.wait_closed()
    top, _, body = answer.partition("\r\n\r\n")
    first, *rest = top.split("\r\n")
    return int(first.split()[1]), dict(each.split(": ", 1) for each in rest), body


@pytest.mark.parametrize(
    ("line", "headers"),
    [pytest.param("POST /write", HALF, id="half of a body"), pytest.param("GET /endless", LOCAL, id="reads nothing")],
)
async def test_a_slow_client_does_not_hold_up_the_end(line: str, headers: str) -> None:
    """A clean stop took so long that the watchdog ended the process, as one that hangs."""
    with socket.socket() as client:
        async with served(site()) as port:
            client.connect(("127.0.0.1", port))
            client.sendall(f"{line} HTTP/1.1\r\n{headers}\r\n".encode())
            assert (await ask(port, "GET /livez"))[0] == 200
            await asyncio.sleep(0.2)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 8


@pytest.mark.parametrize(
    ("headers", "token", "bound_to", "status"),
    [
        ("Host: localhost\r\n", None, "127.0.0.1", 200),
        ("Host: LOCALHOST:6066\r\n", None, "127.0.0.1", 200),
        ("Host: 127.0.0.1:6066\r\n", None, "127.0.0.1", 200),
        ("Host: 127.1.2.3\r\n", None, "127.0.0.1", 200),
        ("Host: [::1]:6066\r\n", None, "::1", 200),
        ("Host: rebound.example.com:6066\r\n", None, "127.0.0.1", 403),
        ("Host: localhost.example.com\r\n", None, "localhost", 403),
        ("Host: 192.0.2.1\r\n", None, "127.0.0.1", 403),
        ("Host: [\r\n", None, "127.0.0.1", 403),
        ("Host: example.com\r\n", "secret", "127.0.0.1", 200),
        ("Host: example.com\r\n", "secret", EVERYWHERE, 200),
        ("Host: example.com\r\n", None, EVERYWHERE, 200),
    ],
)
@pytest.mark.parametrize("path", ["/livez", "/metrics"])
async def test_who_may_read(headers: str, token: str | None, bound_to: str, status: int, path: str) -> None:
    """A page of the web, whose name was made to lead to loopback, would read balances as if they were its own."""
    async with served(site(token, bound_to)) as port:
        assert (await ask(port, f"GET {path}", headers))[0] == status
        assert (await ask(port, f"HEAD {path}", headers))[0] == status


async def test_a_check_that_names_no_host_is_answered() -> None:
    """HTTP/1.0 needs none, and load balancers still speak it; no browser does."""
    async with served(site()) as port:
        assert (await ask(port, "GET /livez", "", version="1.0"))[0] == 200


async def test_bytes_that_are_no_text_are_no_token() -> None:
    """They were a 500 with a stack, for anybody who likes to fill the log."""
    async with served(site("sécret")) as port:
        for given in (b"\xff", b"s\xe9cret", b""):
            authorization = b"Authorization: Bearer " + given + b"\r\n"
            status, headers, _ = await ask(port, "POST /write", LOCAL.encode() + authorization)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        authorization = "Authorization: Bearer sécret\r\nContent-Length: 0\r\n".encode()
        assert (await ask(port, "POST /write", LOCAL.encode() + authorization))[0] == 415


@pytest.mark.parametrize("path", ["/router/", "/router/nope/", "/router/secrets/k/", "/table/", "/table/secrets/k/"])
async def test_pages_of_faust_that_show_tables_are_not_there(path: str) -> None:
    """They show whole tables to whoever may read anything, and answer by a 500 what they do not expect."""
    async with served(site()) as port:
        status, headers, body = await ask(port, f"GET {path}")
    assert (status, headers["Content-Type"]) == (404, "application/problem+json")
    assert json.loads(body)["detail"] == "there is no such page"


@pytest.mark.parametrize(
    ("line", "status", "header", "fields"),
    [
        ("GET /none", 404, None, {"detail": "there is none", "title": "Not Found", "sought": "it"}),
        ("GET /later", 503, ("Retry-After", "2"), {"detail": "ask again soon"}),
        ("GET /write", 405, ("Allow", "HEAD,POST"), {"detail": "Method Not Allowed"}),
        ("HEAD /write", 405, ("Allow", "POST"), None),
        ("PUT /none", 405, ("Allow", "GET,HEAD"), {"detail": "Method Not Allowed"}),
    ],
)
async def test_what_is_wrong_is_said_in_one_form(
    line: str, status: int, header: tuple[str, str] | None, fields: dict[str, Any] | None
) -> None:
    """Whoever writes a client would have to know Faust's, aiohttp's and ours."""
    async with served(site()) as port:
        answered, headers, body = await ask(port, line)
    assert (answered, headers["Content-Type"]) == (status, "application/problem+json")
    if header is not None:
        assert headers[header[0]] == header[1]
    if fields is not None:
        assert json.loads(body).items() >= {**fields, "status": status}.items()


async def test_a_view_that_words_its_errors_goes_on_to_do_so() -> None:
    """Its clients know them."""
    async with served(site()) as port:
        status, _, body = await ask(port, "GET /own")
    assert (status, body) == (404, "mine")


async def test_a_table_that_is_asked_before_the_consumer_is_there_says_so() -> None:
    """For a moment of each start the page of an account was a 500, which clients do not ask again after."""
    app = site()

    @app.agent(app.topic("written"))
    async def write(stream: Any) -> None:
        async for _ in stream:
            pass

    async with served(app) as port:
        status, headers, body = await ask(port, "GET /secret/name")
    assert (status, headers["Retry-After"]) == (503, "2")
    assert "ask again soon" in json.loads(body)["detail"]
