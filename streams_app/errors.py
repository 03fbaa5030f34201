"""The errors of the engine, named by what the caller does about them.

::

    StreamsAppError
    ├── ConfigurationError      correct the settings; nothing was started            (exit code 2)
    ├── KafkaUnreachable        bring Kafka back, or correct KAFKA_URL                (exit code 3)
    ├── NotPermitted            let the cluster permit what the text names           (exit code 1)
    ├── StartRefused            starting would break the guarantee; the text says how to decide  (65)
    ├── SlotLost                stop: another live worker holds the slot              (exit code 75)
    ├── StoreFailed             stop: this machine's disk does not keep the tables; others take over  (74)
    ├── DeadBatchError          stop touching the event: its batch was dropped
    ├── NoAnswer                ask somebody else, or let the event fail: nobody answered its question
    └── BatchError              the batch in hand did not commit:
        ├── TransactionAborted      nothing took effect: rewind, go on
        │   └── OutputRefused           because of a record that no broker takes: find its event
        ├── CommitUnconfirmed       the outcome is unknown: new producer, stable offsets, restore, go on
        ├── PartitionsLost          the partitions belong to somebody else: drop, rejoin
        └── StoreCorrupted          the local copy of a table cannot be trusted: wipe, restore
"""

from enum import IntEnum

import click
from aiokafka.errors import KafkaConnectionError


class ExitCode(IntEnum):
    """What a process ends with. Those from 64 on are those of ``sysexits.h`` that come nearest."""

    GOOD = 0
    #: A guarantee or check failed; or what nobody foresaw.
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    #: `StartRefused`: as before, it would only be refused again.
    START_REFUSED = 65
    #: Something hung, or the process did not end in time; all stacks are on stderr.
    HUNG = 70
    STORE_FAILED = 74
    SLOT_LOST = 75


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


class NoAnswer(StreamsAppError, TimeoutError):
    """Nobody has answered an agent's question for too long (``STREAMS_APP_ANSWER_TIMEOUT_MS``); its event is not done."""


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


def exit_code(error: BaseException | None) -> ExitCode:
    """What a process ends with that ``error`` has ended."""
    codes: dict[type[BaseException], ExitCode] = {
        ConfigurationError: ExitCode.USAGE,
        KafkaUnreachable: ExitCode.UNREACHABLE,
        KafkaConnectionError: ExitCode.UNREACHABLE,
        StartRefused: ExitCode.START_REFUSED,
        StoreFailed: ExitCode.STORE_FAILED,
        SlotLost: ExitCode.SLOT_LOST,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), ExitCode.FAILED)
