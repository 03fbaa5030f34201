"""A process that hangs is ended; one that was frozen, or waits, is not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streams_app.errors import ExitCode
from streams_app.watchdog import Pulse, Watchdog
from tests.rig import Rig, rig, wait_until


class Fake:
    """A watchdog with a clock of our own, that only notes whom it would end."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ended: list[str] = []
        self.dog = Watchdog(end=self.ended.append, now_s=lambda: self.now_s)

    def look(self, times: int, each_s: float = 1.0) -> None:
        for _ in range(times):
            self.now_s += each_s
            self.dog.look()


def test_what_does_not_move_for_its_limit_ends_the_process() -> None:
    """And not before; half-way there, whoever asks for its health is told."""
    fake = Fake()
    fake.dog.watch("it", lambda: 1, 10)
    fake.look(6)
    assert not fake.dog.late()
    fake.look(4)
    assert fake.dog.late() == ["it has not moved for 9 s"]
    assert not fake.ended
    fake.look(4)
    assert fake.ended[0].startswith("it has not moved for 11 s")


@pytest.mark.parametrize("seen", [None, "another each time"])
def test_what_moves_or_has_nothing_to_do_ends_nothing(seen: str | None) -> None:
    """However long it goes on."""
    fake, values = Fake(), iter(range(10_000))
    fake.dog.watch("it", lambda: seen and next(values), 10)
    fake.look(1_000)
    assert not fake.ended
    assert not fake.dog.late()


def test_time_in_which_the_process_did_not_run_does_not_count() -> None:
    """A laptop that slept over night, a process that was frozen: the first look afterwards must not be its end."""
    fake = Fake()
    fake.dog.watch("it", lambda: 1, 10)
    fake.dog.end_within(20)
    fake.look(3)
    fake.look(1, each_s=8 * 3_600)
    fake.look(4)
    assert not fake.ended


def test_who_was_asked_to_end_has_so_long_and_no_longer() -> None:
    """Asked once more, the shorter time counts."""
    fake = Fake()
    fake.dog.end_within(30)
    fake.look(5)
    fake.dog.end_within(5)
    fake.dog.end_within(60)
    fake.look(4)
    assert not fake.ended
    fake.look(2)
    assert "did not in time" in fake.ended[0]


async def test_a_loop_with_work_of_any_length_comes_back_to_its_pulse() -> None:
    """What is awaited does not keep the loop; what blocks does."""
    loop = asyncio.get_running_loop()
    pulse = Pulse(lambda: loop)
    first = pulse()
    assert pulse() == first, "nothing has come through it"
    await asyncio.sleep(0)
    assert pulse() != first
    assert Pulse(lambda: None)() is None


@pytest.fixture
def balances(kafka_url: str, tmp_path: Path) -> Iterator[Rig]:
    with rig(kafka_url, tmp_path, STREAMS_APP_HANG_TIMEOUT_MS="4000") as made:
        yield made


def test_a_worker_that_hangs_ends_with_all_stacks_and_others_take_over(balances: Rig) -> None:
    """Its heartbeats go on: without the watchdog nobody else would ever get its partitions."""
    worker = balances.worker(SLEEP_S="600").wait_started()
    balances.send(50, orders={10: "block"})
    assert worker.wait() == ExitCode.HUNG
    log = worker.log.read_text()
    assert "the event loop has not moved" in log
    assert "in obey" in log, "the stack tells where"
    balances.worker("two", SLEEP_S="0").wait_started()
    balances.wait_drained()
    balances.stop()
    balances.check()


def test_a_worker_that_was_frozen_for_long_goes_on(balances: Rig) -> None:
    """By a debugger, a laptop's lid, a machine that was moved: it comes back as a zombie that does no harm, and works."""
    worker = balances.worker().wait_started()
    balances.send(100)
    worker.signal(signal.SIGSTOP)
    wait_until(lambda: worker.frozen, "it is frozen")
    frozen_until_s = time.monotonic() + 12  # three times the limit, and twice the session
    wait_until(lambda: time.monotonic() > frozen_until_s, "that long")
    worker.signal(signal.SIGCONT)
    balances.send(100)
    balances.wait_drained()
    balances.stop()
    balances.check()


def test_a_worker_whose_agent_waits_for_long_goes_on(balances: Rig) -> None:
    """It awaits: slow, and healthy."""
    worker = balances.worker(SLEEP_S="13").wait_started()
    balances.send(50, orders={10: "sleep"})
    balances.wait_drained()
    assert worker.alive
    balances.stop()
    balances.check()


def test_a_worker_that_hangs_ends_when_it_is_asked_to(balances: Rig) -> None:
    """Its loop does not hear the signal. Two of them, which may arrive as one: then it takes as long as one may."""
    worker = balances.worker(SLEEP_S="600", STREAMS_APP_HANG_TIMEOUT_MS="0").wait_started()
    balances.send(5, keys=1, orders={1: "block"})
    wait_until(lambda: worker.says("1 blocks"), "an agent blocks")
    worker.signal(signal.SIGTERM)
    worker.signal(signal.SIGTERM)
    assert worker.wait(60) == ExitCode.HUNG
    assert worker.says("was asked to end, and did not in time")


def test_last_words_that_nobody_reads_keep_no_process() -> None:
    """Its log is a pipe that is full: which may be the very reason why it hangs."""
    code = (
        "import os, threading\n"
        "from streams_app.watchdog import end_process\n"
        "threading.Thread(target=os.write, args=(2, b'x' * 1_000_000), daemon=True).start()\n"
        "end_process('it hangs')\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stderr=writing, cwd=Path(__file__).parent.parent)
    try:
        assert process.wait(60) == ExitCode.HUNG
    finally:
        process.kill()
        process.wait()
        os.close(reading)
        os.close(writing)


def test_last_words_have_the_stacks_of_all_threads() -> None:
    """In the order: why, in the form of the log, and then what each of them was doing."""
    code = (
        "import threading\n"
        "from streams_app.watchdog import end_process\n"
        "def stuck(): threading.Event().wait()\n"
        "threading.Thread(target=stuck, daemon=True).start()\n"
        "end_process('it hangs')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == ExitCode.HUNG
    first, *stacks = done.stderr.decode().splitlines()
    assert '"message":"it hangs"' in first
    assert any("in stuck" in line for line in stacks)
