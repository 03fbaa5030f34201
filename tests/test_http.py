"""The ledger by HTTP: submitted, followed and read from any process; what is bad changes nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.ledger_views import transfer_of
from streams_app.errors import ExitCode
from streams_app.web import Problem, check_may_write
from tests.rig import Rig, Worker, free_port, rig, wait_until

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what a platform binds to, here in words only
TRANSFER = {"id": "t-1", "debit_account": "external:bank", "credit_account": "alice", "amount": 500, "currency": "EUR"}


class Client:
    """Talks to the web server of one worker."""

    def __init__(self, made: Rig, slot: str, **env: str) -> None:
        self.port = free_port()
        self.worker: Worker = made.worker(slot, PORT=str(self.port), **env)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, body and headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            sent = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
            connection.request(method, path, sent, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else {}, dict(answer.getheaders())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        status, body, _ = self.ask("GET", path)
        return status, body

    def wait_up(self) -> Client:
        def is_up() -> bool:
            assert self.worker.alive, self.worker.log.read_text()[-3000:]
            try:
                return self.ask("GET", "/accounts/nobody")[0] in {404, 503}
            except OSError:
                return False

        wait_until(is_up, "the web server answers")
        return self


@pytest.fixture(scope="module")
def made(kafka_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with rig(kafka_url, tmp_path_factory.mktemp("http")) as made:
        made.app = "streams_app"
        yield made


@pytest.fixture(scope="module")
def bank(made: Rig) -> Client:
    """A worker with the ledger."""
    return Client(made, "bank", STREAMS_APP_GUARANTEES="exactly_once").wait_up()


def test_a_transfer_is_submitted_followed_and_seen_from_any_process(made: Rig, bank: Client) -> None:
    """The web process of a platform runs no ledger, and cannot reach those that do."""
    web = Client(made, "web", STREAMS_APP_GUARANTEES="at_most_once").wait_up()
    status, accepted, headers = web.ask("POST", "/transfers", TRANSFER)
    assert (status, accepted["status"]) == (HTTPStatus.ACCEPTED, "accepted")
    followed_at = headers["Location"]
    assert followed_at == accepted["result"] == "/accounts/external%3Abank/transfers/t-1"
    for each in (web, bank):
        wait_until(lambda each=each: each.get(followed_at)[0] == HTTPStatus.OK, "it is decided")
        assert each.get(followed_at)[1] == {
            "id": "t-1",
            "debit_account": "external:bank",
            "status": "posted",
            "reason": None,
            "credit_account": "alice",
            "amount": 500,
            "currency": "EUR",
        }
        wait_until(lambda each=each: each.get("/accounts/alice")[0] == HTTPStatus.OK, "the money is there")
        assert each.get("/accounts/alice")[1] == {"account": "alice", "balances": {"EUR": 500}}
    # Once more, by whom the answer did not reach: it counts once.
    assert web.ask("POST", "/transfers", TRANSFER)[0] == HTTPStatus.ACCEPTED
    no_id = {name: value for name, value in TRANSFER.items() if name != "id"}
    assert web.ask("POST", "/transfers", no_id, {"Idempotency-Key": '"t-1"'})[0] == HTTPStatus.ACCEPTED
    wait_until(lambda: len(made.read("transfer-results")) == 3, "all are answered")
    assert web.get("/accounts/alice")[1]["balances"] == {"EUR": 500}
    bank.worker.kill()
    assert web.get("/accounts/alice") == (HTTPStatus.OK, {"account": "alice", "balances": {"EUR": 500}})
    assert web.ask("POST", "/transfers", {**TRANSFER, "id": "t-2"})[0] == HTTPStatus.ACCEPTED
    again = Client(made, "bank", STREAMS_APP_GUARANTEES="exactly_once").wait_up()
    bank.port, bank.worker = again.port, again.worker
    wait_until(lambda: web.get("/accounts/alice")[1].get("balances") == {"EUR": 1000}, "the second one, too")
    wait_until(lambda: bank.get("/accounts/alice")[1].get("balances") == {"EUR": 1000}, "the second one, too")


def test_what_is_not_there_is_said(bank: Client) -> None:
    """A problem document tells what to do; an empty answer would be taken for an empty account."""
    wait_until(lambda: bank.get("/accounts/nobody")[0] == HTTPStatus.NOT_FOUND, "its partition has started")
    status, problem, headers = bank.ask("GET", "/accounts/nobody")
    assert (status, problem["status"]) == (HTTPStatus.NOT_FOUND, 404)
    assert headers["Content-Type"] == "application/problem+json"
    assert "nobody" in problem["detail"]
    assert bank.get("/accounts/alice/transfers/none")[0] == HTTPStatus.NOT_FOUND
    assert bank.get("/nowhere")[1]["detail"] == "there is no such page"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
#: A field that is none of a transfer's.
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "id": st.sampled_from(["", "x" * 65]) | JSON.filter(lambda value: not isinstance(value, str)),
    "amount": st.integers(max_value=0) | st.just(2**53) | st.floats(0, 1) | st.text(max_size=5) | st.none(),
    "currency": st.from_regex(r"\A[a-z]{0,4}\Z") | st.just("EUR\n") | st.integers(),
    "debit_account": st.sampled_from(["", "x" * 65, "\ud800"]) | st.integers() | st.none(),
    "created_at": st.text(max_size=5) | st.integers(),
}


def but_one(name: str) -> st.SearchStrategy[bytes]:
    return WRONG[name].map(lambda value: json.dumps({**TRANSFER, name: value}).encode())


BAD_BODIES = (
    st.binary(max_size=200).map(lambda data: b"\x00" + data)
    | JSON.map(lambda value: json.dumps(value).encode()).filter(lambda body: b"debit_account" not in body)
    | st.sampled_from(sorted(WRONG)).flatmap(but_one)
    | st.sampled_from(sorted(set(TRANSFER) - {"created_at"})).map(
        lambda name: json.dumps({key: value for key, value in TRANSFER.items() if key != name}).encode()
    )
    | st.just(json.dumps({**TRANSFER, "more": "x" * 70_000}).encode())
    | st.sampled_from([b"[", b'{"id":']).map(lambda opening: opening * 10_000)
    | st.sampled_from(["utf-16", "utf-32", "latin-1"]).map(
        lambda encoding: json.dumps({**TRANSFER, "debit_account": "é"}, ensure_ascii=False).encode(encoding)
    )
)
#: Where a transfer that took effect would show.
LEDGER = ("transfers", "credits", "ledger", "transfer-results", "dead-letters")
GOOD_BODY = json.dumps(TRANSFER).encode()
REQUESTS = st.one_of(
    st.tuples(st.just("POST"), st.just("/transfers"), BAD_BODIES, st.just({})),
    st.tuples(
        st.just("POST"),
        st.just("/transfers"),
        st.just(GOOD_BODY),
        st.sampled_from(
            [
                {"Content-Type": "text/plain"},
                {"Content-Type": "multipart/form-data; boundary=x"},
                {"Origin": "https://example.com"},
                {"Origin": "null"},
                {"Origin": "http://["},
                {"Host": "example.com"},
                {"Host": ""},
                {"Idempotency-Key": "another"},
                {"Idempotency-Key": '"'},
                {"Idempotency-Key": "t-1\xff"},
                {"Content-Encoding": "gzip"},
                {"Content-Encoding": "deflate"},
            ]
        ),
    ),
    st.tuples(
        st.sampled_from(["PUT", "DELETE", "PATCH", "SEARCH", "PROPFIND", "OPTIONS"]),
        st.sampled_from(["/transfers", "/transfers/t-1", "/accounts/alice", "/livez/x", "/nowhere"]),
        BAD_BODIES,
        st.just({}),
    ),
    st.tuples(
        st.just("GET"),
        st.builds(
            "/accounts/{}{}".format,
            st.binary(min_size=1, max_size=80).map(lambda data: quote(b"\x7f" + data, "")),
            st.sampled_from(["", "/", "/transfers/", "/transfers/%ff", "/transfers/a/b", "?x=%00"]),
        ),
        st.none(),
        st.just({}),
    ),
)


def test_a_thousand_bad_requests_change_nothing(made: Rig, bank: Client) -> None:
    """Whoever reaches the server may send anything: it is refused by name, and the ledger does not hear of it."""
    wait_until(lambda: bank.get("/accounts/nobody")[0] == HTTPStatus.NOT_FOUND, "its partitions have started")
    before = [len(made.read(topic)) for topic in LEDGER]
    asked = 0

    @settings(max_examples=1_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(REQUESTS)
    def ask(request: tuple[str, str, bytes | None, dict[str, str]]) -> None:
        nonlocal asked
        asked += 1
        status, problem, headers = bank.ask(*request)
        assert 400 <= status < 500, (request, status, problem)
        assert problem["detail"]
        assert headers["Content-Type"] == "application/problem+json"

    ask()
    assert asked >= 900
    assert [len(made.read(topic)) for topic in LEDGER] == before
    assert bank.worker.alive
    assert not bank.worker.says("Traceback"), bank.worker.log.read_text()[-3000:]


HEAD = b"POST /transfers HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LENGTH = f"Content-Length: {len(GOOD_BODY)}\r\n".encode()
CHUNK = f"{len(GOOD_BODY):x}\r\n".encode() + GOOD_BODY


def answer_to(sent: bytes, port: int) -> bytes:
    """What comes back; an end of the connection, by whatever word, is an end."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while received := connection.recv(65_536):
                answer += received
    return answer


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(HEAD + LENGTH + b"More: " + b"x" * 50_000 + b"\r\n\r\n" + GOOD_BODY, id="a huge header"),
        pytest.param(HEAD + LENGTH + b"More: x\r\n" * 20_000 + b"\r\n" + GOOD_BODY, id="very many headers"),
        pytest.param(b"POST /" + b"x" * 50_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", id="a huge path"),
        pytest.param(HEAD + LENGTH + b"More: \x00\r\n\r\n" + GOOD_BODY, id="a zero in a header"),
        pytest.param(HEAD + LENGTH + b"Content-Length: 3\r\n\r\n" + GOOD_BODY, id="two lengths"),
        pytest.param(HEAD + b"Content-Length: -5\r\n\r\n" + GOOD_BODY, id="a length below zero"),
        pytest.param(
            HEAD + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK + b"\r\n0\r\n\r\n", id="a length and chunks"
        ),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD_BODY, id="a chunk of no size"),
        pytest.param(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNK + b"x0\r\n\r\n", id="a chunk that is longer"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, id="TLS"),
        pytest.param(b"GET  / HTTP/9.9\r\n\r\n", id="no version"),
        pytest.param(HEAD + b"Content-Length: 10000\r\n\r\n" + GOOD_BODY, id="half of a body"),
    ],
)
def test_what_is_no_http_changes_nothing(made: Rig, bank: Client, sent: bytes) -> None:
    """It is refused before any of our rules sees it: with a 4xx, or an end of the connection."""
    before = len(made.read("transfers"))
    answer = answer_to(sent, bank.port)
    assert re.fullmatch(rb"(HTTP/1\.[01] 4\d\d .*)?", answer, re.DOTALL), answer[:300]
    wait_until(lambda: bank.get("/accounts/nobody")[0] == HTTPStatus.NOT_FOUND, "it answers others")
    assert len(made.read("transfers")) == before
    assert not bank.worker.says("Traceback"), bank.worker.log.read_text()[-3000:]


def test_a_client_that_sends_half_a_transfer_does_not_hold_up_a_clean_stop(made: Rig) -> None:
    """The worker waited for the rest for so long that the watchdog ended it: with exit code 70, as one that hangs."""
    client = Client(made, "slow", STREAMS_APP_GUARANTEES="none").wait_up()
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        connection.sendall(HEAD + b"Content-Length: 10000\r\n\r\n" + GOOD_BODY)
        wait_until(lambda: client.get("/livez")[0] == HTTPStatus.OK, "the half of it was read")
        client.worker.signal(signal.SIGTERM)
        asked_s = time.monotonic()
        assert client.worker.wait() == ExitCode.GOOD, client.worker.log.read_text()[-3000:]
        assert time.monotonic() - asked_s < 15
    assert not client.worker.says("Traceback"), client.worker.log.read_text()[-3000:]


@pytest.mark.parametrize(
    ("headers", "token", "bound_to", "refused"),
    [
        ({}, None, "127.0.0.1", None),
        ({"Origin": "http://localhost:6066"}, None, "127.0.0.1", None),
        ({"Host": "[::1]:6066"}, None, "::1", None),
        ({"Origin": "https://example.com"}, None, "127.0.0.1", 403),
        ({"Host": "rebound.example.com"}, None, "127.0.0.1", 403),
        ({}, None, EVERYWHERE, 403),
        ({}, "secret", EVERYWHERE, 401),
        ({}, "secret", "127.0.0.1", 401),
        ({"Authorization": "Bearer wrong"}, "secret", EVERYWHERE, 401),
        ({"Authorization": "Basic secret"}, "secret", EVERYWHERE, 401),
        ({"Authorization": "Bearer sécret"}, "secret", EVERYWHERE, 401),
        ({"Authorization": "Bearer secret", "Host": "example.com"}, "secret", EVERYWHERE, None),
        ({"Forwarded": "for=192.0.2.1"}, None, "127.0.0.1", 403),
        ({"X-Forwarded-For": "192.0.2.1"}, None, "127.0.0.1", 403),
        ({"X-Real-IP": "192.0.2.1"}, None, "127.0.0.1", 403),
        ({"Via": "1.1 proxy"}, None, "127.0.0.1", 403),
        ({"Authorization": "Bearer secret", "Via": "1.1 proxy"}, "secret", "127.0.0.1", None),
    ],
)
def test_who_may_write(headers: dict[str, str], token: str | None, bound_to: str, refused: int | None) -> None:
    """A page of the web must not move money by the browser of somebody who runs a worker, nor the world by a proxy."""
    request = make_mocked_request("POST", "/transfers", headers={"Host": "127.0.0.1:6066", **headers})
    if refused is None:
        check_may_write(request, token, bound_to)
        return
    with pytest.raises(Problem) as caught:
        check_may_write(request, token, bound_to)
    assert caught.value.status == refused


@pytest.mark.parametrize("field", ["id", "debit_account", "credit_account"])
@pytest.mark.parametrize("dots", [".", ".."])
def test_an_id_that_no_path_can_have_is_refused(field: str, dots: str) -> None:
    """Clients take such parts out of a path, so `Location` would lead somewhere else."""
    with pytest.raises(Problem) as caught:
        transfer_of({**TRANSFER, field: dots})
    assert caught.value.status == HTTPStatus.UNPROCESSABLE_ENTITY
    assert transfer_of({**TRANSFER, field: dots + "x"})


def test_an_id_comes_once() -> None:
    """In the body or as Idempotency-Key; two different ones would be two transfers to two readers."""
    no_id = {name: value for name, value in TRANSFER.items() if name != "id"}
    assert transfer_of(dict(no_id), "k-1").id == "k-1"
    assert transfer_of(dict(TRANSFER), '"t-1"', "t-1").id == "t-1"
    for body, *keys in ((TRANSFER, "k-1"), (no_id,), (no_id, "k-1", "k-2")):
        with pytest.raises(Problem):
            transfer_of(dict(body), *keys)
