"""Tables read by pages of any worker: committed values, or the sentence that there is none to be had at the moment."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections import defaultdict
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tests.rig import Rig, Worker, rig, wait_until

WORDS = [f"w{number}" for number in range(24)]


class Asked:
    """A worker with a web server."""

    def __init__(self, made: Rig, slot: str, **env: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.worker: Worker = made.worker(slot, PORT=str(self.port), **env).wait_started()
        #: What it should not have said.
        self.failures: list[str] = []

    def count(self, word: str) -> dict[str, Any] | None:
        """What the page says; None: that it cannot say, or nobody is there to ask."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/count/{word}/", timeout=20) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                self.failures.append(f"{error.code}: {error.read()!r}")
        except OSError:
            pass
        return None


def posts(count: int) -> list[tuple[str, dict[str, Any]]]:
    return [(f"u{n % 9}", {"id": n, "text": WORDS[n % len(WORDS)]}) for n in range(count)]


def test_a_page_tells_what_was_committed_whatever_goes_on(kafka_url: str, tmp_path: Path) -> None:
    """While an agent is busy with a count, while its transaction is dropped, while its partition changes hands."""
    with rig(kafka_url, tmp_path) as made:
        made.app = "tests.apps.word_count"
        made.create_topics("posts", "words", "counted")
        one, two = Asked(made, "one", SLEEP_S="0.1"), Asked(made, "two", SLEEP_S="600")
        made.put("posts", posts(240))
        wait_until(lambda: len(made.read("counted")) == 240, "all are counted")
        wait_until(lambda: all(each.count(word) for each in (one, two) for word in WORDS), "all pages answer")
        answers = [{word: each.count(word) for word in WORDS} for each in (one, two)]
        assert answers[0] == answers[1]
        assert {answer["count"] for answer in answers[0].values() if answer} == {10}
        assert {answer["by"] for answer in answers[0].values() if answer} == {"one", "two"}

        held = next(word for word, answer in answers[0].items() if answer and answer["by"] == "two")
        made.put("posts", [("u", {"id": 1_000, "text": held, "order": "sleep"})])
        wait_until(lambda: two.worker.says(f"{held} sleeps"), "the count is in hand")
        assert one.count(held) == two.count(held) == {"word": held, "count": 10, "by": "two"}

        seen: dict[str, set[int]] = defaultdict(set)
        over = threading.Event()

        def look() -> None:
            while not over.is_set():
                for word in WORDS:
                    answer = one.count(word)
                    if answer is not None:
                        seen[word].add(answer["count"])

        looking = threading.Thread(target=look)
        looking.start()
        try:
            two.worker.kill()
            wait_until(lambda: (one.count(held) or {}).get("count") == 11, "it is counted once, elsewhere")
        finally:
            over.set()
            looking.join()
        assert seen.pop(held) <= {10, 11}
        assert seen == {word: {10} for word in WORDS if word != held}
        assert one.failures == two.failures == []
        made.stop()
