"""The worker process: Kafka first (embedded, where no address is given), then topics, then Faust's worker."""

from __future__ import annotations

import gc
import socket
from typing import TYPE_CHECKING, Any, cast

import faust

from streams_app.commands import exit_codes
from streams_app.embedded import EmbeddedKafka, own_kafka
from streams_app.kafka import KafkaAddress
from streams_app.overlaps import check_overlaps
from streams_app.permissions import check_permissions
from streams_app.provision import create_topics, required_topics, topics_of

if TYPE_CHECKING:
    from streams_app.application import App

_FIRST_PORT = 6066


class Worker(faust.Worker):
    """`faust.Worker`, with the embedded Kafka where ``KAFKA_URL`` is unset."""

    def __init__(self, app: Any, *args: Any, **kwargs: Any) -> None:
        self._embedded: EmbeddedKafka | None = None
        with exit_codes():
            self._prepare(app)
        # What is loaded by now stays. A batch makes some ten thousand objects that live as long as it does, and no cycle that
        # it does not break when it ends: with Python's default of 700 allocations the collector would look through all of
        # them again and again, a tenth of the processor's time. What has piled up of others takes it a few milliseconds.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 10, 20)
        super().__init__(app, *args, **kwargs)

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
        if app.conf.web_enabled and not app.settings.port:
            app.conf.web_port = _free_port(app.conf.web_bind)

    async def on_start(self) -> None:
        """See `faust.Worker`."""
        await super().on_start()
        for app in cast("App", self.app).family:
            app.in_worker = True

    def stop_and_shutdown(self) -> None:
        """See `faust.Worker`; the embedded Kafka is left last, when all clients of it are closed."""
        try:
            super().stop_and_shutdown()
        finally:
            if self._embedded is not None:
                self._embedded.release()


def _free_port(host: str) -> int:
    """6066, or the next free port."""
    for port in range(_FIRST_PORT, _FIRST_PORT + 1_000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {_FIRST_PORT} on")
