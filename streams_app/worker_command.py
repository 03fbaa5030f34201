"""The command `worker`: Faust's, without its banner where the log is read by programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from faust.cli.worker import worker as faust_worker

from streams_app.logs import wants_json

if TYPE_CHECKING:
    from streams_app.application import App


class worker(faust_worker):  # noqa: N801 - the command's name; Faust registers its subclasses by it
    """Start worker instance for given app."""

    def on_worker_created(self, worker: Any) -> None:
        """See Faust's."""
        if not wants_json(cast("App", self.app).settings.log_format):
            super().on_worker_created(worker)
