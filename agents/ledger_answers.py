"""Whether each transfer has its one answer, judged while money moves (``audit --follow``).

Independent of the agent on purpose. What the answers moved is the ledger follower's matter (`agents.ledger_follow`).

======== ==========================================================================================================
lost     a transfer that was consumed and has neither a result nor a dead letter: they are of one transaction
repeated a result, or a dead letter, more than there are transfers
======== ==========================================================================================================
"""

from __future__ import annotations

import msgspec

from streams_app.evidence import read
from streams_app.pairs import Pairs
from streams_app.partitioning import partition_of
from streams_app.registry import Observed, Panel, follower, panel
from tables.ledger import Result, Transfer

panel(
    Panel(
        topic="transfers",
        title="Money",
        unit="transfers",
        promise="A transfer takes effect once, whatever dies on the way: nothing doubled, nothing dropped.",
        figures={
            "ledger.sum": "All balances, and credits on their way",
            "ledger.on_their_way": "On its way between accounts",
            "ledger.posted_total": "Transfers posted",
            "ledger.entries_total": "Entries in the ledger",
        },
        zero=frozenset({"ledger.sum"}),
    )
)


@follower("transfers")
class TransfersFollower(Pairs):
    """See the module."""

    topics = ("transfers", "transfer-results", "dead-letters")

    def input_key(self, record: Observed) -> str | None:
        """Debit account and id: the same id twice has two answers. What lies where it does not belong must have none."""
        transfer = read(_transfers, record.value)
        if transfer is None or record.key != transfer.debit_account.encode():
            return None
        belongs = partition_of(record.key, self.followed.partitions.get("transfers", 1))
        return _key(transfer.debit_account, transfer.id) if belongs == record.partition else None

    def answer_key(self, record: Observed) -> str | None:
        """As the result says."""
        result = read(_results, record.value)
        return None if result is None else _key(result.debit_account, result.id)


def _key(account: str, transfer_id: str) -> str:
    return f"{len(account)}:{account}/{transfer_id}"


_transfers = msgspec.json.Decoder(Transfer)
_results = msgspec.json.Decoder(Result)
