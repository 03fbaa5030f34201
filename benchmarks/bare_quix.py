"""Read, update a table, write one output: on Quix Streams, exactly once, as its documentation says.

Runs in an environment of its own (extras.py), by its path, and imports nothing of the project.
"""

import os
from pathlib import Path

from quixstreams import Application, State


def add_up(entry: dict, state: State) -> dict:
    """The balance behind ``entry``; the state is that of the record's key, the account."""
    balance = state.get("balance", 0) + entry["amount"]
    state.set("balance", balance)
    return {"id": entry["id"], "account": entry["account"], "balance": balance}


prefix = os.environ["KAFKA_PREFIX"]
app = Application(
    broker_address=os.environ["KAFKA_URL"].removeprefix("kafka://"),
    consumer_group=f"{prefix}bench-quix",
    processing_guarantee="exactly-once",
    commit_interval=0.1,
    auto_offset_reset="earliest",
    state_dir=Path(os.environ["STREAMS_APP_DATADIR"], os.environ["STREAMS_APP_SLOT"]),
)
entries = app.topic(f"{prefix}entries", key_deserializer="str", value_deserializer="json")
outputs = app.topic(f"{prefix}outputs", key_serializer="str", value_serializer="json")
app.dataframe(entries).apply(add_up, stateful=True).to_topic(outputs)

if __name__ == "__main__":
    app.run()
