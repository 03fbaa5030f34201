"""What the benchmarks need beside the project, in a folder of its own: Quix Streams and the library that draws the plots.

Quix Streams wants another version of confluent-kafka than ours, so it cannot live in the project's environment; and who
runs the tests needs neither. requirements.txt beside this file pins them; it is made of requirements.in::

    .venv/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \\
        benchmarks/requirements.in -o benchmarks/requirements.txt
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
#: Made by the benchmarks, may be deleted at any time.
FOLDER = _HERE.parent / ".streams-app" / "bench"
_LOCK = _HERE / "requirements.txt"


class Unavailable(Exception):
    """Something cannot be measured on this machine; the text says why, for people."""


@cache
def python() -> Path:
    """The interpreter of the environment; installed at the first call, and again when the lock file changes.

    Raises:
        Unavailable: it cannot be installed.
    """
    environment = FOLDER / "venv"
    interpreter, stamp = environment / "bin" / "python", environment / ".locked"
    if stamp.exists() and stamp.read_bytes() == _LOCK.read_bytes():
        return interpreter
    print("installing Quix Streams and matplotlib beside the project (once; about 300 MB)", file=sys.stderr, flush=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "-r", str(_LOCK)]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        subprocess.run([str(interpreter), *install], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"{_LOCK.name} of the benchmarks cannot be installed: {error}") from error
    stamp.write_bytes(_LOCK.read_bytes())
    return interpreter
