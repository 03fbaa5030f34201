"""When which fault strikes, drawn from a seed: the same seed, the same schedule."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from lab.faults import FAULTS, Fault
from streams_app.errors import ConfigurationError

#: Names that stand for several faults.
MIXED, NONE = "mixed", "none"
#: Time between the beginnings of two faults, from … to, by the name of the option: faults follow at once, overlap, or come
#: one by one, each when the last one's recovery is over.
PAUSES_S = {"none": (0.0, 0.2), "short": (1.0, 7.0), "long": (24.0, 30.0)}
#: One in so many gaps is a calm that lets everything recover: what only heals in peace shows there.
_CALM_SHARE, _CALM_S = 0.2, 14.0
#: No fault begins within this time of the end.
_LAST_S = 5.0


class Planned(NamedTuple):
    """One fault to come."""

    #: Since the input began.
    at_s: float
    kind: str
    lasts_s: float
    #: Of all that the fault itself draws.
    seed: int


def kinds_of(wanted: str, workers: int, brokers: int, *, wires: bool = True) -> list[str]:
    """The kinds that a comma list of names, ``mixed`` or ``none`` stands for; ``mixed`` leaves out what cannot be survived.

    Raises:
        ConfigurationError: a name is not known, or is not to be survived with so few workers or brokers.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    possible = [name for name, fault in FAULTS.items() if _why_not(fault, workers, brokers) is None]
    kinds: list[str] = []
    for name in names:
        if name == MIXED:
            kinds += possible
        elif name in FAULTS:
            why_not = _why_not(FAULTS[name], workers, brokers)
            if why_not:
                raise ConfigurationError(f"the fault {name!r} {why_not}")
            kinds.append(name)
        elif name != NONE:
            known = ", ".join((MIXED, NONE, *FAULTS))
            raise ConfigurationError(f"no fault is named {name!r}; there are: {known}")
    return kinds


def _why_not(fault: type[Fault], workers: int, brokers: int) -> str | None:
    if workers < fault.needs_workers:
        return f"needs {fault.needs_workers} workers to be survived, not {workers}"
    if brokers < fault.needs_brokers:
        return f"needs {fault.needs_brokers} brokers to be survived, not {brokers}"
    return None


def schedule(seed: int, seconds: float, kinds: Sequence[str], pauses: str = "short") -> list[Planned]:
    """Faults for so many seconds. Every kind comes once before any comes again."""
    draw, gap_s = Random(f"schedule {seed}"), PAUSES_S[pauses]
    planned: list[Planned] = []
    hand: list[str] = []
    at_s = draw.uniform(*PAUSES_S["short"])
    while kinds and at_s < seconds - _LAST_S:
        hand = hand or draw.sample(list(kinds), len(kinds))
        kind = hand.pop()
        planned.append(Planned(at_s, kind, draw.uniform(*FAULTS[kind].lasts_s), draw.getrandbits(32)))
        calm = draw.random() < _CALM_SHARE
        at_s += max(_CALM_S, gap_s[0]) if calm else draw.uniform(*gap_s)
    return planned
