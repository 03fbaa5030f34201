"""What all tests share: one real Kafka for the whole run, and the fixtures that users have, too."""

from __future__ import annotations

pytest_plugins = ["streams_app.testing"]
