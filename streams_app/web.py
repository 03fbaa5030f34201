"""The rules of the web server, for all views: problems in one form, who may ask and write, how much may be sent at once.

They stand in one middleware of aiohttp, in front of every view: ours, those of agents, and Faust's own.

Who may write: whoever knows the token (``STREAMS_APP_WEB_TOKEN``). Where there is none, the server has to be bound to
loopback, and the request must have been meant for it: a page of the web that the user has open may send requests to loopback
as well, but not without telling where it is from. Nor may it read there, by a name of its own that leads to loopback. And a
proxy on this machine would let in the whole world, but not without telling that it is one, if it was set up well.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, PayloadEncodingError
from aiohttp.web_protocol import RequestPayloadError
from faust.web.exceptions import WebError

from streams_app.errors import NotHere, StoreCorrupted, StoreFailed

if TYPE_CHECKING:
    from streams_app.application import App

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
#: That long a body may take to come: who sends it byte by byte would hold a connection for ever.
_BODY_WITHIN_S = 30.0
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_RETRY_S = 2
#: What proxies say of themselves.
_BY_PROXY = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP")
_NOTHING: Mapping[str, Any] = MappingProxyType({})

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Problem(Exception):
    """What is wrong with a request, for whoever sent it (RFC 9457); ``more`` are further fields of the document."""

    def __init__(
        self,
        status: HTTPStatus,
        detail: str,
        *,
        retry_s: int | None = None,
        headers: Mapping[str, str] = _NOTHING,
        more: Mapping[str, Any] = _NOTHING,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = dict(headers) if retry_s is None else {**headers, "Retry-After": str(retry_s)}
        self.more = more

    def response(self) -> web.Response:
        """The problem document."""
        own = {"type": "about:blank", "title": self.status.phrase, "status": self.status.value, "detail": str(self)}
        return web.Response(
            body=msgspec.json.encode({**self.more, **own}, enc_hook=str),
            status=self.status.value,
            content_type="application/problem+json",
            headers=self.headers,
        )


def application_options(app: App) -> dict[str, Any]:
    """What aiohttp's application is made with."""

    logging.getLogger("aiohttp.server").addFilter(_without_stack)

    @web.middleware
    async def rules(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            token, bound_to = app.settings.web_token, str(app.conf.web_bind)
            check_may_ask(request, token, bound_to)
            if request.method not in _READING:
                check_may_write(request, token, bound_to)
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except (NotHere, StoreFailed, StoreCorrupted) as error:
            return Problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error), retry_s=_RETRY_S).response()
        except web.HTTPException as error:
            if error.status < HTTPStatus.BAD_REQUEST:
                raise
            detail = "there is no such page" if error.status == HTTPStatus.NOT_FOUND else error.reason
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return Problem(HTTPStatus(error.status), detail, headers=allow).response()

    return {"middlewares": [rules], "client_max_size": MAX_BODY_BYTES}


def _without_stack(record: logging.LogRecord) -> bool:
    """Whoever sends what is no HTTP is told so; whoever reads the log needs no stack of it."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (BadHttpMessage, RequestPayloadError)):
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True


def problem_of(error: WebError, methods: Iterable[str]) -> Problem:
    """What a view says by one of Faust's errors; ``methods`` are those that the view knows."""
    status = HTTPStatus(error.code)
    return Problem(
        status,
        str(error.detail),
        retry_s=_RETRY_S if status == HTTPStatus.SERVICE_UNAVAILABLE else None,
        headers={"Allow": ",".join(sorted(methods))} if status == HTTPStatus.METHOD_NOT_ALLOWED else {},
        more=error.extra_context,
    )


def check_may_ask(request: web.Request, token: str | None, bound_to: str) -> None:
    """Raise `Problem` if the request was meant for another host than this machine, which alone may reach the server.

    A page of the web may have its own name lead to loopback, and reads what comes from there as its own: only the name tells.
    Browsers always send it; who sends none is none.
    """
    host = request.headers.get("Host")
    if token is None and is_loopback(bound_to) and host is not None and not is_loopback(_host(f"//{host}")):
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "without a token this server answers as localhost only: ask for that, or set STREAMS_APP_WEB_TOKEN",
        )


def check_may_write(request: web.Request, token: str | None, bound_to: str) -> None:
    """Raise `Problem` unless the request may change something."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if token is not None:
        if scheme.lower() == "bearer" and hmac.compare_digest(_as_sent(given.strip()), _as_sent(token)):
            return
        raise Problem(
            HTTPStatus.UNAUTHORIZED,
            "writing needs the header 'Authorization: Bearer TOKEN'",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if not is_loopback(bound_to):
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "this server is reached from other machines and has no token: set STREAMS_APP_WEB_TOKEN, and send it as "
            "'Authorization: Bearer TOKEN'",
        )
    origin = request.headers.get("Origin")
    if not is_loopback(_host(f"//{request.host}")) or (origin is not None and not is_loopback(_host(origin))):
        raise Problem(HTTPStatus.FORBIDDEN, "without a token only pages and programs of this machine may write")
    if any(name in request.headers for name in _BY_PROXY):
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "the request came through a proxy, so anybody may have sent it: set STREAMS_APP_WEB_TOKEN, and send it as "
            "'Authorization: Bearer TOKEN'",
        )


def _as_sent(text: str) -> bytes:
    """The bytes of a header, or of a variable, which need not be text."""
    return text.encode(errors="surrogateescape")


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
