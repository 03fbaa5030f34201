"""The rules of the web server, for all views: problems in one form, who may write, how much may be sent at once.

They stand in one middleware of aiohttp, in front of every view: ours, those of agents, and Faust's own.

Who may write: whoever knows the token (``STREAMS_APP_WEB_TOKEN``). Where there is none, the server has to be bound to
loopback, and the request must have been meant for it: a page of the web that the user has open may send requests to loopback
as well, but not without telling where it is from.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, PayloadEncodingError
from aiohttp.web_protocol import RequestPayloadError

from streams_app.errors import NotHere, StoreCorrupted, StoreFailed

if TYPE_CHECKING:
    from streams_app.application import App

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
#: That long a body may take to come: who sends it byte by byte would hold a connection for ever.
_BODY_WITHIN_S = 30.0
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_RETRY_S = 2

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Problem(Exception):
    """What is wrong with a request, for whoever sent it (RFC 9457)."""

    def __init__(self, status: HTTPStatus, detail: str, *, retry_s: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.retry_s = retry_s

    def response(self) -> web.Response:
        """The problem document."""
        body = {"type": "about:blank", "title": self.status.phrase, "status": self.status.value, "detail": str(self)}
        headers = {} if self.retry_s is None else {"Retry-After": str(self.retry_s)}
        return web.Response(
            body=msgspec.json.encode(body),
            status=self.status.value,
            content_type="application/problem+json",
            headers=headers,
        )


def application_options(app: App) -> dict[str, Any]:
    """What aiohttp's application is made with."""

    logging.getLogger("aiohttp.server").addFilter(_without_stack)

    @web.middleware
    async def rules(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.method not in _READING:
                check_may_write(request, app.settings.web_token, str(app.conf.web_bind))
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except (NotHere, StoreFailed, StoreCorrupted) as error:
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error), retry_s=_RETRY_S).response()
        except web.HTTPException as error:
            if error.status < HTTPStatus.BAD_REQUEST:
                raise
            detail = "there is no such page" if error.status == HTTPStatus.NOT_FOUND else error.reason
            return Problem(HTTPStatus(error.status), detail).response()

    return {"middlewares": [rules], "client_max_size": MAX_BODY_BYTES}


def _without_stack(record: logging.LogRecord) -> bool:
    """Whoever sends what is no HTTP is told so; whoever reads the log needs no stack of it."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (BadHttpMessage, RequestPayloadError)):
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True


def check_may_write(request: web.Request, token: str | None, bound_to: str) -> None:
    """Raise `Problem` unless the request may change something."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if token is not None:
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode()):
            return
        raise Problem(HTTPStatus.UNAUTHORIZED, "writing needs the header 'Authorization: Bearer TOKEN'")
    if not is_loopback(bound_to):
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "this server is reached from other machines and has no token: set STREAMS_APP_WEB_TOKEN, and send it as "
            "'Authorization: Bearer TOKEN'",
        )
    origin = request.headers.get("Origin")
    if not is_loopback(_host(f"//{request.host}")) or (origin is not None and not is_loopback(_host(origin))):
        raise Problem(HTTPStatus.FORBIDDEN, "without a token only pages and programs of this machine may write")


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def json_body(request: web.Request) -> dict[str, Any]:
    """The JSON object that was sent.

    Raises:
        Problem: it is none, or says that it is something else, or is too large.
    """
    if request.content_type != "application/json":
        raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON, with 'Content-Type: application/json'")
    try:
        async with asyncio.timeout(_BODY_WITHIN_S):
            sent = await request.read()
    except TimeoutError as error:
        raise Problem(HTTPStatus.REQUEST_TIMEOUT, f"the body did not come within {_BODY_WITHIN_S:g} s") from error
    except (PayloadEncodingError, RequestPayloadError, ConnectionError) as error:
        raise Problem(HTTPStatus.BAD_REQUEST, "the body is not encoded as its headers say") from error
    try:
        body = msgspec.json.decode(sent)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(HTTPStatus.BAD_REQUEST, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise Problem(HTTPStatus.BAD_REQUEST, f"the body is a JSON {type(body).__name__}; an object is needed")
    return body
