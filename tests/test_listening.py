"""Where the web server listens, and the token that it was given: as whoever starts the worker said it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from streams_app.application import App
from streams_app.errors import ConfigurationError
from streams_app.settings import Settings
from streams_app.worker import settle_port
from streams_app.worker_command import worker


def given(port: int | None, bind: str | None = None) -> App:
    """An app as the worker starts it with ``--web-port`` and ``--web-bind``."""
    app = App("given", settings=Settings(), autodiscover=False)
    command: Any = object.__new__(worker)
    command.app = app
    command.as_service(None, with_web=True, web_port=port, web_bind=bind, web_host=None, web_transport=None)
    settle_port(app)
    return app


@pytest.mark.parametrize("port", [7000, 6066])
def test_a_port_that_was_given_is_taken(port: int) -> None:
    """The worker listened somewhere else, and did not say so: who asks for it finds nobody, or another worker."""
    with listening("127.0.0.1", 6066):
        app = given(port)
    assert app.conf.web_port == port
    assert app.conf.canonical_url.port == port


def has_ipv6() -> bool:
    """Whether this machine has it; many a container has not."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=needs_ipv6)])
def test_without_one_it_is_the_next_free_port_of_any_kind_of_address(host: str) -> None:
    """Those of IPv6 were asked for as if they were of IPv4, and none was ever free."""
    free = given(None, host).conf.web_port
    assert free >= 6066
    with listening(host, free):
        assert given(None, host).conf.web_port > free


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[None]:
    """Somebody who has a port, unless another one has it already."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            server.bind(address)
            server.listen()
        yield


def test_an_address_that_nobody_has_is_told() -> None:
    """It said that no port is free."""
    with pytest.raises(ConfigurationError, match=r"cannot listen at 'nobody\.invalid'"):
        given(None, "nobody.invalid")


@pytest.mark.parametrize(
    ("text", "token"), [("secret\n", "secret"), (" two words\r\n", "two words"), ("\n", None), ("", None)]
)
def test_a_token_is_taken_without_the_line_break_of_its_file(text: str, token: str | None) -> None:
    """No header can have one, so nobody would ever know the token."""
    assert Settings.from_env({"STREAMS_APP_WEB_TOKEN": text}).web_token == token
