"""Settings that somebody brings from stock Faust."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path

import faust
import pytest
from faust.exceptions import ImproperlyConfigured
from faust.types.settings import Settings as FaustSettings

from streams_app.application import _CLASSES, App
from streams_app.faust_settings import REFUSED, TABLE_REFUSED, TRANSLATED, WITHOUT_EFFECT
from streams_app.topics import Topic

MIGRATION = (Path(__file__).parent.parent / "docs" / "migration.md").read_text()

#: Settings that mean here what they mean in stock Faust.
_WORKS = frozenset(
    """
    agent_supervisor autodiscover blocking_timeout broker_client_id broker_request_timeout cache canonical_url
    consumer_auto_offset_reset consumer_max_fetch_size debug env_prefix HttpClient id_format key_serializer LeaderAssignor
    logging_config loghandlers Monitor origin processing_guarantee reply_create_topic reply_expires reply_to reply_to_prefix
    Schema Serializers timezone topic_allow_declare topic_disable_leader value_serializer version web
    web_application_options web_bind web_cors_options web_enabled web_graph_enabled web_host web_in_thread web_metrics_enabled
    web_router_enabled web_ssl_context web_stats_enabled web_tables_enabled web_transport worker_redirect_stdouts
    worker_redirect_stdouts_level
    """.split()  # noqa: SIM905
)


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


def test_every_setting_of_faust_is_known_here() -> None:
    """One that comes with another version of Faust might change nothing, and nobody would say so."""
    known = [_WORKS, REFUSED, TRANSLATED, WITHOUT_EFFECT, _CLASSES]
    assert sorted(name for names in known for name in names) == sorted(FaustSettings.SETTINGS)


def test_a_class_that_is_not_made_of_ours_is_refused() -> None:
    """Faust's own stream acknowledges what failed; the app would run, and lose events."""
    with pytest.raises(ImproperlyConfigured, match=r"Stream=Stream, .* streams_app.faust_adapter.Stream"):
        App("one", Stream=faust.Stream)
    with pytest.raises(ImproperlyConfigured, match="Table=Table"):
        App("one", Table="faust.Table")

    class MyTopic(Topic):
        """Somebody's."""

    assert isinstance(App("one", Topic=MyTopic).topic("t"), MyTopic)


def test_a_config_object_is_refused() -> None:
    """It would replace our classes and the broker, unseen."""
    with pytest.raises(ImproperlyConfigured, match="config_from_object"):
        App("one").config_from_object("settings")


def test_a_live_check_is_refused() -> None:
    """It would run under stock Faust's promises."""
    with pytest.raises(ImproperlyConfigured, match="audit --follow"):
        App("one").LiveCheck()


async def test_a_stream_that_nothing_would_come_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app without agents joins no group: its task would wait for ever, and say nothing."""
    app = App("one")
    topic = app.topic("in")
    monkeypatch.setattr(App, "started", True)
    with pytest.raises(ImproperlyConfigured, match="make what reads it"):
        topic.stream()

    @app.agent(topic)
    async def read(stream):
        async for _ in stream:
            pass

    assert topic.stream()


def test_older_names_of_settings_are_understood() -> None:
    """Stock Faust takes them, and an app that says them relies on it."""
    app = App("one", commit_interval=0.5, default_partitions=3)
    assert (app.settings.commit_interval_ms, app.conf.topic_partitions) == (500, 3)


@pytest.mark.parametrize("name", TABLE_REFUSED)
def test_an_option_of_a_table_that_would_change_nothing_is_refused(name: str) -> None:
    """Somebody relies on it."""
    with pytest.raises(ImproperlyConfigured, match=f"{name}: "):
        App("one").Table("t", **{name: 5})
    assert f"| `{name}` |" in MIGRATION


def test_a_table_may_name_the_stores_that_it_had() -> None:
    """Where tables are kept changes nothing of what they have; one kept elsewhere is another matter."""
    for store in "memory://", "rocksdb://", None:
        App("one").Table("t", store=store)
    with pytest.raises(ImproperlyConfigured, match="store=aerospike"):
        App("one").Table("t", store="aerospike://host")


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who deploys an app does not change its code."""
    monkeypatch.setenv("KAFKA_URL", "kafka://deployed:9092")
    assert App("one", broker="kafka://localhost").settings.kafka_url == "kafka://deployed:9092"
