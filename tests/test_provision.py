"""What `provision` says when the brokers do not answer."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, Uuid
from confluent_kafka.admin import TopicDescription

from streams_app import app, provision
from streams_app.errors import KafkaUnreachable

TIMED_OUT = KafkaException(KafkaError(KafkaError._TIMED_OUT))


class Admin:
    """Brokers that answer as they are told to."""

    def __init__(self, topics: Exception | None, settings: Exception | None) -> None:
        self._topics = topics
        self._settings = settings

    def describe_topics(self, topics: Any, **_: Any) -> dict[str, Future[Any]]:
        return {name: _answer(self._topics, _topic(name)) for name in topics.topic_names}

    def describe_configs(self, resources: list[Any], **_: Any) -> dict[Any, Future[Any]]:
        return {resource: _answer(self._settings, {}) for resource in resources}


def _answer(error: Exception | None, value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
    return future


def _topic(name: str) -> TopicDescription:
    return TopicDescription(name, Uuid(0, 0), False, [])


@pytest.mark.parametrize(
    ("topics", "settings", "said"),
    [
        (TIMED_OUT, None, "do not say whether there is a topic"),
        (None, TIMED_OUT, "do not say which settings the topic"),
        (None, TimeoutError(), "do not say which settings the topic"),
    ],
)
def test_brokers_that_do_not_answer_are_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, topics: Exception | None, settings: Exception | None, said: str
) -> None:
    """Topics that exist would be called missing, with commands that create them; or a stack be all that is said."""
    monkeypatch.setattr(provision, "admin_of", lambda _: Admin(topics, settings))
    with pytest.raises(KafkaUnreachable, match=said):
        provision.provision(app, check=True)
