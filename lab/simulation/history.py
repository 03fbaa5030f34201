"""One history: drawn from a seed, run, judged."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import NamedTuple

from lab.simulation.checks import Anomaly, anomalies
from lab.simulation.cluster import Cluster
from lab.simulation.plan import Guarantee, Plan
from lab.simulation.seams import Clock
from lab.simulation.world import Faults, Stuck, World, drawn_faults


class History(NamedTuple):
    """All that decides what happens."""

    guarantee: Guarantee
    entries: int
    workers: int
    chunk: int
    poison: int
    faults: Faults

    @classmethod
    def drawn(cls, guarantee: Guarantee, seed: str) -> History:
        """A random one."""
        random = Random(seed)
        entries = random.choice((1, 2, 3, 3, 4))
        return cls(
            guarantee,
            entries,
            workers=random.choice((1, 2, 2)),
            chunk=random.choice((1, 2, 4)),
            poison=random.choice((0, 0, 0, 1, 2 * entries)),
            faults=drawn_faults(random),
        )

    def words(self) -> str:
        """Its setting."""
        poison = f", entry {self.poison} fails once" if self.poison else ""
        return (
            f"{self.guarantee}, {self.workers} workers, {self.entries} entries in each of 2 partitions, "
            f"at most {self.chunk} of each fetched at once{poison}"
        )

    def run(self, clock: Clock, story: list[str] | None = None) -> Outcome:
        """Let it happen; with ``story`` it is told, too."""
        clock.world = world = World(self.faults, story)
        plan = Plan(self.guarantee, entries=self.entries, workers=self.workers, chunk=self.chunk, poison=self.poison)
        cluster = Cluster(world, plan)
        cluster.begin()
        try:
            world.run()
            found = anomalies(cluster)
        except Stuck as error:
            found = [Anomaly("stuck", str(error)), *anomalies(cluster)]
        finally:
            cluster.end()
        world.counts["steps"] = world.asked
        return Outcome(found, world.counts)


class Outcome(NamedTuple):
    """What came of a history."""

    anomalies: list[Anomaly]
    #: What happened in it, by kind.
    counts: Counter[str]
