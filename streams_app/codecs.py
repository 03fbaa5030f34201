"""How values become bytes and back: msgspec structs natively, everything else by Faust's codecs."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
from faust.exceptions import ImproperlyConfigured, KeyDecodeError, ValueDecodeError
from faust.types import ModelT
from msgspec.inspect import CustomType, type_info

#: What Faust's codecs make besides its models; None is what JSON says.
_OF_FAUST = (None, int, float, Decimal, str, bytes)


class UndecodableError(Exception):
    """Input that cannot become an event; ``code`` and text are those of its dead letter."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Codec(NamedTuple):
    """A pair of functions; ``decode`` raises `UndecodableError`."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    #: As ``decode``, and quicker; but what cannot be decoded raises one of `NOT_QUICKLY`, whatever it is.
    quick: Callable[[bytes], Any] | None = None


#: Raised of what has to be decoded once more, with care.
NOT_QUICKLY = (TypeError, ValueError, RecursionError, msgspec.MsgspecError, UndecodableError)


#: A struct as JSON.
encode_struct: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def is_struct(kind: Any) -> bool:
    """Whether ``kind`` is a msgspec struct type."""
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def struct_codec(kind: Any) -> Codec:
    """JSON of a type that msgspec knows; its constraints are checked when decoding."""
    decoder: Callable[[bytes], Any] = msgspec.json.Decoder(kind).decode

    def decode(data: bytes) -> Any:
        try:
            return decoder(data)
        except msgspec.ValidationError as error:
            raise UndecodableError("invalid", str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UndecodableError("malformed", str(error)) from error

    return Codec(encode_struct, decode, decoder)


def _decode_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UndecodableError("malformed", f"key: {error}") from error


def key_codec(app: Any, kind: Any, serializer: Any = None) -> Codec:
    """Keys: bytes as they are, text as UTF-8, others by Faust's ``serializer``."""
    if serializer is None and kind is bytes:
        return Codec(bytes, bytes)
    if serializer is None and kind is str:
        return Codec(str.encode, _decode_text, bytes.decode)

    def encode(key: Any) -> bytes:
        data: bytes | None = app.serializers.dumps_key(kind, key, serializer=serializer)
        if data is None:
            raise TypeError("a key cannot be None")
        return data

    def decode(data: bytes) -> Any:
        try:
            return app.serializers.loads_key(kind, data, serializer=serializer)
        except KeyDecodeError as error:
            raise UndecodableError("malformed", f"key: {error}") from error

    return Codec(encode, decode)


def is_plain(serializer: Any) -> bool:
    """Whether a value is JSON, as where nothing else is said."""
    return serializer in {None, "json"}


def is_of_msgspec(kind: Any) -> bool:
    """Whether values of ``kind`` are msgspec's to read and write: structs, dataclasses, ``list[int]``.

    Raises:
        ImproperlyConfigured: msgspec does not know it either.
    """
    if is_struct(kind):
        return True
    if kind in _OF_FAUST or is_model(kind):
        return False
    if isinstance(type_info(kind), CustomType):
        raise ImproperlyConfigured(
            f"value_type={kind!r} is neither a msgspec.Struct nor a faust.Record, nor what JSON has; each value would be "
            "refused"
        )
    return True


def is_model(kind: Any) -> bool:
    """Whether ``kind`` is a model of Faust's."""
    return isinstance(kind, type) and issubclass(kind, ModelT)


def value_codec(app: Any, kind: Any, serializer: Any = None) -> Codec:
    """Values: by msgspec what is its own, and whole numbers; bytes as they are; others by Faust's ``serializer``."""
    if serializer is None and kind is bytes:
        return Codec(bytes, bytes)
    by_msgspec = is_of_msgspec(kind)
    if is_plain(serializer) and (by_msgspec or kind is int):
        return struct_codec(kind)

    def encode(value: Any) -> bytes:
        payload = msgspec.to_builtins(value) if by_msgspec else value
        data: bytes | None = app.serializers.dumps_value(kind, payload, serializer=serializer)
        if data is None:
            raise TypeError("a value cannot be None; delete the key instead")
        return data

    def decode(data: bytes) -> Any:
        try:
            payload = app.serializers.loads_value(None if by_msgspec else kind, data, serializer=serializer)
        except ValueDecodeError as error:
            raise UndecodableError("malformed", str(error)) from error
        try:
            return msgspec.convert(payload, kind) if by_msgspec else payload
        except msgspec.ValidationError as error:
            raise UndecodableError("invalid", str(error)) from error

    return Codec(encode, decode)
