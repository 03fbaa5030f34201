"""Generated input: the same for the same seed, with what the world gets wrong in it, and all of it in Kafka."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from random import Random
from uuid import uuid4

import msgspec
import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from rich.console import Console

import agents.ledger_input  # noqa: F401 - registers the generator
from agents.ledger_input import ILL_FORMED, transfers
from streams_app.audit import Log
from streams_app.errors import ConfigurationError, KafkaUnreachable
from streams_app.generate import Feed, Plan, generate
from streams_app.kafka import KafkaAddress
from streams_app.partitioning import partition_of
from streams_app.registry import Record, find_generator
from tables.ledger import Transfer
from tests.ledger_world import UNREADABLE

COUNT = 20_000


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(Plan("transfers", COUNT, keys=200, seed=7).records())


def well_formed(records: list[Record]) -> Iterator[Transfer]:
    for record in records:
        try:
            transfer = msgspec.json.decode(record.value, type=Transfer)
        except UNREADABLE:
            continue
        if record.key == transfer.debit_account.encode() and not record.misplaced:
            yield transfer


class TestTransfers:
    """What the demo, the lab and newcomers feed the ledger with."""

    def test_the_same_seed_gives_the_same_records(self, records: list[Record]) -> None:
        """A failure could not be repeated."""
        assert list(Plan("transfers", COUNT, keys=200, seed=7).records()) == records

    def test_another_seed_gives_other_ids(self, records: list[Record]) -> None:
        """The second run on a topic would be nothing but conflicts."""
        others = list(Plan("transfers", 1_000, keys=200, seed=8).records())
        assert not {each.id for each in well_formed(others)} & {each.id for each in well_formed(records)}

    def test_the_shares_are_as_said(self, records: list[Record]) -> None:
        """The rare cases would not be rare, or not there at all."""
        good = list(well_formed(records))
        contents: dict[tuple[str, str], set[object]] = {}
        for each in good:
            contents.setdefault((each.debit_account, each.id), set()).add(
                (each.credit_account, each.amount, each.currency)
            )
        conflicting = sum(len(each) - 1 for each in contents.values())
        repeated = len(good) - sum(len(each) for each in contents.values())
        assert (COUNT - len(good)) / COUNT == pytest.approx(0.005, abs=0.002)
        assert conflicting / COUNT == pytest.approx(0.01, abs=0.003)
        assert repeated / COUNT == pytest.approx(0.02, abs=0.004)

    def test_every_kind_of_ill_formed_record_comes(self) -> None:
        """A kind that never comes is never seen to be handled."""
        only_ill = islice(transfers(Random(1), 5, ill_formed=1.0), 5, 1_500)
        assert len(Counter(record.value[-40:-10] for record in only_ill)) > len(ILL_FORMED)
        assert any(record.misplaced for record in islice(transfers(Random(1), 5, ill_formed=1.0), 1_500))

    def test_some_accounts_are_popular_and_deposits_come_first(self, records: list[Record]) -> None:
        """Without hot accounts there is no contention, without deposits only refusals."""
        good = list(well_formed(records))
        assert all(each.debit_account.startswith("external:") for each in good[:200])
        payers = Counter(each.debit_account for each in good[200:] if not each.debit_account.startswith("external:"))
        assert sum(count for _, count in payers.most_common(50)) > 0.45 * payers.total()
        assert {each.currency for each in good} == {"EUR", "USD", "GBP", "JPY"}
        assert {each.created_at is None for each in good} == {True, False}


class TestPlan:
    """Wrong usage is said before anything starts."""

    def test_an_unknown_name_is_answered_with_the_known_ones(self) -> None:
        """Somebody would have to read the code for the names."""
        with pytest.raises(ConfigurationError, match="transfers"):
            find_generator("nonsense")

    @pytest.mark.parametrize("option", ["count", "rate", "keys"])
    def test_numbers_below_one_are_refused(self, option: str) -> None:
        """A rate of 0 would hang for ever."""
        with pytest.raises(ConfigurationError, match=f"--{option}"):
            Plan("transfers", **{option: 0})  # type: ignore[arg-type]

    def test_no_broker_is_an_error_of_its_own(self) -> None:
        """The exit code could not tell a dead Kafka from a wrong option."""
        with pytest.raises(KafkaUnreachable, match=r"127\.0\.0\.1:9"):
            Feed(Plan("transfers", 1), _Impatient("127.0.0.1:9")).run(threading.Event())


class _Impatient(KafkaAddress):
    def check(self, timeout_s: float = 10.0) -> None:
        super().check(0.5)


class TestFeed:
    """Writing to a real Kafka."""

    @pytest.fixture
    def prefix(self, kafka_url: str) -> str:
        prefix = f"t{uuid4().hex[:8]}-"
        admin = AdminClient(KafkaAddress.parse(kafka_url).librdkafka())
        [created] = admin.create_topics([NewTopic(f"{prefix}transfers", 4, 1)]).values()
        created.result(timeout=30)
        return prefix

    def test_every_record_is_acknowledged_and_lies_in_the_partition_of_its_key(
        self, kafka_url: str, prefix: str
    ) -> None:
        """Records would be lost on the way, or split the balances of their accounts."""
        address = KafkaAddress.parse(kafka_url)
        out = io.StringIO()
        plan = Plan("transfers", 3_000, keys=100)
        feed = generate(plan, address, prefix, console=Console(file=out))
        assert feed.acknowledged == 3_000
        assert "3000 of 3000 records written" in out.getvalue()
        log = Log(address)
        try:
            read = list(log.read({(f"{prefix}transfers", partition): 0 for partition in range(4)}))
        finally:
            log.close()
        assert Counter((message.key(), message.value()) for message in read) == Counter(
            (record.key, record.value) for record in plan.records()
        )
        misplaced = [
            message for message in read if message.key() and partition_of(message.key(), 4) != message.partition()
        ]
        assert len(misplaced) == sum(record.misplaced for record in plan.records())

    def test_a_rate_is_kept_and_a_stop_is_heard(self, kafka_url: str, prefix: str) -> None:
        """A demo could neither pace its input nor end it."""
        feed = Feed(Plan("transfers", rate=500.0), KafkaAddress.parse(kafka_url), prefix)
        stop = threading.Event()
        thread = threading.Thread(target=feed.run, args=(stop,))
        started_s = time.monotonic()
        thread.start()
        time.sleep(2.0)
        stop.set()
        thread.join(timeout=30)
        elapsed_s = time.monotonic() - started_s
        assert not thread.is_alive()
        assert feed.acknowledged == feed.produced
        assert 200 < feed.produced <= 500 * elapsed_s + 1

    def test_a_topic_that_does_not_exist_is_an_error_and_is_not_created(self, kafka_url: str) -> None:
        """Input would go to a topic made with the broker's defaults, which no worker reads."""
        address = KafkaAddress.parse(kafka_url)
        with pytest.raises(ConfigurationError, match="provision"):
            Feed(Plan("transfers", 1), address, "absent-").run(threading.Event())
        assert "absent-transfers" not in AdminClient(address.librdkafka()).list_topics(timeout=10).topics
