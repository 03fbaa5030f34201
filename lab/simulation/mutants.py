"""The engine, broken on purpose at each step of the commit path; and the guarantee under which the simulation must notice."""

from __future__ import annotations

from typing import NamedTuple

from lab.simulation.plan import Guarantee


class Mutant(NamedTuple):
    """A text in a file, and what stands there instead."""

    name: str
    #: From the top of the checkout.
    file: str
    before: str
    after: str
    guarantee: Guarantee
    #: At most so many histories until one shows it.
    histories: int = 10_000


SIMULATED = [
    Mutant(
        "commits without the fence of its pin",
        "streams_app/session.py",
        "        metadata = group_metadata(pin)\n",
        '        metadata = unfenced_group_metadata(Pin(pin.group_id, -1, ""))\n',
        "exactly_once",
    ),
    Mutant(
        "takes an error of the commit for an abort, and does not ask for stable offsets",
        "lab/simulation/worker.py",
        "            batch.seal()\n            self._guarantee.commit(batch)\n",
        "            batch.seal()\n            try:\n                self._guarantee.commit(batch)\n"
        "            except BatchError:\n                self._rewind()\n                return\n",
        "exactly_once",
    ),
    Mutant(
        "goes on with the producer after an error",
        # In two places: a start of partitions makes a new one, whatever the session says.
        "streams_app/guarantees.py",
        "    def open(self) -> None:\n        self.session.open()\n",
        "    def open(self) -> None:\n        if self.session._producer is None:\n            self.session.open()\n"
        "        self.session.broken = False\n",
        "exactly_once",
    ),
    Mutant(
        "publishes before the end",
        "streams_app/commit.py",
        '    step("3 end")\n    session.end()\n    step("4 publish")\n    publish(stale, written)\n',
        '    publish(stale, written)\n    step("3 end")\n    session.end()\n    step("4 publish")\n',
        "exactly_once",
    ),
    Mutant(
        "ends before the offsets",
        "streams_app/commit.py",
        '    step("2 offsets")\n    session.send_offsets(batch.offsets(), batch.pin)\n    step("3 end")\n    session.end()\n',
        '    step("3 end")\n    session.end()\n    session.begin()\n    session.send_offsets(batch.offsets(), batch.pin)\n'
        "    session.end()\n",
        "exactly_once",
    ),
    Mutant(
        "does not rewind after a dropped batch",
        "lab/simulation/worker.py",
        "            self._guarantee.forget()\n            self._rewind()\n",
        "            self._guarantee.forget()\n",
        "exactly_once",
    ),
    Mutant(
        "does not commit where the input starts",
        "streams_app/start.py",
        "            self._guarantee.claim(positions, committed, pin)\n",
        "            pass\n",
        "exactly_once",
    ),
    Mutant(
        "restores up to the last stable offset",
        "streams_app/offsets.py",
        "OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED",
        "OffsetSpec.latest(), IsolationLevel.READ_COMMITTED",
        "exactly_once",
    ),
    Mutant(
        "publishes over restored values that are not on disk",
        "streams_app/store.py",
        "        self._unlogged_writes = True\n",
        "        self._unlogged_writes = False\n",
        "exactly_once",
    ),
    Mutant(
        "starts from offsets that are not stable",
        "streams_app/offsets.py",
        '"isolation.level": "read_committed"',
        '"isolation.level": "read_uncommitted"',
        "exactly_once",
    ),
    Mutant(
        "writes a checkpoint of what was fetched, not of what was applied",
        "streams_app/restore.py",
        "for record in chunk], chunk[-1].offset)",
        "for record in chunk], chunk[-1].offset + 1)",
        "exactly_once",
    ),
    Mutant(
        "keeps the producer after a suspiciously slow commit",
        "streams_app/session.py",
        "        if time.monotonic() - started_s > _SUSPICIOUS_END_S or self._troubled.is_set():\n",
        "        if False:\n",
        "exactly_once",
    ),
    Mutant(
        "does not listen to what librdkafka tells when it is polled",
        "streams_app/session.py",
        "        self._producer.poll(0)\n        if time.monotonic() - started_s",
        "        if time.monotonic() - started_s",
        "exactly_once",
    ),
    Mutant(
        "publishes a checkpoint without the values",
        "streams_app/store.py",
        "        self._put_values(batch, writes)\n        if offset is not None:\n",
        "        if offset is not None:\n",
        "exactly_once",
    ),
    Mutant(
        "commits at most once behind the processing",
        "lab/simulation/worker.py",
        "        if self._guarantee.claims_first:\n"
        "            self._check_committable(batch, assignment)\n"
        "            self._guarantee.take(batch, self._positions)\n"
        "        self._deliver(batch, fetched, assignment)\n",
        "        self._deliver(batch, fetched, assignment)\n"
        "        if self._guarantee.claims_first:\n"
        "            self._check_committable(batch, assignment)\n"
        "            self._guarantee.take(batch, self._positions)\n",
        "at_most_once",
    ),
    Mutant(
        "forgets what predecessors gave up",
        "streams_app/guarantees.py",
        "claim.reported(before) if claim else 0",
        "0",
        "at_most_once",
    ),
    Mutant(
        "keeps what it took back for itself",
        "streams_app/guarantees.py",
        "        self._claimed = dict(positions)\n        self._say",
        "        self._say",
        "at_most_once",
    ),
    Mutant(
        "reads on from what was fetched, at most once, though it was not claimed",
        "streams_app/guarantees.py",
        "            self._commit_once(pin, {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()})\n",
        "            try:\n"
        "                self._commit_once(pin, {tp: (offset, claim.text) for tp, (offset, claim) in claims.items()})\n"
        "            except Exception:\n"
        "                pass\n",
        "at_most_once",
    ),
    Mutant(
        "commits at least once before the outputs are acknowledged",
        "streams_app/outbox.py",
        "        if failures:\n",
        "        if False:\n",
        "at_least_once",
    ),
    Mutant(
        "commits at least once before the processing",
        "streams_app/guarantees.py",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n",
        "        self._outbox = Outbox(config, retries=True, timeout_s=timeout_s)\n"
        "        self.claims_first = True\n"
        "        self.take = lambda batch, began: self.claim(batch.consumed, {}, batch.pin)\n",
        "at_least_once",
    ),
    Mutant(
        "does not fence its tables at least once",
        "streams_app/commit.py",
        "    session.send_offsets(batch.offsets(), batch.pin)\n    step",
        "    session.end()\n    session.begin()\n    session.send_offsets(batch.offsets(), batch.pin)\n    step",
        "at_least_once",
    ),
]
