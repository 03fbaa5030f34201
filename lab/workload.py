"""What flows during a run, who works it off, and what it must come to.

*Agents*: the agents of this checkout, whoever wrote them, with their registered generators and checks. *Bare*: the smallest
app with state, which stock Faust can run, too: its output stays in the partition of its input. *Topology*:
see lab/topology.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from streams_app.audit import AuditedApp, AuditedTable
from streams_app.demo import audited_as
from streams_app.errors import ConfigurationError
from streams_app.provision import TopicSpec
from streams_app.registry import Check, Facts, Observed, Record, checks, generator, generators
from streams_app.settings import Settings

if TYPE_CHECKING:
    from streams_app.application import App

OURS, STOCK = "ours", "stock"
_BARE, _PARTITIONS = "lab-bare", 4


@dataclass(frozen=True)
class Workload:
    """What is run, fed and judged."""

    #: Argument of ``faust -A``.
    module: str
    apps: Sequence[AuditedApp]
    #: Names of registered generators.
    inputs: Sequence[str]
    checks: Mapping[str, type[Check]]
    #: Says in a worker's log that an assignment is at work; once for each app.
    at_work: str
    #: What the workers do not create themselves.
    topics: Sequence[TopicSpec] = ()


def agents(app: App, prefix: str) -> Workload:
    """The agents of this checkout.

    Raises:
        ConfigurationError: nothing registers an input that they read.
    """
    apps = [audited_as(each, prefix) for each in app.family if each.agents and each.runs_here]
    read_topics = {topic for each in apps for topic in each.inputs}
    inputs = [name for name, made in generators().items() if prefix + made.topic in read_topics and name != _BARE]
    if not inputs:
        raise ConfigurationError("no agent reads the topic of a registered generator: there is nothing to hurt")
    return Workload("streams_app", apps, inputs, checks(), "partitions started")


def bare(engine: str, prefix: str, replication: int) -> Workload:
    """Read an entry, update the balance of its account, write one output."""
    app_id = f"{prefix}bench-{engine}"
    ours = engine == OURS
    # Stock Faust's table has another format on disk, and none that we could read while it runs.
    tables = (AuditedTable("balances", f"{app_id}-balances-changelog", expires=False),) if ours else ()
    app = AuditedApp(app_id, (f"{prefix}entries",), tables, "exactly_once")
    at_work = "partitions started" if ours else "Worker ready"
    topics = [TopicSpec(f"{prefix}{name}", _PARTITIONS, replication, {}) for name in ("entries", "outputs")]
    return Workload(f"benchmarks.bare_{engine}", [app], [_BARE], {"bare": BareCheck}, at_work, topics)


def topology(prefix: str, replication: int) -> Workload:
    """What Faust's streams can do, one after the other."""
    from lab import topology as app  # noqa: PLC0415 - it declares an app, and a generator, which others have no use for

    topics = app.topics(prefix, replication)
    return Workload(
        "lab.topology", [app.audited(prefix)], [app.NAME], {"topology": app.TopologyCheck}, "partitions started", topics
    )


@generator(_BARE, topic="entries")
def _entries(random: Random, keys: int) -> Iterator[Record]:
    number = 0
    while True:
        account = f"account-{random.randrange(keys)}"
        value = {"id": number, "account": account, "amount": random.randrange(1, 100)}
        yield Record(account.encode(), json.dumps(value).encode())
        number += 1


class BareCheck(Check):
    """Every entry has one output, in order, with the balance that follows."""

    topics = ("entries", "outputs")

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._due: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._seen: dict[str, int] = defaultdict(int)
        self._balances: dict[str, int] = defaultdict(int)
        self._known: dict[int, int] = {}
        self._lost, self._repeated = 0, 0

    def observe(self, record: Observed) -> None:
        """An entry, or an output."""
        value: dict[str, Any] = json.loads(record.value or b"{}")
        account = value["account"]
        if record.topic == "entries":
            self._balances[account] += value["amount"]
            self._due[account].append((value["id"], self._balances[account]))
            self._known[value["id"]] = 0
            return
        self._known[value["id"]] = self._known.get(value["id"], 0) + 1
        if self._known[value["id"]] > 1:
            self._repeated += 1
            self.findings.add("repeated output", f"{record}: {value['id']} of {account}")
            return
        at = self._seen[account]
        self._seen[account] += 1
        due = self._due[account][at] if at < len(self._due[account]) else None
        if due is None or due[0] != value["id"]:
            self.findings.add("reordered", f"{record}: {value['id']} of {account}, expected {due}")
        elif due[1] != value["balance"]:
            self.findings.add("wrong balance", f"{record}: {account} has {value['balance']}, not {due[1]}")

    def finish(self) -> None:
        """What had no output."""
        for number, outputs in self._known.items():
            if not outputs:
                self._lost += 1
                self.findings.add("lost output", f"entry {number}")
        self.figures |= {"entries": len(self._known), "lost": self._lost, "repeated": self._repeated}


def workload_of(app: App, engine: str, name: str, settings: Settings) -> Workload:
    """What ``--engine`` and ``--workload`` ask for.

    Raises:
        ConfigurationError: stock Faust cannot run the agents of this checkout.
    """
    if engine == STOCK or name == "bare":
        return bare(engine, settings.kafka_prefix, settings.topic_replication)
    if name == "topology":
        return topology(settings.kafka_prefix, settings.topic_replication)
    return agents(app, settings.kafka_prefix)
