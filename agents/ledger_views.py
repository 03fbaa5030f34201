"""The ledger on the web: committed balances, and the results of transfers.

Asked of a worker that does not hold the account's partition, an account is unknown here: send the request to its owner.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec

from streams_app import app
from tables.ledger import accounts, decision_key, decisions


def _problem(view: Any, detail: str) -> Any:
    """A problem document (RFC 9457)."""
    status = HTTPStatus.NOT_FOUND
    body = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": detail}
    return view.json(body, status=status.value, content_type="application/problem+json")


@app.page("/accounts/{account}")
async def account_page(view: Any, request: Any, account: str) -> Any:
    """The committed balances of an account, in minor units by currency."""
    row = accounts.get(account)
    if row is None:
        return _problem(view, f"no account {account!r} is known here; an account exists from its first credit on")
    return view.json({"account": account, "balances": row.balances})


@app.page("/accounts/{account}/transfers/{transfer_id}")
async def transfer_page(view: Any, request: Any, account: str, transfer_id: str) -> Any:
    """What was decided about a transfer that debits the account."""
    decision = decisions.get(decision_key(account, transfer_id))
    if decision is None:
        return _problem(view, f"no transfer {transfer_id!r} of {account!r} is remembered here")
    return view.json({"id": transfer_id, "debit_account": account, **msgspec.to_builtins(decision)})
