"""What the metadata of an at-most-once offset says: how much is in hand, and how much was given up before.

The offset is committed before its events are delivered. Whoever comes next cannot know how many of them the worker was
through with when it died; it knows where the batch began, and so the most that can be lost. The sum of that travels with the
offset: no crash can lose it, and anybody who reads the group's offsets can tell.
"""

from __future__ import annotations

from typing import NamedTuple, Self


class Claim(NamedTuple):
    """One partition's."""

    member_id: str
    #: Offset at which the batch in hand begins; the committed offset itself when nothing is in hand.
    began: int
    #: Events of this partition that workers may have lost, in all.
    given_up: int

    @property
    def text(self) -> str:
        """The metadata; with a zero byte at its end, as librdkafka writes it and, reading it, relies on."""
        return f"{self.member_id} {self.began} {self.given_up}\0"

    @classmethod
    def parse(cls, metadata: str | None) -> Self | None:
        """The claim that ``metadata`` holds; None: it was not written by us."""
        parts = (metadata or "").rstrip("\0").split(" ")
        if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]))

    def reported(self, committed: int) -> int:
        """The most that was lost of this partition, if whoever committed ``committed`` is gone."""
        return self.given_up + max(0, committed - self.began)
