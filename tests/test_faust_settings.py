"""Settings that somebody brings from stock Faust."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types.settings import Settings as FaustSettings

from streams_app.application import App
from streams_app.faust_settings import REFUSED, TRANSLATED, WITHOUT_EFFECT

MIGRATION = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_would_change_nothing_is_refused(name: str) -> None:
    """Somebody relies on it."""
    assert hasattr(FaustSettings, name)
    with pytest.raises(ImproperlyConfigured, match=f"{name}: "):
        App("one", **{name: 1})
    assert f"| `{name}` |" in MIGRATION


def test_all_of_them_are_told_at_once() -> None:
    """One after the other would take as many starts."""
    with pytest.raises(ImproperlyConfigured) as raised:
        App("one", producer_acks=1, stream_recovery_delay=1)
    assert re.search("producer_acks: .*\n.*stream_recovery_delay: ", str(raised.value))


def test_settings_that_have_a_variable_here_are_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app from stock Faust starts with what it says."""
    for name in ("KAFKA_URL", "STREAMS_APP_SESSION_TIMEOUT_MS"):
        monkeypatch.delenv(name, raising=False)
    app = App(
        "one",
        broker=["kafka://one:9092", "kafka://two:9092"],
        store="rocksdb://",
        broker_commit_interval=0.25,
        broker_session_timeout=timedelta(seconds=20),
        topic_partitions=12,
    )
    assert app.settings.kafka_url == "kafka://one:9092,kafka://two:9092"
    assert app.settings.commit_interval_ms == 250
    assert app.settings.session_timeout_ms == 20_000
    assert app.conf.topic_partitions == 12
    assert all(f"| `{name}` |" in MIGRATION for name in {*TRANSLATED, *WITHOUT_EFFECT} - {"url"})


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who deploys an app does not change its code."""
    monkeypatch.setenv("KAFKA_URL", "kafka://deployed:9092")
    assert App("one", broker="kafka://localhost").settings.kafka_url == "kafka://deployed:9092"
