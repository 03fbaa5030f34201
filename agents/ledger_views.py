"""The ledger on the web: submit a transfer, follow it, read committed balances.

An answer comes from what is committed. A process that does not hold the account's partition answers from a copy that it
follows itself, as processes of a platform often cannot reach each other.

A transfer that nobody confirmed may have been taken all the same. Whoever is in doubt sends it again under the same id: it
counts once.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import msgspec
from aiohttp import web
from confluent_kafka import KafkaException
from faust.web import View

from agents.ledger import transfers
from streams_app import app
from streams_app.web import Problem, json_body
from tables.ledger import Transfer, accounts, decision_key, decisions

_KAFKA_TIMEOUT_S = 10.0
_RETRY_S = 5
#: Whoever makes a path of these takes them for places in it, percent-encoded or not, and asks for another one.
_NO_PARTS_OF_PATHS = frozenset({".", ".."})

if not app.selected:
    app.follow(accounts)
    app.follow(decisions)


@app.page("/transfers")
class TransfersView(View):
    """``POST``: 202 when Kafka has the transfer; its result follows."""

    async def post(self, request: web.Request) -> Any:
        """Hand over the transfer in the body; its ``id`` may stand in the header ``Idempotency-Key``."""
        transfer = transfer_of(await json_body(request), *request.headers.getall("Idempotency-Key", ()))
        try:
            sent = await transfers.send(key=transfer.debit_account.encode(), value=transfer)
            # Who stops waiting takes nothing back: it is on its way.
            await asyncio.wait_for(asyncio.shield(sent), _KAFKA_TIMEOUT_S)
        except (TimeoutError, KafkaException, BufferError) as error:
            raise Problem(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "Kafka has not confirmed the transfer; send it again under the same id, it counts once",
                retry_s=_RETRY_S,
            ) from error
        followed_at = f"/accounts/{quote(transfer.debit_account, '')}/transfers/{quote(transfer.id, '')}"
        body = {"id": transfer.id, "debit_account": transfer.debit_account, "status": "accepted", "result": followed_at}
        return self.json(body, status=HTTPStatus.ACCEPTED.value, headers={"Location": followed_at})


def transfer_of(body: dict[str, Any], *idempotency_keys: str) -> Transfer:
    """The transfer of a request.

    Raises:
        Problem: a field is missing or wrong, or there are two different ids.
    """
    for idempotency_key in idempotency_keys:
        # As text, or in quotes, as the header's standard has it.
        transfer_id = idempotency_key.removeprefix('"').removesuffix('"')
        if body.setdefault("id", transfer_id) != transfer_id:
            raise Problem(
                HTTPStatus.UNPROCESSABLE_ENTITY, "the Idempotency-Key is not the transfer's id; send one of them"
            )
    if "id" not in body:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "the transfer has no id, and there is no Idempotency-Key")
    try:
        transfer = msgspec.convert(body, Transfer)
        msgspec.json.encode(transfer)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
    if not _NO_PARTS_OF_PATHS.isdisjoint((transfer.id, transfer.debit_account, transfer.credit_account)):
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "'.' and '..' cannot be followed by HTTP; take another id")
    return transfer


@app.page("/accounts/{account}")
async def account_page(view: Any, request: Any, account: str) -> Any:
    """The committed balances of an account, in minor units by currency."""
    row = accounts.committed(text(account))
    if row is None:
        raise Problem(HTTPStatus.NOT_FOUND, f"there is no account {account!r}; one exists from its first credit on")
    return view.json({"account": account, "balances": row.balances})


@app.page("/accounts/{account}/transfers/{transfer_id}")
async def transfer_page(view: Any, request: Any, account: str, transfer_id: str) -> Any:
    """What was decided about a transfer that debits the account."""
    decision = decisions.committed(decision_key(text(account), text(transfer_id)), of=account.encode())
    if decision is None:
        raise Problem(
            HTTPStatus.NOT_FOUND,
            f"nothing is decided of a transfer {transfer_id!r} of {account!r}; not yet, or long ago",
        )
    return view.json({"id": transfer_id, "debit_account": account, **msgspec.to_builtins(decision)})


def text(name: str) -> str:
    """A part of a path, if it is text that a key can have."""
    try:
        name.encode()
    except UnicodeError as error:
        raise Problem(HTTPStatus.NOT_FOUND, "that is no name") from error
    return name
