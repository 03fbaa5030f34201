"""What platforms read: Procfile, app.json, Dockerfile, compose.yaml; and a deployment from a clean clone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import yaml
from faust.cli.faust import cli

from streams_app.embedded import free_port
from streams_app.settings import GUARANTEES, Settings
from tests.rig import wait_until

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.md").read_text()
DEPLOYMENT = (CHECKOUT / "docs" / "deployment.md").read_text()
PROCFILE = dict(
    line.split(": ", 1) for line in (CHECKOUT / "Procfile").read_text().splitlines() if not line.startswith("#")
)
VARIABLES = set(
    re.findall(r'"((?:KAFKA|STREAMS_APP|PORT|DYNO)[A-Z_]*)"', (CHECKOUT / "streams_app/settings.py").read_text())
)


def as_run(command: str, **env: str) -> tuple[dict[str, str], list[str]]:
    """Variables and arguments of a line of the Procfile, as a shell makes them."""
    words = subprocess.run(
        ["/bin/sh", "-c", f'for word in {command}; do echo "$word"; done'],
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=.*", word)]
    return dict(word.split("=", 1) for word in variables), words[len(variables) :]


class TestFiles:
    """Nobody runs a platform in a test; what can be wrong in its files can be read."""

    def test_every_process_is_a_command_of_ours(self) -> None:
        """A platform starts it again and again, and each time it ends at once."""
        assert list(PROCFILE) == ["release", "web", "worker", *GUARANTEES]
        for name, line in PROCFILE.items():
            variables, [program, option, app, command, *_] = as_run(line)
            assert (program, option, app) == ("faust", "-A", "streams_app")
            assert command == ("provision" if name == "release" else "worker")
            assert command in cli.commands
            assert set(variables) <= VARIABLES
            guarantees = Settings.from_env(variables).guarantees
            assert guarantees == {"web": (), "worker": GUARANTEES, "release": GUARANTEES}.get(name, (name,))
            assert f"`{name}`" in DEPLOYMENT

    def test_only_the_process_that_is_routed_to_is_reached_from_outside(self) -> None:
        """On a laptop nothing listens to the network, and on a platform something has to."""
        for name, line in PROCFILE.items():
            assert "--web-bind" not in as_run(line)[1]
            there = as_run(line, DYNO=f"{name}.1")[1]
            assert (there[-2:] == ["--web-bind", "0.0.0.0"]) == (name == "web")  # noqa: S104 - in words only

    def test_a_platform_without_kafka_is_refused(self, tmp_path: Path) -> None:
        """An embedded one would take the money, and be gone with the container."""
        env = {"PATH": os.environ["PATH"], "DYNO": "worker.1", "STREAMS_APP_DATADIR": str(tmp_path)}
        for command in ("worker", "provision"):
            run = subprocess.run(
                [sys.executable, "-m", "faust", "-A", "streams_app", command],
                env=env,
                cwd=CHECKOUT,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert (run.returncode, "KAFKA_URL is not set" in run.stderr) == (2, True), run.stderr
        assert not (tmp_path / "kafka").exists()

    def test_app_json_asks_for_what_the_procfile_has(self) -> None:
        """A review app without a worker takes transfers, and never decides one."""
        app = json.loads((CHECKOUT / "app.json").read_text())
        assert set(app["formation"]) == {"web", "worker"} <= set(PROCFILE)
        assert set(app["env"]) <= VARIABLES
        assert app["env"]["STREAMS_APP_WEB_TOKEN"]["generator"] == "secret"
        assert app["buildpacks"] == [{"url": "heroku/python"}]

    def test_python_is_one_that_the_lock_file_is_for(self) -> None:
        """The platform would choose its newest."""
        version = (CHECKOUT / ".python-version").read_text().strip()
        image = re.findall(r"^FROM python:(\S+)-slim", (CHECKOUT / "Dockerfile").read_text(), re.MULTILINE)
        assert image == [version, version]
        assert 'requires-python = ">=3.11,<3.14"' in (CHECKOUT / "pyproject.toml").read_text()
        assert version in {"3.11", "3.12", "3.13"}

    def test_the_image_has_what_the_application_needs_and_no_root(self) -> None:
        """A package more in there than here, or less, is found in production."""
        instructions = [
            line.split(None, 1)
            for line in (CHECKOUT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
            if line and not line.startswith("#")
        ]
        text = dict(instructions)
        final = instructions[max(at for at, (word, _) in enumerate(instructions) if word == "FROM") :]
        copied = [rest.split() for word, rest in final if word == "COPY" and not rest.startswith("--from")]
        assert {source for source, _ in copied} == {"streams_app", "tables", "agents"}
        assert all(source == target and (CHECKOUT / source).is_dir() for source, target in copied)
        assert "--require-hashes -r requirements.txt" in text["RUN"] or any(
            "--require-hashes -r requirements.txt" in rest for word, rest in instructions if word == "RUN"
        )
        words = [word for word, _ in final]
        assert words.index("USER") > max(at for at, word in enumerate(words) if word == "RUN")
        assert text["USER"] not in {"root", "0"}
        assert text["STOPSIGNAL"] == "SIGTERM"
        assert json.loads(text["ENTRYPOINT"]) + json.loads(text["CMD"]) == ["faust", "-A", "streams_app", "worker"]
        env = dict(pair.split("=", 1) for pair in shlex.split(text["ENV"]))
        assert {name for name in env if name in VARIABLES} == {
            "PORT",
            "STREAMS_APP_DATADIR",
            "STREAMS_APP_EMBEDDED_KAFKA",
        }
        assert Settings.from_env(env).embedded_kafka is False
        ignored = (CHECKOUT / ".dockerignore").read_text().splitlines()
        assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {
            "agents",
            "streams_app",
            "tables",
            "requirements.txt",
        }

    def test_the_health_check_of_the_image_asks_and_fails(self) -> None:
        """One that cannot fail keeps a dead worker in its place."""
        text = (CHECKOUT / "Dockerfile").read_text().replace("\\\n", "")
        command = json.loads(re.findall(r"^HEALTHCHECK .*?CMD (\[.*\])$", text, re.MULTILINE)[0])
        command[0] = sys.executable
        for status, expected in ((200, True), (503, False), (None, False)):
            with answering(status) as port:
                env = {"PATH": os.environ["PATH"], "PORT": str(port)}
                run = subprocess.run(command, env=env, capture_output=True, timeout=30, check=False)
            assert (run.returncode == 0) is expected, run.stderr

    def test_compose_starts_what_it_says(self) -> None:
        """A variable with a wrong name has no effect, and is told by nobody."""
        services = yaml.safe_load((CHECKOUT / "compose.yaml").read_text())["services"]
        kafka = services["kafka"]["environment"]
        assert str(kafka["KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR"]) == "1"
        assert str(kafka["KAFKA_TRANSACTION_STATE_LOG_MIN_ISR"]) == "1"
        assert set(kafka["KAFKA_PROCESS_ROLES"].split(",")) == {"broker", "controller"}
        ours = {name: service for name, service in services.items() if name != "kafka"}
        assert set(ours) == {"provision", "web", "worker"}
        for name, service in ours.items():
            assert service["build"] == "."
            assert set(service["environment"]) <= VARIABLES
            assert service["environment"]["KAFKA_URL"] == "kafka://kafka:9092"
            assert next(iter(service.get("command", ["worker"]))) in cli.commands
            waits_for = "kafka" if name == "provision" else "provision"
            assert list(service["depends_on"]) == [waits_for]
            if name != "provision":
                assert service["hostname"] == name, "slots would be named after the container, and never found again"
                assert service["stop_grace_period"] == "35s"
                assert service["volumes"] == [f"{name}:/data"]
        assert ours["web"]["environment"]["STREAMS_APP_GUARANTEES"] == "none"
        assert all(port.startswith("127.0.0.1:") for port in ours["web"]["ports"])


@contextlib.contextmanager
def answering(status: int | None) -> Iterator[int]:
    """A web server that answers so, at /livez; or none."""
    port = free_port()
    if status is None:
        yield port
        return

    from http.server import BaseHTTPRequestHandler, HTTPServer  # noqa: PLC0415

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/livez" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = HTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Deployment:
    """A clean clone, run as the README says."""

    def __init__(self, folder: Path, programs: Path, env: dict[str, str]) -> None:
        self.clone = folder / "clone"
        git = shutil.which("git") or "git"
        subprocess.run([git, "clone", "--quiet", str(CHECKOUT), str(self.clone)], check=True)
        self.port, self.token = free_port(), uuid4().hex
        lines = {**env, "STREAMS_APP_WEB_TOKEN": self.token}
        (self.clone / ".env").write_text("".join(f'{name}="{value}"\n' for name, value in lines.items()))
        self._programs = programs
        self._log = folder / "honcho.log"
        self._honcho: subprocess.Popen[bytes] | None = None

    @property
    def env(self) -> dict[str, str]:
        """Nothing of ours but the programs, and, as Heroku has it, the application's own folder."""
        return {
            "PATH": f"{self._programs}:{os.environ['PATH']}",
            "HOME": os.environ["HOME"],
            "PYTHONPATH": str(self.clone),
        }

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """As typed in the folder."""
        words = shlex.split(command)
        return subprocess.run(
            [str(self._programs / words[0]), *words[1:]],
            cwd=self.clone,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    def start(self, command: str) -> None:
        """As typed in the folder; returns when the web server answers."""
        words = shlex.split(command.replace("6066", str(self.port)))
        with self._log.open("ab") as log:
            self._honcho = subprocess.Popen(
                [str(self._programs / words[0]), *words[1:]],
                cwd=self.clone,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until(self._answers, "the web server answers", 90)

    def _answers(self) -> bool:
        assert self._honcho is not None
        assert self._honcho.poll() is None, self.said
        with contextlib.suppress(OSError):
            return self.ask("GET", "/accounts/nobody")[0] == 404
        return False

    @property
    def said(self) -> str:
        """By all processes."""
        return self._log.read_text()

    def stop(self) -> None:
        """SIGTERM, as the platform does it; nothing is left behind."""
        assert self._honcho is not None
        processes = psutil.Process(self._honcho.pid).children(recursive=True)
        self._honcho.send_signal(signal.SIGTERM)
        self._honcho.wait(60)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive

    def end(self) -> None:
        """Whatever happened."""
        if self._honcho is not None and self._honcho.poll() is None:
            for process in psutil.Process(self._honcho.pid).children(recursive=True):
                process.kill()
            self._honcho.kill()
            self._honcho.wait()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()


class Customer(threading.Thread):
    """Moves money, one unit after the other, and asks again under the same id whenever it got no answer."""

    def __init__(self, deployment: Deployment, name: str, transfers: int) -> None:
        super().__init__()
        self.name, self.accepted, self.unanswered = name, 0, 0
        self._deployment, self._transfers = deployment, transfers
        self._over = threading.Event()

    def run(self) -> None:
        """See the class."""
        for number in range(self._transfers):
            transfer = {
                "id": f"{self.name}-{number}",
                "debit_account": "external:bank",
                "credit_account": self.name,
                "amount": 1,
                "currency": "EUR",
            }
            while not self._over.is_set() and not self._sent(transfer):
                self.unanswered += 1
                self._over.wait(0.2)
            self.accepted += 1

    def _sent(self, transfer: dict[str, Any]) -> bool:
        try:
            return self._deployment.ask("POST", "/transfers", transfer)[0] == 202
        except (OSError, http.client.HTTPException):
            return False

    def give_up(self) -> None:
        """The test is over."""
        self._over.set()
        self.join()


@pytest.fixture(params=[pytest.param("ours"), pytest.param("new", marks=pytest.mark.prove)])
def programs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where faust and honcho are: here; or in a new environment with what the platform installs, and honcho."""
    if request.param == "ours":
        return Path(sys.executable).parent
    made = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
    pip = [str(made / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--require-hashes", "-r", str(CHECKOUT / "requirements.txt")], check=True)
    subprocess.run([*pip, "honcho"], check=True)
    return made / "bin"


@pytest.mark.timeout(400)
def test_from_a_clean_clone_nothing_is_lost_or_repeated(kafka_url: str, tmp_path: Path, programs: Path) -> None:
    """Release phase, web and workers, transfers by HTTP, a SIGTERM in the middle of them, a second start, and the audit."""
    lines = re.findall(r"^honcho .*?(?=\s+#|$)", README, re.MULTILINE)
    assert lines == re.findall(r"^honcho .*$", DEPLOYMENT, re.MULTILINE)
    release, start = lines
    assert PROCFILE["release"] in release
    env = {
        "KAFKA_URL": kafka_url,
        "KAFKA_PREFIX": f"t{uuid4().hex[:8]}-",
        "STREAMS_APP_SESSION_TIMEOUT_MS": "6000",
    }
    deployment = Deployment(tmp_path, programs, env)
    customers = [Customer(deployment, f"customer-{number}", 150) for number in range(3)]
    try:
        released = deployment.run(release)
        assert released.returncode == 0, released.stdout + released.stderr
        deployment.start(start)
        for customer in customers:
            customer.start()
        wait_until(lambda: sum(customer.accepted for customer in customers) > 100, "some are accepted")
        deployment.stop()
        deployment.start(start)
        wait_until(lambda: not any(customer.is_alive() for customer in customers), "all are accepted", 120)
        assert sum(customer.unanswered for customer in customers), "the stop hit nobody"
        for customer in customers:
            path = f"/accounts/{customer.name}"
            wait_until(
                lambda path=path: deployment.ask("GET", path)[1].get("balances") == {"EUR": 150}, "the money is there"
            )
        deployment.stop()
        assert "Traceback" not in deployment.said, deployment.said[-5_000:]
        audit = deployment.run("honcho run faust -A streams_app audit --json")
        assert audit.returncode == 0, audit.stdout + audit.stderr
        assert json.loads(audit.stdout)["held"] is True
    finally:
        for customer in customers:
            if customer.is_alive():
                customer.give_up()
        deployment.end()


def test_the_first_process_of_a_container_hears_sigterm(kafka_url: str, tmp_path: Path) -> None:
    """The kernel keeps signals from it that it does not ask for: without an ear it would be killed, each time, after 35 s."""
    unshare = shutil.which("unshare")
    can = (
        unshare
        and not subprocess.run([unshare, "--pid", "--fork", "true"], capture_output=True, check=False).returncode
    )
    if not can:
        pytest.skip("needs the right to make a process namespace")
    env = {
        **os.environ,
        "KAFKA_URL": kafka_url,
        "KAFKA_PREFIX": f"t{uuid4().hex[:8]}-",
        "STREAMS_APP_DATADIR": str(tmp_path),
        "STREAMS_APP_GUARANTEES": "at_most_once",
    }
    log = tmp_path / "log"
    with log.open("wb") as file:
        worker = [sys.executable, "-m", "faust", "-A", "streams_app", "worker", "-l", "info", "--without-web"]
        outer = subprocess.Popen(
            [str(unshare), "--pid", "--fork", "--kill-child", *worker],
            env=env,
            cwd=CHECKOUT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: b"partitions started" in log.read_bytes() or outer.poll() is not None, "it has started")
        assert outer.poll() is None, log.read_text()
        [first] = psutil.Process(outer.pid).children()
        namespaces = Path(f"/proc/{first.pid}/status").read_text()
        assert re.search(rf"^NSpid:\s+{first.pid}\s+1$", namespaces, re.MULTILINE)
        first.send_signal(signal.SIGTERM)
        assert outer.wait(20) == 0, log.read_text()[-3_000:]
    finally:
        outer.kill()
        outer.wait()


def test_a_worker_needs_nothing_of_what_only_tests_need() -> None:
    """On the platform it is not there: what imports it is skipped, with a stack in the log at each start."""
    code = (
        "import logging, sys; logging.basicConfig(); sys.modules['pytest'] = None\n"
        "from streams_app import app\n"
        "app.conf.origin = 'streams_app'  # as the option -A does\n"
        "app.discover()\n"
        "assert 'agents.ledger' in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")
