"""A fault comes exactly where it was asked for: what the process would do behind it is not done."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.rig import wait_until

#: One thread comes by the named place, as commits do, while the main thread waits, as the event loop does.
SCRIPT = """
import threading
from streams_app.faults import step

def work():
    step("here")
    print("went on", flush=True)

threading.Thread(target=work).start()
"""


@contextmanager
def running(script: str, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive its test."""
    environment = {**os.environ, "STREAMS_APP_FAULT": "stop here"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=stdout, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_frozen_process_does_nothing_behind_the_place_where_it_froze() -> None:
    """Else, on a busy machine, a commit that was to stay open ends: what a test shows then is something else."""
    with ExitStack() as others:
        for _ in range(2):
            others.enter_context(running("while True: pass"))
        for _ in range(4):
            with running(SCRIPT, subprocess.PIPE) as process:
                assert process.stdout is not None
                # Told when all of its threads have stopped.
                wait_until(lambda pid=process.pid: os.waitpid(pid, os.WUNTRACED | os.WNOHANG)[0], "it froze")
                assert not select.select([process.stdout], [], [], 0)[0]
                process.send_signal(signal.SIGCONT)
                assert process.stdout.read() == b"went on\n"
