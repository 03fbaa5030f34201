"""The worker process: Kafka first (embedded, where no address is given), then topics, then Faust's worker.

How it ends: the first SIGTERM or SIGINT has batches in hand finished and committed, the groups left, and the stores closed; a
second one has what agents have in hand dropped, to be processed elsewhere. Whatever happens, the watchdog ends the process
`END_WITHIN_S` after the first one. Its exit code says why it ended (`streams_app.errors.ExitCode`).
"""

from __future__ import annotations

import errno
import gc
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from streams_app.commands import exit_codes
from streams_app.embedded import EmbeddedKafka, own_kafka
from streams_app.errors import ConfigurationError, exit_code
from streams_app.faust_adapter import HostWorker, consumer_loop
from streams_app.kafka import KafkaAddress
from streams_app.logs import configuration, wants_json
from streams_app.overlaps import check_overlaps
from streams_app.permissions import check_permissions
from streams_app.provision import create_topics, required_topics, topics_of

if TYPE_CHECKING:
    from streams_app.application import App

_FIRST_PORT = 6066
#: From the first signal on, and from the second: platforms kill after 30 s.
END_WITHIN_S, HURRIED_END_WITHIN_S = 28.0, 8.0
#: A commit takes several steps, each of which has the transaction's time-out.
_STEPS_OF_A_COMMIT = 6


class Worker(HostWorker):
    """`faust.Worker`, with the embedded Kafka where ``KAFKA_URL`` is unset."""

    _was_asked_to_stop = False

    def __init__(self, app: Any, *args: Any, **kwargs: Any) -> None:
        self._embedded: EmbeddedKafka | None = None
        as_json = wants_json(app.settings.log_format)
        with exit_codes(as_json=as_json):
            self._prepare(app)
        # What is loaded by now stays. A batch makes some ten thousand objects that live as long as it does, and no cycle that
        # it does not break when it ends: with Python's default of 700 allocations the collector would look through all of
        # them again and again, a tenth of the processor's time. What has piled up of others takes it a few milliseconds.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 10, 20)
        if as_json and not app.conf.logging_config:
            kwargs["logging_config"] = configuration(kwargs.get("loglevel"), kwargs.get("logfile"))
        super().__init__(app, *args, **kwargs)
        if as_json:
            self.spinner = None

    def _prepare(self, app: Any) -> None:
        check_overlaps(app.family)
        if app.settings.kafka_url is None:
            self._embedded = own_kafka(app.settings)
            app.use_kafka(KafkaAddress.parse(self._embedded.url))
        app.kafka.check()
        create_topics(app.kafka, required_topics(app))
        if self._embedded is None:
            running = [each for each in app.family if each.runs_here]
            check_permissions(app, {spec.name for each in running for spec in topics_of(each)})
        settle_port(app)

    async def on_start(self) -> None:
        """See `faust.Worker`."""
        await super().on_start()
        main = cast("App", self.app)
        for app in main.family:
            app.in_worker = True
        self._watch(main)

    def _watch(self, main: App) -> None:
        limit_s = main.settings.hang_timeout_ms / 1000
        if limit_s:
            main.watchdog.watch_loop("the event loop", lambda: self.loop, limit_s)
            for app in main.family:
                if app.runs_here:
                    self._watch_engine(app, limit_s)
        main.watchdog.start()

    def _watch_engine(self, app: App, limit_s: float) -> None:
        # Made here, not by the watchdog's thread, which would be the wrong one.
        watchdog, engine = app.family[0].watchdog, app.engine
        watchdog.watch_loop(f"the consumer of {app.guarantee}", lambda: consumer_loop(app), limit_s)
        commit_s = max(limit_s, _STEPS_OF_A_COMMIT * app.settings.transaction_timeout_ms / 1000)
        watchdog.watch(f"the commit of {app.guarantee}", lambda: engine.committing, commit_s)

    def install_signal_handlers(self) -> None:
        """See `mode.Worker`: those run in the event loop. Ours runs in any Python code, if the loop does not turn."""
        super().install_signal_handlers()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
            signal.siginterrupt(number, False)

    def _note_signal(self, _number: int, _frame: FrameType | None) -> None:
        within_s = HURRIED_END_WITHIN_S if self._was_asked_to_stop else END_WITHIN_S
        self._was_asked_to_stop = True
        cast("App", self.app).watchdog.end_within(within_s)

    def on_worker_shutdown(self) -> None:
        """See `faust.Worker`. Also of one that crashes: a thread of it that goes on would keep the process, and its slot."""
        cast("App", self.app).watchdog.end_within(END_WITHIN_S)
        super().on_worker_shutdown()

    def on_asked_to_stop(self, *, again: bool) -> None:
        """See `HostWorker`."""
        main = cast("App", self.app)
        if again:
            self.log.warning("asked to end once more: what agents have in hand is dropped, to be processed again")
            for app in main.family:
                if app.runs_here:
                    app.engine.hurry()

    def execute_from_commandline(self) -> NoReturn:
        """See `faust.Worker`; the exit code says why it ended."""
        try:
            super().execute_from_commandline()
        except SystemExit as ended:
            if not ended.code:
                raise
            # What it crashed of; or, if it did not come to that, what was being handled.
            sys.exit(exit_code(self.crash_reason or ended.__context__))

    def stop_and_shutdown(self) -> None:
        """See `faust.Worker`; the embedded Kafka is left last, when all clients of it are closed."""
        try:
            super().stop_and_shutdown()
        finally:
            if self._embedded is not None:
                self._embedded.release()


def settle_port(app: App) -> None:
    """Have the web server listen at 6066, or the next free port, unless it was given one.

    Raises:
        ConfigurationError: there is no such address, or no free port.
    """
    if not app.conf.web_enabled or app.settings.port:
        return
    try:
        found = socket.getaddrinfo(app.conf.web_bind, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(f"the web server cannot listen at {app.conf.web_bind!r}: {error.strerror}") from error
    addresses = {(family, address) for family, _, _, _, address in found}
    for port in range(_FIRST_PORT, _FIRST_PORT + 1_000):
        if not any(_is_taken(family, (address[0], port, *address[2:])) for family, address in addresses):
            app.conf.web_port = port
            return
    raise ConfigurationError(f"no free port from {_FIRST_PORT} on; set PORT")


def _is_taken(family: int, address: tuple[Any, ...]) -> bool:
    """Whether somebody listens there; what else is wrong with the address the server says when it starts."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # As the server does it: who listens to IPv4 only is in nobody's way.
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False
