"""The commands beside Faust's own: thin click functions around the modules that do the work.

Exit codes: see `streams_app.errors.ExitCode`.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from faust.cli.base import cli
from rich.console import Console
from rich.table import Table

from streams_app.audit import audit as run_audit
from streams_app.audit import audited_family
from streams_app.demo import Options as DemoOptions
from streams_app.demo_view import run_demo, verdict_panel
from streams_app.embedded import own_kafka, run_foreground
from streams_app.errors import ExitCode, StreamsAppError, exit_code
from streams_app.generate import Plan
from streams_app.generate import generate as run_generate
from streams_app.kafka import KafkaAddress
from streams_app.logs import critical_line
from streams_app.provision import create_topics, required_topics
from streams_app.provision import provision as run_provision
from streams_app.registry import checks, followers
from streams_app.settings import Settings

if TYPE_CHECKING:
    from streams_app.application import App

#: As shells say it: 128 and the number of SIGINT.
_INTERRUPTED = 130


@contextlib.contextmanager
def reached_kafka(settings: Settings) -> Iterator[KafkaAddress]:
    """The Kafka of the settings, answering; where none is named the embedded one, started if need be."""
    with contextlib.ExitStack() as held:
        if settings.kafka_url is None:
            address = KafkaAddress.parse(held.enter_context(own_kafka(settings)).url)
        else:
            address = KafkaAddress.of(settings)
        address.check()
        yield address


@contextlib.contextmanager
def exit_codes(*, as_json: bool = False) -> Iterator[None]:
    """What went wrong, as one sentence, or a line of the log, and as the contract's exit code."""
    try:
        yield
    except StreamsAppError as error:
        click.echo(critical_line(str(error)) if as_json else f"error: {error}", err=True)
        sys.exit(exit_code(error))


def console(*, plain: bool = False) -> Console:
    """Where people read; with ``plain`` stdout is left to programs."""
    return Console(stderr=plain)


def register(app: App) -> None:
    """Add the commands to ``faust -A streams_app``, for ``app``."""
    settings = app.settings

    @cli.command("broker")
    @click.option("--brokers", type=click.Choice(["1", "3"]), default=None, help="One broker, or a cluster of three.")
    @click.option("--datadir", type=click.Path(path_type=Path), default=settings.datadir, show_default=True)
    @click.option("--port", type=click.IntRange(1, 65_533), default=None, help="9092, or the next free one.")
    def broker(brokers: str | None, datadir: Path, port: int | None) -> None:
        """Run the embedded Kafka in the foreground."""
        sys.exit(run_foreground(datadir, port, None if brokers is None else int(brokers)))

    @cli.command("provision")
    @click.option("--check", is_flag=True, help="Create nothing.")
    def provision(check: bool) -> None:
        """Create the topics that are missing, compare those that exist, try a transaction."""
        with exit_codes(), reached_kafka(settings) as address:
            app.use_kafka(address)
            report = run_provision(app, check=check)
        table = Table("", "state", "")
        for finding in report.findings:
            table.add_row(finding.subject, finding.state, "good" if finding.good else "NOT GOOD")
        console().print(table)
        if report.commands:
            click.echo("What whoever runs this Kafka can do about it, by Kafka's own tools or Heroku's:\n")
            click.echo("\n".join(report.commands))
        sys.exit(ExitCode.GOOD if report.good else ExitCode.FAILED)

    @cli.command("generate")
    @click.argument("name")
    @click.option("--count", type=click.IntRange(min=1), default=None, help="Records in all; without it, until Ctrl-C.")
    @click.option("--rate", type=click.FloatRange(min=0, min_open=True), default=None, help="Records per second.")
    @click.option("--keys", type=click.IntRange(min=1), default=1_000, show_default=True, help="Different keys.")
    @click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same records.")
    def generate(name: str, count: int | None, rate: float | None, keys: int, seed: int) -> None:
        """Write generated input NAME, as an agent registered it."""
        with exit_codes():
            plan = Plan(name, count, rate, keys, seed)
            plan.generator  # noqa: B018 - an unknown name is said before Kafka is started
            with reached_kafka(settings) as address, contextlib.suppress(KeyboardInterrupt):
                app.use_kafka(address)
                create_topics(address, required_topics(app))
                run_generate(plan, address, settings.kafka_prefix, console=console())

    @cli.command("audit")
    @click.option(
        "--wait", type=click.FloatRange(min=0), default=30, show_default=True, help="Seconds to wait for rest."
    )
    @click.option("--json", "as_json", is_flag=True, help="The verdict alone on stdout; with --follow, lines of JSON.")
    @click.option("--follow", is_flag=True, help="Go on for ever: judge what is committed within seconds.")
    @click.option(
        "--metrics-port", type=click.IntRange(1, 65_535), default=None, help="With --follow: Prometheus metrics."
    )
    @click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Where they are served.")
    @click.option(
        "--interval",
        type=click.FloatRange(min=0.5),
        default=5,
        show_default=True,
        help="With --follow: seconds between lines.",
    )
    def audit(wait: float, as_json: bool, follow: bool, **options: Any) -> None:
        """Read what was committed and say whether the guarantee held."""
        sys.exit(_follow(app, as_json, **options) if follow else _audit(app, as_json, wait))

    @cli.command("demo")
    @click.option(
        "--seconds", type=click.FloatRange(min=5, max=86_400), default=45, show_default=True, help="Of input."
    )
    @click.option("--workers", type=click.IntRange(1, 16), default=2, show_default=True, help="Worker processes.")
    @click.option(
        "--kills", type=click.IntRange(0, 1_000), default=3, show_default=True, help="Workers killed by kill -9."
    )
    @click.option(
        "--rate", type=click.FloatRange(1, 1_000_000), default=1_000, show_default=True, help="Records/s of each input."
    )
    @click.option(
        "--zombies",
        type=click.IntRange(0, 100),
        default=1,
        show_default=True,
        help="Workers frozen until they are declared dead, and woken again.",
    )
    @click.option(
        "--broker-restarts",
        type=click.IntRange(0, 100),
        default=1,
        show_default=True,
        help="Kafka killed and restarted.",
    )
    @click.option("--seed", type=int, default=None, help="The same seed gives the same input and failures; else any.")
    @click.option("--json", "as_json", is_flag=True, help="The verdict alone on stdout.")
    def demo(seed: int | None, as_json: bool, **options: Any) -> None:
        """Let workers and Kafka fail while input flows, then check every committed record."""
        wanted = DemoOptions(seed=secrets.randbelow(10_000) if seed is None else seed, **options)
        with exit_codes():
            try:
                verdict = run_demo(app, wanted, console(plain=as_json))
            except KeyboardInterrupt:
                click.echo("interrupted: no verdict; everything that was started has ended", err=True)
                sys.exit(_INTERRUPTED)
        code = ExitCode.GOOD if verdict.good else ExitCode.FAILED
        if as_json:
            print_json(verdict.document())
        else:
            console().print(verdict_panel(verdict, code))
        sys.exit(code)

    from streams_app.letters_commands import register_dead_letters  # noqa: PLC0415 - it needs the helpers above

    register_dead_letters(app)

    from streams_app import worker_command  # noqa: F401, PLC0415 - it is registered by being there
    from streams_app.lab_command import register_lab  # noqa: PLC0415 - so does it

    register_lab(app)


def _audit(app: App, as_json: bool, wait_s: float) -> int:
    """Audit once; gives the exit code."""
    reading = console(plain=True).status("reading what was committed")
    with exit_codes(), reached_kafka(app.settings) as address, reading:
        report = run_audit(address, app.settings, audited_family(app), checks(), wait_s=wait_s)
    if as_json:
        print_json(report.document())
    else:
        console().print(report.table())
    return ExitCode.GOOD if report.held else ExitCode.FAILED


def _follow(app: App, as_json: bool, metrics_port: int | None, metrics_host: str, interval: float) -> int:
    """Follow until Ctrl-C or SIGTERM; gives the exit code."""
    from streams_app.follow import Auditor  # noqa: PLC0415 - the other commands do without
    from streams_app.follow_view import run, serve_metrics  # noqa: PLC0415

    with exit_codes(), reached_kafka(app.settings) as address:
        auditor = Auditor(address, app.settings, audited_family(app), followers(), app.conf.id)
        if metrics_port is not None:
            serve_metrics(auditor, metrics_host, metrics_port)
        found = run(auditor, console(), as_json=as_json, interval_s=interval)
    return ExitCode.FAILED if found else ExitCode.GOOD


def print_json(document: Any) -> None:
    """The verdict, alone on stdout."""
    click.echo(json.dumps(document, indent=2))
