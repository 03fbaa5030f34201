"""What must be true when a history has ended: by Jepsen's names where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from faust.types import TP

from lab.simulation.broker import Log
from lab.simulation.cluster import Cluster
from lab.simulation.plan import CHANGELOGS, INPUTS, OUTPUTS
from streams_app.claims import Claim


class Anomaly(NamedTuple):
    """What is wrong, and the sentence that shows it."""

    kind: str
    text: str


class Seen(NamedTuple):
    """An output that readers of committed records see."""

    id: int
    balance: int
    key: bytes


def anomalies(cluster: Cluster) -> list[Anomaly]:
    """All that is wrong at the end of a history; what explains the rest comes first."""
    outputs = [seen for tp in OUTPUTS for seen in _seen(cluster.broker.logs[tp])]
    found = [*(Anomaly("error", text) for text in cluster.errors), *_at_rest(cluster)]
    if cluster.plan.guarantee != "at_most_once":  # its tables are best effort
        found = [*(Anomaly("aborted read", text) for text in cluster.aborted_reads), *found]
    match cluster.plan.guarantee:
        case "exactly_once":
            found += [*_torn(cluster), *_repeated(outputs), *_lost(cluster, outputs)]
            found += [*_order(cluster, outputs), *_balances(cluster, outputs), *_tables(cluster)]
        case "at_least_once":
            found += [*_lost(cluster, outputs), *_tables(cluster)]
        case "at_most_once":
            found += [*_repeated(outputs), *_unreported(cluster, outputs)]
    return found


def _seen(log: Log) -> list[Seen]:
    visible = (record for record in log.records[: log.stable_end] if record.outcome)
    values = ((record.key or b"", [*map(int, (record.value or b"").split())]) for record in visible)
    return [Seen(id_, balance, key) for key, (id_, balance) in values]


def _at_rest(cluster: Cluster) -> Iterator[Anomaly]:
    for tp in INPUTS:
        stored, end = cluster.group.offsets.get(tp), cluster.plan.entries
        offset = None if stored is None else stored.offset
        if offset != end:
            yield Anomaly(
                "stuck", f"{tp.topic}-{tp.partition} is committed up to {offset} of {end}, and nobody goes on"
            )
    for tp, log in cluster.broker.logs.items():
        if log.stable_end != log.end:
            yield Anomaly(
                "open transaction", f"the last stable offset of {tp[0]}-{tp[1]} is {log.stable_end} of {log.end}"
            )


def _torn(cluster: Cluster) -> Iterator[Anomaly]:
    for transaction in cluster.broker.transactions:
        if transaction.outcome and transaction.records and not transaction.has_offsets:
            yield Anomaly(
                "torn", f"a transaction of {transaction.name} has {transaction.records} records and no offsets"
            )


def _repeated(outputs: list[Seen]) -> Iterator[Anomaly]:
    ids = [seen.id for seen in outputs]
    for each in sorted({each for each in ids if ids.count(each) > 1}):
        yield Anomaly("duplicate", f"entry {each} has {ids.count(each)} outputs")


def _lost(cluster: Cluster, outputs: list[Seen]) -> Iterator[Anomaly]:
    missing = cluster.plan.balances.keys() - {seen.id for seen in outputs}
    if missing:
        yield Anomaly("lost write", f"entries {sorted(missing)} have no output")


def _unreported(cluster: Cluster, outputs: list[Seen]) -> Iterator[Anomaly]:
    missing = cluster.plan.balances.keys() - {seen.id for seen in outputs}
    claims = [Claim.parse(stored.metadata) for stored in cluster.group.offsets.values()]
    reported = sum(claim.given_up for claim in claims if claim is not None)
    if len(missing) > reported:
        yield Anomaly(
            "unreported loss", f"entries {sorted(missing)} have no output, and {reported} were reported as given up"
        )


def _order(cluster: Cluster, outputs: list[Seen]) -> Iterator[Anomaly]:
    for key in cluster.plan.ids:
        ids = [seen.id for seen in outputs if seen.key == key]
        if ids != sorted(ids):
            yield Anomaly("out of order", f"the outputs of {key.decode()} are of entries {ids}")


def _balances(cluster: Cluster, outputs: list[Seen]) -> Iterator[Anomaly]:
    for seen in outputs:
        right = cluster.plan.balances[seen.id]
        if seen.balance != right:
            yield Anomaly(
                "wrong balance", f"the balance after entry {seen.id} is {right}, its output says {seen.balance}"
            )


def _tables(cluster: Cluster) -> Iterator[Anomaly]:
    for tp in CHANGELOGS:
        right, log = cluster.plan.final(tp.partition), cluster.broker.logs[tp]
        changelog = {record.key: record.value for record in log.records if record.outcome}
        if changelog != right:
            yield Anomaly(
                "wrong changelog", f"{tp.partition} should hold {_words(right)}, its changelog {_words(changelog)}"
            )
        for name, values in _stores(cluster, tp):
            if values != changelog:
                yield Anomaly(
                    "store ≠ changelog", f"{name} has {_words(values)} on disk, the changelog {_words(changelog)}"
                )


def _stores(cluster: Cluster, tp: TP) -> Iterator[tuple[str, dict[bytes | None, bytes | None]]]:
    """The open store of the partition's owner."""
    for slot in cluster.slots:
        worker = cluster.workers.get(slot.name)
        if worker is not None and tp in worker.stores and not worker.process.is_dead:
            yield slot.name, {key[1:]: value for key, value in slot.disks[tp].memory.items() if key.startswith(b"v")}


def _words(values: dict[bytes | None, bytes | None] | dict[bytes, bytes]) -> str:
    return (
        ", ".join(f"{(key or b'').decode()} = {(value or b'').decode()}" for key, value in sorted(values.items()))
        or "nothing"
    )
