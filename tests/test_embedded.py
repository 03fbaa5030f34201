"""The embedded Kafka, against the real thing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from streams_app import embedded
from streams_app.embedded import Broker, EmbeddedKafka, EmbeddedKafkaError, free_port
from tests.rig import is_frozen, wait_until

ROOT = Path(__file__).parents[1]
WAIT_S = 60


def end_brokers(datadir: Path) -> None:
    """End whatever a failed test left running below ``datadir``."""
    for home in (datadir / "kafka").glob("broker-*"):
        Broker(home, int(home.name.removeprefix("broker-"))).kill()


@pytest.fixture
def datadir(tmp_path: Path) -> Iterator[Path]:
    """A folder of the test's own."""
    yield tmp_path
    end_brokers(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for tests that leave its Kafka stopped: a start is quicker where the data folder exists."""
    datadir = tmp_path_factory.mktemp("embedded")
    yield datadir
    end_brokers(datadir)


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def address(kafka: EmbeddedKafka) -> str:
    return kafka.url.replace("kafka://", "")


def create_topic(kafka: EmbeddedKafka, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": address(kafka)})
    for future in admin.create_topics([NewTopic(name)], operation_timeout=WAIT_S).values():
        future.result(timeout=WAIT_S)


def write(kafka: EmbeddedKafka, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": address(kafka), "acks": "all"})
    producer.produce(topic, value)
    assert producer.flush(WAIT_S) == 0


def read(kafka: EmbeddedKafka, topic: str) -> bytes:
    consumer = Consumer(
        {"bootstrap.servers": address(kafka), "group.id": "test-embedded", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe([topic])
    try:
        message = consumer.poll(WAIT_S)
        assert message is not None
        assert message.error() is None
        value = message.value()
        assert value is not None
        return value
    finally:
        consumer.close()


def python(code: str) -> subprocess.Popen[str]:
    """A process of its own that runs ``code`` with our modules."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def test_what_was_written_is_read_again_after_a_restart_on_the_same_port(folder: Path) -> None:
    """A user who stops for lunch would find the topics gone, or the address in the notes wrong."""
    with EmbeddedKafka.ensure(folder, port=free_port()) as kafka:
        url = kafka.url
        create_topic(kafka, "kept")
        write(kafka, "kept", b"dear reader")
        assert read(kafka, "kept") == b"dear reader"
    assert kafka.brokers[0].pid is None
    with EmbeddedKafka.ensure(folder) as kafka:
        assert kafka.url == url
        create_topic(kafka, "also-kept")
        write(kafka, "also-kept", b"again")
        assert read(kafka, "also-kept") == b"again"
        metadata = AdminClient({"bootstrap.servers": address(kafka)}).list_topics(timeout=WAIT_S)
        assert len(metadata.topics["kept"].partitions) == 4


def test_users_who_come_at_once_share_one_broker_and_the_last_one_stops_it(folder: Path) -> None:
    """Two workers of one folder would each start a Kafka, or the first to leave would take it from the other."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: EmbeddedKafka.ensure(folder), range(2))
    pid = first.brokers[0].pid
    assert pid is not None
    assert second.brokers[0].pid == pid
    first.release()
    first.release()
    assert second.brokers[0].pid == pid
    with pytest.raises(EmbeddedKafkaError, match="is in use on port"):
        EmbeddedKafka.ensure(folder, port=free_port())
    assert second.brokers[0].pid == pid
    second.release()
    assert second.brokers[0].pid is None


def test_a_broker_whose_owner_was_killed_is_found_again(folder: Path) -> None:
    """After ``kill -9`` of the demo its Kafka would be left over for ever, and the next start fail on its lock."""
    owner = python(
        "import time, pathlib; from streams_app.embedded import EmbeddedKafka\n"
        f"kafka = EmbeddedKafka.ensure(pathlib.Path({str(folder)!r}))\n"
        "print(kafka.brokers[0].pid, flush=True); time.sleep(600)"
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()
    with EmbeddedKafka.ensure(folder) as kafka:
        assert kafka.brokers[0].pid == pid
    assert kafka.brokers[0].pid is None


def test_a_broker_that_runs_but_does_not_answer_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kafka that hangs would hang every command of the folder, and only a reader of process lists could help."""
    monkeypatch.setattr(embedded, "ANSWER_TIMEOUT_S", 1)
    with EmbeddedKafka.ensure(folder) as kafka:
        pid = kafka.brokers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_frozen(pid), "the broker froze")
        with EmbeddedKafka.ensure(folder) as second:
            assert second.url == kafka.url
            assert second.brokers[0].pid not in (None, pid)


def test_a_process_with_the_number_of_a_dead_broker_is_not_taken_for_it(datadir: Path) -> None:
    """After a reboot some innocent program has the broker's number, and we would kill it."""
    broker = Broker(datadir / "kafka" / "broker-1", 1)
    broker.home.mkdir(parents=True)
    ports = {"port": 1, "controller_port": 2}
    state = {"pid": os.getpid(), "mark": "of another time", **ports, "version": embedded.KAFKA_VERSION}
    (broker.home / "state.json").write_text(json.dumps(state))
    assert broker.pid is None
    broker.kill()


def test_another_port_is_taken_when_the_default_is_in_use(
    datadir: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has a Kafka on 9092 already could not run the demo."""
    monkeypatch.setattr(embedded, "DEFAULT_PORT", taken_port)
    said: list[str] = []
    with EmbeddedKafka.ensure(datadir, progress=said.append) as kafka:
        assert kafka.brokers[0].port != taken_port
        assert said[-1].startswith("starting Kafka")


def test_a_given_port_that_is_in_use_is_an_error(datadir: Path, taken_port: int) -> None:
    """A program that was told this port would talk to somebody else's server."""
    with pytest.raises(EmbeddedKafkaError, match=f"Port {taken_port} is taken"):
        EmbeddedKafka.ensure(datadir, port=taken_port)


def test_a_data_folder_whose_preparation_broke_off_is_prepared_again(datadir: Path) -> None:
    """A Ctrl-C in the first seconds would leave a folder that never starts again."""
    data = datadir / "kafka" / "broker-1" / "data"
    data.mkdir(parents=True)
    (data / "bootstrap.checkpoint").write_bytes(b"half")
    (data / "meta.properties").write_text("version=1\nnode.id=1\n")
    with EmbeddedKafka.ensure(datadir, port=free_port()) as kafka:
        assert kafka.brokers[0].cluster_id() is not None


def test_the_id_of_a_new_cluster_never_looks_like_an_option() -> None:
    """One first start in 64 would fail with a usage message of Kafka's tool."""
    assert not [text for text in (embedded._new_cluster_id() for _ in range(2000)) if text.startswith("-")]


def test_a_damaged_data_folder_that_holds_records_is_refused_and_kept(datadir: Path) -> None:
    """Formatting it would silently delete everything that the user wrote."""
    data = datadir / "kafka" / "broker-1" / "data"
    log = data / "transfers-0" / "00000000000000000000.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"records")
    with pytest.raises(EmbeddedKafkaError, match=f"move {data} away"):
        EmbeddedKafka.ensure(datadir, port=free_port())
    assert log.read_bytes() == b"records"


def test_without_network_and_without_a_cache_the_error_says_so(datadir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer in a train would see a stack trace of an HTTP library."""
    config = datadir / "jgo.conf"
    config.write_text(f"[repositories]\ncentral = http://127.0.0.1:{free_port()}/maven\n")
    monkeypatch.setenv("JGO_CONFIG_FILE", str(config))
    monkeypatch.setenv("JGO_CACHE_DIR", str(datadir / "cache"))
    monkeypatch.setenv("M2_REPO", str(datadir / "m2"))
    with pytest.raises(EmbeddedKafkaError, match="the Maven repository cannot be reached"):
        EmbeddedKafka.ensure(datadir)
    assert not list((datadir / "m2").rglob("*.*"))


def test_a_broker_that_dies_at_its_start_is_reported_with_the_end_of_its_log(
    datadir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user would wait for a minute and then read only that something timed out."""
    monkeypatch.setattr(embedded, "_format", lambda _nodes, _jars: None)
    with pytest.raises(EmbeddedKafkaError, match=r"ended at its start\. The end of .*broker\.log:\n") as caught:
        EmbeddedKafka.ensure(datadir, port=free_port())
    assert "meta.properties" in str(caught.value)


def test_a_broker_that_dies_of_a_full_disk_says_so(datadir: Path) -> None:
    """Hidden in 200 lines of Java, the one word that matters would be missed."""
    broker = Broker(datadir, 1)
    broker.log.write_text("ERROR Error while writing\njava.io.IOException: No space left on device\n\tat x.y\n")
    assert "is full. Make room" in str(broker._why_it_died())


def test_a_disk_with_little_room_is_refused_before_the_start(datadir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka would die in the middle of a demo instead."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage(10**9, 10**9 - 10**7, 10**7))
    with pytest.raises(EmbeddedKafkaError, match="Only 10 MB are free"):
        EmbeddedKafka.ensure(datadir)


def test_three_brokers_replicate_and_one_comes_back_after_a_kill(datadir: Path) -> None:
    """The fault lab would prove nothing if a killed broker took data with it, or never came back."""
    with EmbeddedKafka.ensure(datadir, port=free_ports_in_a_row(), brokers=3) as kafka:
        assert kafka.url == ",".join(f"kafka://127.0.0.1:{kafka.brokers[0].port + i}" for i in range(3))
        create_topic(kafka, "safe")
        admin = AdminClient({"bootstrap.servers": address(kafka)})
        # The broker that is asked may hear of the topic a moment later than the one that created it.
        deadline_s = time.monotonic() + WAIT_S
        while not (partitions := admin.list_topics("safe", timeout=WAIT_S).topics["safe"].partitions):
            assert time.monotonic() < deadline_s
        assert {len(partition.replicas) for partition in partitions.values()} == {3}
        resource = ConfigResource(ConfigResource.Type.TOPIC, "safe")
        config = admin.describe_configs([resource])[resource].result(timeout=WAIT_S)
        assert config["min.insync.replicas"].value == "2"
        victim = kafka.brokers[1]
        pid, url = victim.pid, kafka.url
        victim.kill()
        assert [broker.pid is None for broker in kafka.brokers] == [False, True, False]
        write(kafka, "safe", b"with two of three")
        victim.start()
        assert victim.pid not in (None, pid)
        assert kafka.url == url
        assert read(kafka, "safe") == b"with two of three"
        with pytest.raises(EmbeddedKafkaError, match=r"has a Kafka of 3 broker\(s\), not 1"):
            EmbeddedKafka.ensure(datadir, brokers=1)
        with EmbeddedKafka.ensure(datadir) as joined:
            assert joined.url == url
    assert [broker.pid for broker in kafka.brokers] == [None] * 3


def test_a_wire_keeps_its_ports_and_who_comes_by_it_is_sent_nowhere_else(datadir: Path) -> None:
    """The fault lab's proxies would be left out as soon as a client asks who leads a partition, or after a restart."""
    with EmbeddedKafka.ensure(datadir, port=free_port()) as kafka:
        url = kafka.url
        assert kafka.wires == ()
        create_topic(kafka, "kept")
        with pytest.raises(EmbeddedKafkaError, match=r"in use with 0 wire\(s\), not 2"):
            EmbeddedKafka.ensure(datadir, wires=2)
    with EmbeddedKafka.ensure(datadir, wires=2) as kafka:
        wires = kafka.wires
        assert kafka.url == url
        assert len({kafka.brokers[0].port, *(port for [ports] in wires for port in ports)}) == 5
        for [wire] in wires:
            admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{wire.broker}", "log_level": 0})
            metadata = admin.list_topics(timeout=WAIT_S)
            assert [broker.port for broker in metadata.brokers.values()] == [wire.advertised]
            assert "kept" in metadata.topics
    with socket.create_server(("127.0.0.1", wires[0][0].advertised)), EmbeddedKafka.ensure(datadir) as kafka:
        assert kafka.wires == wires


def free_ports_in_a_row() -> int:
    """The first of three."""
    return next(p for p in iter(free_port, 0) if embedded.is_free(p + 1) and embedded.is_free(p + 2))


def test_the_foreground_command_prints_its_address_and_stops_cleanly_on_sigterm(folder: Path) -> None:
    """Scripts that wait for the KAFKA_URL line, and process managers that stop us, would not get along with it."""
    code = "import sys; from pathlib import Path; from streams_app.embedded import run_foreground\n"
    with python(f"{code}sys.exit(run_foreground(Path({str(folder)!r})))") as command:
        assert command.stdout is not None
        line = command.stdout.readline()
        port = Broker(folder / "kafka" / "broker-1", 1).port
        assert line == f"KAFKA_URL=kafka://127.0.0.1:{port}\n"
        command.terminate()
        rest, _ = command.communicate(timeout=WAIT_S)
    assert (command.returncode, rest) == (0, "")
    assert Broker(folder / "kafka" / "broker-1", 1).pid is None


def test_the_foreground_command_fails_with_one_sentence(
    datadir: Path, taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and the reason are what a script and its reader go by."""
    assert embedded.run_foreground(datadir, port=taken_port) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"Port {taken_port} is taken")
