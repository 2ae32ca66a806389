"""One good message of every kind of event, made from the table of limits: a new kind is in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import EVENT_TYPES, LIMITS

__all__ = ["event_samples", "sample"]

TEXTS = ("ada", "late", "r.1.train.ada", "ab" * 20)
NUMBERS = (1, 2, 0)
DIGESTS = (bytes(range(32)), bytes(16), bytes(64))


def event_samples() -> Iterator[Message]:
    return map(sample, EVENT_TYPES)


def sample(name: str) -> Message:
    """A message of this name, with something in every field."""
    message: Message = getattr(pb, name)()
    for field in message.DESCRIPTOR.fields:
        for value in _values(field):
            _set(message, field, value)
            if LIMITS[name][field.name](getattr(message, field.name)) is None:
                break
        else:
            raise AssertionError(f"{name}.{field.name}: none of the sample values is within limits")
    return message


def _values(field: FieldDescriptor) -> tuple[Any, ...]:
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return ({"test.loss": 0.25, "test.examples": 10.0},)
        return (sample(field.message_type.name),)
    if field.type == FieldDescriptor.TYPE_STRING:
        return TEXTS
    return DIGESTS if field.type == FieldDescriptor.TYPE_BYTES else NUMBERS


def _set(message: Message, field: FieldDescriptor, value: Any) -> None:
    message.ClearField(field.name)
    if isinstance(value, dict):
        getattr(message, field.name).update(value)
    elif field.is_repeated:
        getattr(message, field.name).append(value)
    elif isinstance(value, Message):
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)
