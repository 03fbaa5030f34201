"""The engines that are compared: each runs the same work, as its own documentation says, committing every 100 ms.

Read an entry, update a balance in a table, write one output to a topic of the same partitions; JSON in, JSON out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks import extras, java
from benchmarks.extras import Unavailable
from benchmarks.run import Run, faust
from streams_app.supervisor import WorkerProcess


@dataclass(frozen=True)
class Engine:
    """An engine under a guarantee."""

    name: str
    #: Of consumers, without prefix.
    group: str
    #: Module and arguments of `Run.process`; raises `Unavailable`.
    command: Callable[[], tuple[str, list[str]]]
    env: Mapping[str, str] = field(default_factory=dict)
    #: Of how many events of the fast ones it gets: what takes long enough to be measured needs no more.
    share: float = 1.0

    def worker(self, run: Run, name: str | None = None) -> WorkerProcess:
        """A process of it; not started. What it keeps on disk is kept for the next one of the same name."""
        module, arguments = self.command()
        return run.process(name or self.group, module, arguments, self.env)


def _faust(app: str) -> Callable[[], tuple[str, list[str]]]:
    return lambda: faust(app)


def _quix() -> tuple[str, list[str]]:
    return "benchmarks.program", [str(extras.python()), "benchmarks/bare_quix.py"]


def _java() -> tuple[str, list[str]]:
    return "benchmarks.program", java.command()


_EXACTLY_ONCE, _AT_LEAST_ONCE = ({"BENCH_GUARANTEE": name} for name in ("exactly_once", "at_least_once"))

OURS = Engine("ours, exactly once", "bench-ours", _faust("benchmarks.bare_ours"), _EXACTLY_ONCE)
OURS_AT_LEAST_ONCE = Engine("ours, at least once", "bench-ours", _faust("benchmarks.bare_ours"), _AT_LEAST_ONCE)
KAFKA_STREAMS = Engine("Kafka Streams, exactly once", "bench-kafka-streams", _java)
QUIX = Engine("Quix Streams, exactly once", "bench-quix", _quix, share=0.5)
STOCK = Engine("stock Faust, exactly once", "bench-stock", _faust("benchmarks.bare_stock"), _EXACTLY_ONCE, 0.02)
STOCK_AT_LEAST_ONCE = Engine(
    "stock Faust, at least once", "bench-stock", _faust("benchmarks.bare_stock"), _AT_LEAST_ONCE, 0.02
)
ENGINES = (OURS, KAFKA_STREAMS, QUIX, OURS_AT_LEAST_ONCE, STOCK, STOCK_AT_LEAST_ONCE)
#: Measured with few accounts only: so slow that their own pace hides the size of a table, or compared there only.
FEW_ACCOUNTS_ONLY = (OURS_AT_LEAST_ONCE, STOCK, STOCK_AT_LEAST_ONCE)


def absent() -> dict[str, str]:
    """Engines that cannot run here, by name, and why; what can be installed for the others is installed now."""
    reasons = {}
    for engine in ENGINES:
        try:
            engine.command()
        except Unavailable as reason:
            reasons[engine.name] = str(reason)
    return reasons
