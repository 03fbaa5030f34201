"""Followers of inputs each of which has one answer: what was lost, what was answered twice, how long answers took.

An input and its answer are told by a key that both have; an input that was set aside, by its place, which its dead letter
names. What is complete is forgotten at once, mostly within a chunk, so what stays on disk is what is on its way, and what is
lost. Memory, by the first byte of its keys:

===== ============================== =====================================================================================
``k`` key                            `_Open`: inputs without answer, answers without input
``p`` partition and offset of input  its key, or nothing where it has none: inputs without answer, in order
``e`` partition and offset of input  dead letters whose input was not read yet
``x`` partition and offset of input  inputs without a key that were counted as lost; their letter may come late all the same
``j`` cut, ``k`` or ``e``, key       what to judge once a cut above this one is reached
``t`` nothing                        `_Totals`
===== ============================== =====================================================================================
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import ClassVar, TypeAlias

import msgspec

from streams_app.evidence import letter_from
from streams_app.latency import Latencies
from streams_app.registry import JUDGED_AT_ONCE, Cut, Followed, Follower, Observed, due, taken_due

Place: TypeAlias = tuple[int, int]


class _Input(msgspec.Struct, array_like=True):
    """An input; place in its topic."""

    partition: int
    offset: int
    at_ms: int
    #: Whether it was counted as lost. Its answer may come late all the same.
    lost: bool = False


class _Answer(msgspec.Struct, array_like=True):
    """An answer whose input was not read yet; place in its topic, and the cut in progress."""

    partition: int
    offset: int
    at_ms: int
    cut: int


class _Open(msgspec.Struct, array_like=True):
    """What is not complete of one key."""

    inputs: list[_Input] = []
    answers: list[_Answer] = []


class _Totals(msgspec.Struct):
    inputs: int = 0
    answers: int = 0
    set_aside: int = 0
    lost: int = 0
    repeated: int = 0


class Pairs(Follower):
    """Base of such followers: `topics` are the input, the output and the dead letters, in this order."""

    #: An input is lost when it was consumed so long ago and has no answer. Answers of a transaction are there with its
    #: offset; at most once commits before it answers.
    settle_s: ClassVar[float] = 0.0
    #: Whether what is lost is an anomaly. At most once may lose.
    may_lose: ClassVar[bool] = False

    def input_key(self, record: Observed) -> str | None:
        """What tells an input; None: it is ill-formed and must be set aside."""
        raise NotImplementedError

    def answer_key(self, record: Observed) -> str | None:
        """What tells an answer's input; None: it does not have its form."""
        raise NotImplementedError

    def __init__(self, followed: Followed) -> None:
        super().__init__(followed)
        stored = self.memory.get([b"t"]).get(b"t")
        self._totals = _totals.decode(stored) if stored else _Totals()
        self._input, self._output, _ = self.topics
        self._latencies = Latencies()
        #: When cuts were asked for, and what was consumed; after a restart that is waited for anew.
        self._cuts: deque[tuple[float, Mapping[tuple[str, int], int]]] = deque()
        self._open: dict[bytes, _Open] = {}

    # -- chunks

    def observe(self, records: Sequence[Observed]) -> None:
        """Take note of a chunk."""
        self._open = {}
        ill: list[Place] = []
        letters: list[tuple[Place, Observed]] = []
        whole = self.followed.settings.kafka_prefix + self._input
        for record in records:
            if record.topic == self._input:
                self._observe_input(record, ill)
            elif record.topic == self._output:
                self._observe_answer(record)
            elif (letter := letter_from(whole, record)) is not None:
                letters.append((letter.where, record))
        self._keep(ill)
        self._close_by_letters(letters)
        self.memory.put(b"t", _encode(self._totals))

    def _observe_input(self, record: Observed, ill: list[Place]) -> None:
        self._totals.inputs += 1
        key = self.input_key(record)
        if key is None:
            ill.append((record.partition, record.offset))
            return
        each = _Input(record.partition, record.offset, record.timestamp_ms)
        self._of(key).inputs.append(each)

    def _observe_answer(self, record: Observed) -> None:
        self._totals.answers += 1
        key = self.answer_key(record)
        if key is None:
            self.memory.report("unreadable", f"{record} is not of the form that we write")
            return
        answer = _Answer(record.partition, record.offset, record.timestamp_ms, self.memory.cut)
        self._of(key).answers.append(answer)

    def _of(self, name: str) -> _Open:
        key = b"k" + name.encode(errors="surrogatepass")
        found = self._open.get(key)
        if found is None:
            found = self._open[key] = _Open([], [])
        return found

    def _match(self, each: _Open) -> list[_Input]:
        """Take out inputs with their answers; gives those inputs."""
        count = min(len(each.inputs), len(each.answers))
        if not count:
            return []
        matched, each.inputs = each.inputs[:count], each.inputs[count:]
        for input, answer in zip(matched, each.answers, strict=False):
            self._latencies.add(input.at_ms, answer.at_ms)
            self._totals.lost -= input.lost
        each.answers = each.answers[count:]
        return matched

    def _keep(self, ill: Sequence[Place]) -> None:
        """Put what this chunk leaves incomplete together with what earlier ones did."""
        put, came = self.memory.put, [*ill]
        # Of all keys, though most are complete within the chunk: the answer to an earlier input may stand beside a later one.
        stored = self.memory.get(self._open)
        for key, each in self._open.items():
            before = _opens.decode(stored[key]) if key in stored else _Open([], [])
            known = len(before.inputs)
            each.inputs, each.answers = before.inputs + each.inputs, before.answers + each.answers
            matched = self._match(each)
            for input in matched[:known]:
                put(_place(b"p", (input.partition, input.offset)), None)
            for input in each.inputs[max(0, known - len(matched)) :]:
                put(_place(b"p", (input.partition, input.offset)), key)
                came.append((input.partition, input.offset))
            for answer in each.answers:
                put(due(answer.cut, key), b"")
            if key in stored or each.inputs or each.answers:
                self._put(key, each)
        for place in ill:
            put(_place(b"p", place), b"")
        self._close_by_early_letters(came)

    def _close_by_early_letters(self, came: Sequence[Place]) -> None:
        for early in self.memory.get({_place(b"e", place) for place in came}):
            self.memory.put(early, None)
            name = b"p" + early[1:]
            self._close(name, self.memory.get([name]).get(name))

    def _stored(self, key: bytes) -> _Open:
        return _opens.decode(self.memory.get([key]).get(key, b"[[],[]]"))

    def _put(self, key: bytes, each: _Open) -> None:
        self.memory.put(key, _encode(each) if each.inputs or each.answers else None)

    def _close_by_letters(self, letters: Sequence[tuple[Place, Observed]]) -> None:
        places = {place for place, _ in letters if min(place) >= 0}
        found = self.memory.get(_place(kind, place) for place in places for kind in (b"p", b"x"))
        for place, record in letters:
            if min(place) < 0:
                continue  # written by somebody else
            self._totals.set_aside += 1
            name = _place(b"p", place)
            if name in found:
                self._close(name, found.pop(name))
            elif found.pop(late := _place(b"x", place), None) is not None:
                self.memory.put(late, None)
                self._totals.lost -= 1
            elif (other := self._same_as(place, record)) is not None:
                self._close(*other)
            else:
                early = _place(b"e", place)
                self.memory.put(early, record.timestamp_ms.to_bytes(8, signed=True) + str(record).encode())
                self.memory.put(due(self.memory.cut, early), b"")

    def _same_as(self, place: Place, letter: Observed) -> tuple[bytes, bytes] | None:
        """An input without answer that has the same key: the answer of that one was taken for this one's."""
        name = self.input_key(letter._replace(topic=self._input, partition=place[0], offset=place[1]))
        key = b"k" + (name or "").encode(errors="surrogatepass")
        inputs = self._stored(key).inputs
        if name is None or not inputs:
            return None
        return _place(b"p", (inputs[0].partition, inputs[0].offset)), key

    def _close(self, name: bytes, key: bytes | None) -> None:
        """The input at this place was set aside: nothing is missing of it."""
        self.memory.put(name, None)
        if not key:
            return
        each = self._stored(key)
        place = int.from_bytes(name[1:5]), int.from_bytes(name[5:])
        self._totals.lost -= sum(one.lost for one in each.inputs if (one.partition, one.offset) == place)
        each.inputs = [one for one in each.inputs if (one.partition, one.offset) != place]
        self._put(key, each)

    # -- cuts

    def cut(self, cut: Cut) -> None:
        """Judge what is still incomplete."""
        for key, value in taken_due(self.memory, cut).items():
            if key[:1] == b"e":
                self._judge_letter(key, value, cut)
            else:
                self._judge_answers(key, _opens.decode(value), cut)
        self._judge_inputs(cut)
        self.memory.put(b"t", _encode(self._totals))

    def _judge_letter(self, key: bytes, value: bytes, cut: Cut) -> None:
        self.memory.put(key, None)
        self._totals.set_aside -= 1
        if int.from_bytes(value[:8], signed=True) > cut.horizon_ms:
            self._totals.repeated += 1
            self.memory.report("repeated", f"{value[8:].decode()}: set aside again, or after it had its answer")

    def _judge_answers(self, key: bytes, each: _Open, cut: Cut) -> None:
        """Answers without input, and not for want of reading."""
        gone = [answer for answer in each.answers if answer.cut < cut.number]
        each.answers = [answer for answer in each.answers if answer.cut >= cut.number]
        self._put(key, each)
        for answer in gone:
            if answer.at_ms > cut.horizon_ms:
                self._totals.repeated += 1
                where = f"{self._output}[{answer.partition}]@{answer.offset}"
                self.memory.report("repeated", f"{where}: {key[1:].decode()} was answered again, or was never asked")

    def _judge_inputs(self, cut: Cut) -> None:
        """Inputs that were consumed, and have no answer."""
        now_s = time.monotonic()
        self._cuts.append((now_s, cut.committed))
        while len(self._cuts) > 1 and self._cuts[1][0] <= now_s - self.settle_s:
            self._cuts.popleft()
        asked_s, committed = self._cuts[0]
        if asked_s > now_s - self.settle_s:
            return
        for partition in range(self.followed.partitions.get(self._input, 0)):
            consumed = committed.get((self._input, partition), 0)
            places = self.memory.scan(_place(b"p", (partition, 0)), _place(b"p", (partition, consumed)))
            for name, key in [*islice(places, JUDGED_AT_ONCE)]:
                self._lose(name, key, cut)

    def _lose(self, name: bytes, key: bytes, cut: Cut) -> None:
        self.memory.put(name, None)
        place = int.from_bytes(name[1:5]), int.from_bytes(name[5:])
        at_ms = None
        if key:
            each = self._stored(key)
            for one in each.inputs:
                if (one.partition, one.offset) == place:
                    one.lost, at_ms = one.at_ms > cut.horizon_ms, one.at_ms
            each.inputs = [one for one in each.inputs if (one.partition, one.offset) != place or one.lost]
            self._put(key, each)
        elif any(self.followed.starts.values()):
            return
        if at_ms is not None and at_ms <= cut.horizon_ms:
            return  # believed: its answer may have been deleted before we came
        self._totals.lost += 1
        if not key:
            self.memory.put(_place(b"x", place), b"")
        if not self.may_lose:
            where = f"{self._input}[{place[0]}]@{place[1]}"
            self.memory.report("lost", f"{where} was consumed, and has neither an answer nor a dead letter")

    def figures(self) -> Mapping[str, int | Mapping[str, int]]:
        """See `Follower.figures`."""
        totals = self._totals
        return {
            "inputs_total": totals.inputs,
            "answers_total": totals.answers,
            "set_aside": totals.set_aside,
            "lost": totals.lost,
            "repeated": totals.repeated,
            "latency_ms": self._latencies.figures(),
        }


def _place(kind: bytes, place: Place) -> bytes:
    return kind + place[0].to_bytes(4) + place[1].to_bytes(8)


# JSON, as in the ledger's follower: numbers of any size.
_encode = msgspec.json.Encoder().encode
_opens = msgspec.json.Decoder(_Open)
_totals = msgspec.json.Decoder(_Totals)
