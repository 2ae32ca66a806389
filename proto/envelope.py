"""The envelope of an event: built by its publisher, checked by whoever receives it.

Rule: an envelope is made once and then stored and forwarded byte for byte. Nobody after the
publisher writes into it; what the broker knows travels in the record header (`frames.py`).
"""

from __future__ import annotations

import re
from typing import Final

from google.protobuf.message import DecodeError

from metisfl.proto.errors import PeerError
from metisfl.proto.events import PAYLOAD_BYTES_MAX
from metisfl.proto.events_pb2 import Envelope
from metisfl.proto.topics import TRANSIENT_KINDS, parse_topic

__all__ = [
    "ENVELOPE_BYTES_MAX",
    "EVENT_ID_BYTES",
    "EVENT_TYPE",
    "INTEGER_MAX",
    "build_envelope",
    "envelope_fault",
    "parse_envelope",
    "topic_fault",
]

ENVELOPE_VERSION: Final = 1
ENVELOPE_BYTES_MAX: Final = 256 * 1024
EVENT_ID_BYTES: Final = 16
EVENT_TYPE: Final = re.compile(r"[A-Z][A-Za-z0-9]{0,63}")
CORRELATION_CHARACTERS_MAX: Final = 200
INTEGER_MAX: Final = 2**63 - 1
"""SQLite's integers are signed, so nothing that is stored goes beyond this."""


def build_envelope(
    *,
    event_id: bytes,
    topic: str,
    publisher: str,
    epoch: int,
    sequence: int,
    created_unix_ns: int,
    type: str,
    correlation_id: str,
    payload: bytes,
) -> bytes:
    """Return the envelope's bytes. Raises ValueError for what a broker would refuse."""
    envelope = Envelope(
        version=ENVELOPE_VERSION,
        event_id=event_id,
        topic=topic,
        publisher=publisher,
        epoch=epoch,
        sequence=sequence,
        created_unix_ns=created_unix_ns,
        type=type,
        correlation_id=correlation_id,
        payload=payload,
    )
    if wrong := envelope_fault(envelope) or topic_fault(topic):
        raise ValueError(wrong)
    return envelope.SerializeToString()


def parse_envelope(data: bytes) -> Envelope:
    """Return the envelope, whose fields are not checked yet. Raises PeerError if it is none."""
    if len(data) > ENVELOPE_BYTES_MAX:
        raise PeerError(f"envelope has {len(data)} bytes; at most {ENVELOPE_BYTES_MAX}")
    try:
        envelope = Envelope.FromString(data)
    except DecodeError as error:
        raise PeerError(f"envelope of {len(data)} bytes is not protobuf: {error}") from error
    if not (1 <= envelope.epoch <= INTEGER_MAX and 1 <= envelope.sequence <= INTEGER_MAX):
        raise PeerError(
            f"envelope has epoch {envelope.epoch} and sequence {envelope.sequence}; allowed are "
            f"1 to {INTEGER_MAX}"
        )
    return envelope


def envelope_fault(envelope: Envelope) -> str | None:
    """Return what makes this event unacceptable, whoever sent it; `topic_fault` has the rest."""
    if envelope.version != ENVELOPE_VERSION:
        return f"envelope version {envelope.version}; known is {ENVELOPE_VERSION}"
    if len(envelope.event_id) != EVENT_ID_BYTES:
        return f"event id of {len(envelope.event_id)} bytes; it has exactly {EVENT_ID_BYTES}"
    if not EVENT_TYPE.fullmatch(envelope.type):
        return f"event type {envelope.type[:64]!r} is not a message name"
    if len(envelope.correlation_id) > CORRELATION_CHARACTERS_MAX:
        return (
            f"correlation id of {len(envelope.correlation_id)} characters; "
            f"at most {CORRELATION_CHARACTERS_MAX}"
        )
    if (size := len(envelope.payload)) > PAYLOAD_BYTES_MAX:
        return f"payload has {size} bytes; at most {PAYLOAD_BYTES_MAX}"
    return None


def topic_fault(text: str) -> str | None:
    """Return why no event can be stored under this topic, or None."""
    try:
        topic = parse_topic(text)
    except ValueError as error:
        return str(error)
    return f"topic {text!r} is transient" if topic.kind in TRANSIENT_KINDS else None
