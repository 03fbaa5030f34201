"""The errors of the engine, named by what the caller does about them.

::

    StreamsAppError
    ├── ConfigurationError      correct the settings; nothing was started            (exit code 2)
    ├── KafkaUnreachable        bring Kafka back, or correct KAFKA_URL                (exit code 3)
    ├── NotPermitted            let the cluster permit what the text names           (exit code 1)
    ├── StartRefused            starting would break the guarantee; the text says how to decide
    ├── SlotLost                stop: another live worker holds the slot
    ├── StoreFailed             stop: this machine's disk does not keep the tables; others take over
    ├── DeadBatchError          stop touching the event: its batch was dropped
    └── BatchError              the batch in hand did not commit:
        ├── TransactionAborted      nothing took effect: rewind, go on
        │   └── OutputRefused           because of a record that no broker takes: find its event
        ├── CommitUnconfirmed       the outcome is unknown: new producer, stable offsets, restore, go on
        ├── PartitionsLost          the partitions belong to somebody else: drop, rejoin
        └── StoreCorrupted          the local copy of a table cannot be trusted: wipe, restore
"""

import click


class StreamsAppError(Exception):
    """Base of all errors of the engine."""


class ConfigurationError(StreamsAppError, click.UsageError):
    """A setting is missing or wrong; the text names it and says what to write.

    Settings are read when the app is imported, which the command line does: it shows a `click.UsageError` as a sentence.
    """


class KafkaUnreachable(StreamsAppError):
    """No broker answers at the configured address."""


class NotPermitted(StreamsAppError):
    """The cluster does not let us do what the guarantees need; the text names the ACL."""


class StartRefused(StreamsAppError):
    """Starting would break the guarantee; the text says what was found and how to decide."""


class SlotLost(StreamsAppError):
    """Another live worker holds this worker's slot: only one of the two may go on."""


class StoreFailed(StreamsAppError):
    """The disk does not take, or give, what a table needs: full, read-only, broken. Another machine's may."""


class NotHere(StreamsAppError):
    """This process does not hold the partition that was asked for, and has no copy of it yet: ask again soon."""


class DeadBatchError(StreamsAppError):
    """The event belongs to a batch that was dropped: it is, or will be, delivered again."""


class BatchError(StreamsAppError):
    """The batch in hand did not commit."""


class TransactionAborted(BatchError):
    """Nothing of the batch took effect: rewind and go on."""


class OutputRefused(TransactionAborted):
    """Nothing of the batch took effect, because it has a record that no broker takes."""


class CommitUnconfirmed(BatchError):
    """The batch may or may not have taken effect: new producer, stable offsets, restore, go on."""


class PartitionsLost(BatchError):
    """The partitions of the batch belong to another member by now: drop the batch, rejoin."""


class StoreCorrupted(BatchError):
    """The local copy of a table cannot be trusted: wipe it and restore it."""
