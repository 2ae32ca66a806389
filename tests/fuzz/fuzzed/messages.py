"""Events and the broker's frames: what is refused is a PeerError, what is taken comes back."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from fuzzed.mutation import behind, in_parts, protobuf
from fuzzed.samples import event_samples
from fuzzed.target import Target, joined, parts_of, refused
from metisfl.broker.feed import _opened
from metisfl.broker.status import BrokerStatus, pack_status, parse_status
from metisfl.proto import enrolment as j
from metisfl.proto import envelope as e
from metisfl.proto import frames as f
from metisfl.proto import live_frames as lf
from metisfl.proto import topics
from metisfl.proto.errors import PeerError
from metisfl.proto.events import EVENT_TYPES, PAYLOAD_BYTES_MAX, decode, encode
from metisfl.proto.events_pb2 import Hello, Welcome

__all__ = ["TARGETS"]

NAMES = sorted(EVENT_TYPES)
FIELDS = ("event_id", "topic", "publisher", "epoch", "sequence", "created_unix_ns", "type")
FIELDS += ("correlation_id", "payload")
REPAIR = 1


def envelope(data: bytes) -> bool:
    with refused(PeerError):
        parsed = e.parse_envelope(data)
        if wrong := e.envelope_fault(parsed) or e.topic_fault(parsed.topic):
            raise PeerError(wrong)
        found = {name: getattr(parsed, name) for name in FIELDS}
        again = e.parse_envelope(e.build_envelope(**found))
        assert {name: getattr(again, name) for name in FIELDS} == found
        return True
    return False


def envelopes() -> Iterator[bytes]:
    for message in event_samples():
        name, payload = encode(message)
        yield _envelope(name, payload)


def _envelope(name: str, payload: bytes) -> bytes:
    return e.build_envelope(
        event_id=bytes(range(16)),
        topic="f/done/ada/",
        publisher="learner:ada",
        epoch=3,
        sequence=7,
        created_unix_ns=10**18,
        type=name,
        correlation_id="r.1.train.ada",
        payload=payload,
    )


def event(data: bytes) -> bool:
    """The first byte says which event; one number more is an unknown one."""
    kinds = [*NAMES, "Nobody"]
    with refused(PeerError):
        message = decode(kinds[data[0] % len(kinds)] if data else "", data[1:])
        message.DiscardUnknownFields()  # of a newer peer; what is passed on is the envelope
        assert decode(*encode(message)) == message
        _read(message)
        return True
    return False


def _read(message: Message) -> None:
    """Whatever was taken can be read and shown."""
    str(message)
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            getattr(message, field.name).encode()


def events() -> Iterator[bytes]:
    for message in event_samples():
        name, payload = encode(message)
        yield bytes([NAMES.index(name)]) + payload


def request(data: bytes) -> bool:
    """What a client sends to the broker, a publish included."""
    parts = parts_of(data)
    with refused(PeerError):
        if parts and parts[0] == f.PUBLISH:
            crc, content = f.parse_publish(parts)
            assert (crc, content) == (int.from_bytes(parts[1], "little"), parts[2])
            return True
        found = f.parse_request(parts)
        assert f.parse_request(_packed(found)) == found
        return True
    return False


def _packed(found: f.Request) -> list[bytes]:
    match found:
        case Hello():
            return f.pack_hello(found)
        case f.Fetch():
            return f.pack_fetch(found)
        case f.CursorReport():
            return f.pack_cursor(found)
        case lf.Beat():
            return f.pack_beat(found)
        case f.Receipt():
            return f.pack_receipt(found)
        case f.StatusRequest():
            return [f.STATUS]


def requests() -> Iterator[bytes]:
    good = _envelope("TaskFailed", b"")
    yield joined([f.PUBLISH, f.pack_crc(good), good])
    yield joined(f.pack_hello(Hello(protocol=1, software="metisfl", epoch=3)))
    yield joined(f.pack_fetch(f.Fetch(1, 0, 256, "f/")))
    yield joined(f.pack_receipt(f.Receipt(4)))
    yield joined(f.pack_cursor(f.CursorReport(9, "f/task/ada/")))
    yield joined(f.pack_beat(lf.Beat("f/beat/ada/", "Heartbeat", b"\x0a\x03ada")))
    yield joined([f.STATUS])


def reply(data: bytes) -> bool:
    """What the broker sends to a client; the first bit repairs the checksums of records."""
    parts = parts_of(data[1:])
    if data[:1] and data[0] & REPAIR and parts and parts[0] == f.BATCH:
        for place in range(3, len(parts) - 1, 3):
            parts[place] = _repaired(parts[place], parts[place + 1])
    with refused(PeerError):
        found = f.parse_reply(parts)
        if isinstance(found, f.FetchedBatch):
            for record in found.records:
                _open(record)
            packed = [part for r in found.records for part in _wire(r)]
            marks = found.request, found.head, found.through, found.floor, found.receipt
            assert f.parse_reply(f.pack_batch(*marks, packed)) == found
        elif not isinstance(found, f.Reject | f.Busy):  # their words may have been cut
            assert f.parse_reply(f.pack_reply(found)) == found
        return True
    return False


def replies() -> Iterator[bytes]:
    head = bytes([REPAIR])
    for one in (
        f.SayHello(),
        Welcome(protocol=1, software="metisfl", incarnation=5, head=9, principal="learner:ada"),
        f.Ack(3, 7),
        f.Nack(3, 6),
        f.Reject(f.POISON, 7, "why"),
        f.Busy(50, 1, "why"),
        f.StatusAnswer(b"{}"),
    ):
        yield head + joined(f.pack_reply(one))
    records = [part for number in (1, 2) for part in _wire(_record(number))]
    yield head + joined(f.pack_batch(1, 2, 2, 0, 4, records))


def enrolment(data: bytes) -> bool:
    """What an invitation's key lets a site ask, and the answer."""
    parts = parts_of(data)
    taken = False
    with refused(PeerError):
        ask = j.parse_ask(parts)
        assert j.pack_ask(ask) == parts
        taken = True
    with refused(PeerError):
        answer = j.parse_answer(parts)
        assert answer.state in (j.WAITING, j.ADMITTED, j.REFUSED)
        taken = True
    return taken


def enrolments() -> Iterator[bytes]:
    yield joined([j.ENROL, bytes(range(32)), bytes(32)])
    yield joined(j.pack_answer(j.Answer(j.REFUSED, "expired")))


def live(data: bytes) -> bool:
    """What subscribers get; the first bit repairs the checksum of a record."""
    parts = parts_of(data[1:])
    if data[:1] and data[0] & REPAIR and len(parts) == 3:
        parts[1] = _repaired(parts[1], parts[2])
    with refused(PeerError):
        found = lf.parse_live(parts)
        if isinstance(found, lf.RawRecord):
            assert lf.parse_live(_wire(found)) == found
            found.topic.decode()
            _open(found)
        elif isinstance(found, lf.Beat):
            assert lf.parse_live(lf.pack_live_beat(found)) == found
        elif not found.link_up:
            assert lf.parse_live(lf.pack_head(found)) == found
        return True
    return False


def lives() -> Iterator[bytes]:
    head = bytes([REPAIR])
    yield head + joined(_wire(_record(1)))
    yield head + joined(lf.pack_live_beat(lf.Beat("f/beat/ada/", "Heartbeat", b"\x0a\x03ada")))
    yield head + joined(lf.pack_head(lf.Head(5, 9)))
    yield head + joined([b"".join(lf.pack_head(lf.Head(5, 9)))])


def _record(sequence: int) -> lf.RawRecord:
    content = _envelope("TaskFailed", b"")
    header = lf.Header(zlib.crc32(content), 5, sequence, sequence - 1, sequence - 1, 10**18)
    return lf.RawRecord(b"f/done/ada/", header, content)


def _wire(record: lf.RawRecord) -> list[bytes]:
    return [record.topic, lf.pack_header(record.header), record.envelope]


def _repaired(header: bytes, content: bytes) -> bytes:
    return header[:4] + f.pack_crc(content) + header[8:]


def _open(record: lf.RawRecord) -> None:
    """What a reader does with a record; an envelope that is none ends its connection."""
    assert max(record.header) <= e.INTEGER_MAX, "a reader keeps its place in SQLite"
    with refused(PeerError):
        _opened(record)


def topic(data: bytes) -> bool:
    with refused(ValueError):
        text = data.decode()
        topics.lane_of_federation(text)
        assert text.endswith("/")
        if text.count("/") > 1:
            assert str(topics.parse_topic(text)) == text
        return True
    return False


def topic_texts() -> Iterable[bytes]:
    return [b"f/", b"f/done/ada/", topics.run_topic("f").encode()]


def status(data: bytes) -> bool:
    with refused(PeerError):
        found = parse_status(data)
        assert parse_status(pack_status(found)) == found or len(found.connections) > 1000
        return True
    return False


def statuses() -> Iterable[bytes]:
    by_type: dict[str, Any] = {"int": 7, "bool": True, "str": "words"}
    values = {each.name: by_type.get(str(each.type), {"ada": 1}) for each in fields(BrokerStatus)}
    yield pack_status(BrokerStatus(**values))


TARGETS = (
    Target("envelope", envelope, envelopes, e.ENVELOPE_BYTES_MAX + 64, protobuf),
    Target("events", event, events, PAYLOAD_BYTES_MAX + 64, behind(1, protobuf)),
    Target("ingress", request, requests, f.MESSAGE_BYTES_MAX + 64, in_parts),
    Target("replies", reply, replies, f.MESSAGE_BYTES_MAX + 64, behind(1, in_parts)),
    Target("live", live, lives, f.MESSAGE_BYTES_MAX + 64, behind(1, in_parts)),
    Target("enrolment", enrolment, enrolments, 4096, in_parts),
    Target("topics", topic, topic_texts, 200),
    Target("status", status, statuses, f.STATUS_BYTES_MAX + 64),
)
