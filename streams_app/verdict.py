"""The verdict of a demo: what was written, what was inflicted, and what each guarantee made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streams_app.audit import Report
from streams_app.inflicted import Failure, Kind

if TYPE_CHECKING:
    from streams_app.demo import Options


@dataclass
class Verdict:
    """How it went."""

    options: Options
    report: Report
    failures: Sequence[Failure]
    #: Records of each input.
    written: Mapping[str, int]
    #: The inputs of each guarantee that ran.
    inputs: Mapping[str, Sequence[str]]
    #: Workers that ended by themselves, with their exit codes.
    ended: Sequence[str]
    #: What was wanted and not done, and why.
    left_out: Sequence[str] = ()
    #: What is left to look into; None: nothing is.
    kept: str | None = None

    @property
    def good(self) -> bool:
        """Whether every guarantee held, and nothing but our own failures ended a worker."""
        return self.report.held and self.report.at_rest and not self.ended

    @property
    def slowest_recovery_s(self) -> float | None:
        """Of all crashes; None: there was none."""
        crashes = (each.recovered_s for each in self.failures if each.kind == Kind.CRASH)
        return max((seconds for seconds in crashes if seconds is not None), default=None)

    def held(self, guarantee: str) -> bool:
        """Whether nothing was found against one guarantee."""
        return all(section.held for section in self.report.sections if section.guarantee == guarantee)

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON; ``lost`` and ``repeated`` at the top are those of exactly once."""
        guarantees = self.report.guarantees()
        exactly_once = guarantees.get("exactly_once", {})
        kills = [each for each in self.failures if each.kind == Kind.CRASH]
        return {
            "good": self.good,
            "lost": exactly_once.get("lost"),
            "repeated": exactly_once.get("repeated"),
            "guarantees": guarantees,
            "written": dict(self.written),
            "failures": [_failure(each) for each in self.failures],
            "left_out": list(self.left_out),
            "kills": [
                {
                    "at_s": round(each.at_s, 3),
                    "worker": each.victim,
                    "pid": each.pid,
                    "recovered_s": _rounded(each.recovered_s),
                }
                for each in kills
            ],
            "slowest_recovery_s": _rounded(self.slowest_recovery_s),
            "ended_by_themselves": list(self.ended),
            "seed": self.options.seed,
            "seconds": self.options.seconds,
            "workers": self.options.workers,
            "rate": self.options.rate,
            "kept": self.kept,
            "audit": self.report.document(),
        }


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "kind": failure.kind.value,
        "at_s": round(failure.at_s, 3),
        "victim": failure.victim,
        "pid": failure.pid,
        "lasted_s": _rounded(failure.lasted_s),
        "went_on_s": {guarantee: round(seconds, 3) for guarantee, seconds in failure.went_on_s.items()},
        "given_up": failure.given_up,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def outcome(guarantee: str, figures: Mapping[str, int | None]) -> str:
    """What became of the events under ``guarantee``, in a few words; figures as of `Report.guarantees`."""
    lost, repeated, reported = (figures.get(name) for name in ("lost", "repeated", "reported"))
    if lost is None or repeated is None:
        said = "no check counts what was lost or repeated"
        return said if reported is None else f"at most {reported:,} lost, as reported; {said}"
    losses = f"{lost:,} lost" if lost else "nothing lost"
    if reported is not None:
        losses += f" (reported: at most {reported:,})"
    if not repeated:
        return f"{losses}, nothing twice"
    return f"{losses}, {repeated:,} output{'s' * (repeated != 1)} repeated"
