"""What the figures depend on besides the code, and the file that they are kept in."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

from streams_app.embedded import KAFKA_VERSION


def write_json(file: Path | None, figures: dict[str, Any]) -> None:
    """With a word about the machine; nothing without a file."""
    if file is not None:
        machine = {"python": platform.python_version(), "cores": os.cpu_count(), "kafka": KAFKA_VERSION}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
