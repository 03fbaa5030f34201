"""Topics whose sends join the transaction of the event in hand."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import cached_property, partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, cast

import faust
import msgspec
from faust.exceptions import ImproperlyConfigured
from faust.types import FutureMessage, Message, PendingMessage, RecordMetadata

from streams_app.batch import Batch
from streams_app.codecs import (
    NOT_QUICKLY,
    Codec,
    UndecodableError,
    encode_struct,
    is_model,
    is_of_msgspec,
    is_plain,
    is_struct,
    key_codec,
    value_codec,
)
from streams_app.events import current_batch, in_hand
from streams_app.faust_adapter import record_metadata
from streams_app.session import Output, header_pairs

if TYPE_CHECKING:
    from streams_app.application import App

log = logging.getLogger(__name__)

_OFFSET_UNKNOWN = -1


def _not_quickly(_data: bytes) -> Any:
    raise TypeError


class Sent:
    """What a send from inside a batch gives: as a future that is done."""

    __slots__ = ("_metadata",)

    def __init__(self, metadata: RecordMetadata) -> None:
        self._metadata = metadata

    def __await__(self) -> Generator[Any, None, RecordMetadata]:
        yield from ()
        return self._metadata

    def done(self) -> bool:
        """It is."""
        return True

    def result(self) -> RecordMetadata:
        """Topic, and partition if one was given; the offset is not known before the commit."""
        return self._metadata


class Topic(faust.Topic):
    """`faust.Topic` with msgspec structs as values, and transactional sends from inside of agents.

    A send from an agent waits in the event's batch: its future is done at once, with offset −1, and its callback runs
    after the commit. A send from anywhere else (a timer, a web request) is produced at once and acknowledged by all
    replicas; it is never a part of somebody else's transaction.
    """

    @cached_property
    def _sent(self) -> Sent:
        return Sent(record_metadata(self._name, -1, _OFFSET_UNKNOWN, None))

    @cached_property
    def _name(self) -> str:
        """The topic's name, asked once, not for each send."""
        return self.get_topic_name()

    @cached_property
    def _text_keys(self) -> bool:
        """Whether text is its own UTF-8 as a key, as with Faust's default serializer."""
        return (getattr(self.schema, "key_serializer", None) or self.app.conf.key_serializer) == "raw"

    @cached_property
    def _codecs(self) -> tuple[Codec, Codec]:
        """Those of keys and of values."""
        schema = self.schema
        assert schema is not None
        key_serializer = schema.key_serializer if schema.key_type not in {bytes, str} else None
        return (
            key_codec(self.app, schema.key_type, key_serializer),
            value_codec(self.app, schema.value_type, schema.value_serializer),
        )

    @cached_property
    def _plain_values(self) -> bool:
        """Whether values are JSON."""
        return is_plain(getattr(self.schema, "value_serializer", None))

    @cached_property
    def _of_msgspec(self) -> bool:
        return is_of_msgspec(getattr(self.schema, "value_type", None))

    @cached_property
    def _needs_value(self) -> bool:
        kind = getattr(self.schema, "value_type", None)
        return is_struct(kind) or is_model(kind)

    def decode_message(self, message: Message) -> tuple[Any, Any]:
        """Key and value of a record.

        Raises:
            UndecodableError: one of them is not what the topic says.
        """
        keys, values = self._codecs
        key = None if message.key is None else keys.decode(message.key)
        if message.value is None:
            if not self.allow_empty and self._needs_value:
                raise UndecodableError(
                    "malformed", "the record has no value; who wants it declares the topic allow_empty"
                )
            return key, None
        return key, values.decode(message.value)

    def decode_messages(self, messages: Sequence[Message]) -> tuple[list[tuple[Any, Any]], dict[int, UndecodableError]]:
        """Of each record, key and value; and of which of them, by their place, these are none, and why."""
        keys, values = self._codecs
        decode_key, decode_value = keys.quick or keys.decode, values.quick or values.decode
        if type(self).decode_message is not Topic.decode_message:
            decode_key = _not_quickly  # a subclass has its own way
        decoded, undecodable = [], {}
        for message in messages:
            try:
                # None raises, too.
                decoded.append((decode_key(message.key), decode_value(message.value)))  # type: ignore[arg-type]
            except NOT_QUICKLY:
                try:
                    decoded.append(self.decode_message(message))
                except UndecodableError as error:
                    undecodable[len(decoded)] = error
                    decoded.append((None, None))
        return decoded, undecodable

    def encode_message(self, key: Any, value: Any) -> tuple[bytes | None, bytes | None]:
        """Key and value as the bytes of a record; bytes are taken for such already."""
        key_bytes, value_bytes, *_ = self._encode(key, value, None)
        return key_bytes, value_bytes

    def prepare_value(
        self, value: Any, value_serializer: Any = None, schema: Any = None, headers: Any = None
    ) -> tuple[Any, Any]:
        """Structs by msgspec, everything else by Faust's codecs."""
        if isinstance(value, msgspec.Struct) or (
            self._of_msgspec and not isinstance(value, bytes) and value is not None
        ):
            if value_serializer is None and schema is None and self._plain_values:
                return encode_struct(value), headers
            value = msgspec.to_builtins(value)
        return super().prepare_value(value, value_serializer, schema, headers)

    def derive_topic(self, *, prefix: str = "", **options: Any) -> Any:
        """As Faust's, for ``group_by`` and names; these begin with the settings' prefix, wherever Faust puts it."""
        derived: Any = super().derive_topic(prefix=prefix, **options)
        own = cast("App", self.app).settings.kafka_prefix
        derived.topics = [f"{own}{prefix}{name.removeprefix(prefix).removeprefix(own)}" for name in derived.topics]
        return derived

    async def send(
        self,
        *,
        key: Any = None,
        value: Any = None,
        partition: int | None = None,
        timestamp: float | None = None,
        headers: Any = None,
        callback: Callable[[FutureMessage], Any] | None = None,
        **codecs: Any,
    ) -> Awaitable[RecordMetadata]:
        """See the class; the arguments are those of `faust.Topic.send`."""
        event = in_hand.get()
        batch = None if event is None else event.batch
        if batch is None:
            place = {"partition": partition, "timestamp": timestamp, "headers": headers, "callback": callback}
            return await super().send(key=key, value=value, **place, **codecs)
        if callback is None and partition is None and timestamp is None:
            if (
                type(key) is str
                and headers is None
                and not codecs
                and isinstance(value, msgspec.Struct)
                and self._text_keys
                and self._plain_values
            ):
                batch.send_plain(self._name, key.encode(), encode_struct(value))  # the most frequent case
            else:
                batch.send(Output(self._name, *self._encode(key, value, headers, **codecs)))
            return self._sent
        return Sent(self._send_in(batch, key, value, partition, timestamp, headers, callback, **codecs).result())

    def send_soon(self, *, eager_partitioning: bool = False, **message: Any) -> FutureMessage:
        """As `send`, for those who cannot await."""
        batch = current_batch()
        if batch is None:
            return super().send_soon(eager_partitioning=eager_partitioning, **message)
        parts = [message.pop(name, None) for name in ("key", "value", "partition", "timestamp", "headers", "callback")]
        return self._send_in(batch, *parts, **message)

    async def publish_message(self, fut: FutureMessage, wait: bool = False) -> Awaitable[RecordMetadata]:
        """Faust's way out for what is sent from outside of agents; refused inside."""
        if current_batch() is not None:
            raise ImproperlyConfigured("publish_message() would leave the event's transaction; use send()")
        return await super().publish_message(fut, wait)

    def _send_in(
        self,
        batch: Batch,
        key: Any,
        value: Any,
        partition: int | None,
        timestamp: float | None,
        headers: Any,
        callback: Callable[[FutureMessage], Any] | None,
        **codecs: Any,
    ) -> FutureMessage:
        """Add the record to the batch; the future is done, the callback runs after the commit."""
        key_bytes, value_bytes, _, _, pairs = self._encode(key, value, headers, **codecs)
        timestamp_ms = None if timestamp is None else int(timestamp * 1000)
        batch.send(Output(self._name, key_bytes, value_bytes, partition, timestamp_ms, pairs))
        message = PendingMessage(self, key_bytes, value_bytes, partition, timestamp, None, None, None, callback)
        sent = FutureMessage(message)
        sent.set_result(record_metadata(self._name, -1 if partition is None else partition, _OFFSET_UNKNOWN, timestamp))
        if callback is not None:
            batch.callbacks.append(partial(self._call, callback, sent))
        return sent

    def _call(self, callback: Callable[[FutureMessage], Any], sent: FutureMessage) -> None:
        """Tell who sent it that it is committed; what they raise is logged, be it a function or a coroutine."""
        told = callback(sent)
        if isawaitable(told):
            cast("App", self.app).add_future(self._awaited(told))

    async def _awaited(self, told: Awaitable[Any]) -> None:
        try:
            await told
        except Exception:
            log.exception("the callback of a send to %s failed; the record is committed", self._name)

    def _encode(
        self,
        key: Any,
        value: Any,
        headers: Any,
        *,
        schema: Any = None,
        key_serializer: Any = None,
        value_serializer: Any = None,
        force: bool = False,
    ) -> tuple[Any, Any, None, None, Any]:
        """The parts of an `Output` behind the topic; ``force`` means nothing here: nothing is attached to offsets."""
        open_headers = None if headers is None else self.prepare_headers(headers)
        if self._text_keys and type(key) is str and key_serializer is None and schema is None:
            key_bytes: Any = key.encode()
        else:
            key_bytes, open_headers = self.prepare_key(key, key_serializer, schema, open_headers)
        value_bytes, open_headers = self.prepare_value(value, value_serializer, schema, open_headers)
        return key_bytes, value_bytes, None, None, header_pairs(open_headers) or None
