"""The command `worker`: Faust's, with the port that it was given, and without a banner where programs read the log."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from faust.cli.worker import worker as faust_worker

from streams_app.logs import wants_json

if TYPE_CHECKING:
    from streams_app.application import App


class worker(faust_worker):  # noqa: N801 - the command's name; Faust registers its subclasses by it
    """Start worker instance for given app."""

    def as_service(self, *args: Any, web_port: int | None = None, **options: Any) -> Any:
        """See Faust's. A port that was given is taken, or the worker fails: nobody would look for it at another one."""
        app = cast("App", self.app)
        if web_port is not None:
            app.settings = replace(app.settings, port=web_port)
        return super().as_service(*args, web_port=web_port, **options)

    def on_worker_created(self, worker: Any) -> None:
        """See Faust's."""
        if not wants_json(cast("App", self.app).settings.log_format):
            super().on_worker_created(worker)
