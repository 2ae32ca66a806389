"""What a peer can make us spend: the worst message of each kind, at the limit of its size.

A field of two bytes that becomes an object of a hundred is the way to do it, so every field that
can be repeated is, as often as the limit lets it. Nothing here is compressed: no payload grows but
by what protobuf makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from peak_memory import peak_bytes

from metisfl.proto.ckks_key import FILE_BYTES_MAX, PUBLIC_MAGIC, PublicPart
from metisfl.proto.errors import PeerError
from metisfl.proto.events import EVENT_TYPES, PAYLOAD_BYTES_MAX, decode
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import MANIFEST_BYTES_MAX, parse_manifest

TIMES = 48
"""Memory at the peak, for each byte of a message: 8 for a pointer and 40 for an object."""
KEY_CHARACTERS = range(33, 127)


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def floods(kind: Descriptor, most: int) -> Iterator[tuple[str, bytes]]:
    """Each field that can be repeated, at this level or below, as often as `most` bytes allow."""
    for field in kind.fields:
        key = field.number << 3
        message = field.message_type
        if message is not None and message.GetOptions().map_entry:
            yield field.name, distinct_keys(key | 2, most)
        elif field.is_repeated and (message or field.type == FieldDescriptor.TYPE_STRING):
            yield field.name, (varint(key | 2) + b"\0") * (most // 2)
        elif field.is_repeated:
            yield field.name, varint(key | 2) + varint(most - 8) + bytes(most - 8)
        if message is not None:
            for name, data in floods(message, most - 8):
                yield f"{field.name}.{name}", varint(key | 2) + varint(len(data)) + data


def distinct_keys(key: int, most: int) -> bytes:
    entries = [
        varint(key) + b"\x05\x0a\x03" + bytes([a, b, c])
        for a in KEY_CHARACTERS
        for b in KEY_CHARACTERS
        for c in KEY_CHARACTERS[:4]
    ]
    return b"".join(entries[: most // len(entries[0])])


EVENT_FLOODS = [
    (name, field, data)
    for name, kind in EVENT_TYPES.items()
    for field, data in floods(kind.DESCRIPTOR, PAYLOAD_BYTES_MAX)
]


def assert_bounded(data: bytes, parse: Callable[..., object], *arguments: object) -> None:
    peak = peak_bytes(parse, *arguments)
    assert peak <= TIMES * len(data), (
        f"{len(data)} bytes became {peak}, {peak / len(data):.0f} times as many; at most {TIMES}"
    )


@pytest.mark.parametrize(("name", "field", "data"), EVENT_FLOODS, ids=lambda value: str(value)[:40])
def test_an_event_is_refused_before_it_takes_much_memory(
    name: str, field: str, data: bytes
) -> None:
    assert len(data) > PAYLOAD_BYTES_MAX - 16, f"{name}.{field} could be worse"
    with pytest.raises(PeerError):
        decode(name, data)
    assert_bounded(data, decode, name, data)


MANIFEST_FLOODS = dict(floods(Manifest.DESCRIPTOR, MANIFEST_BYTES_MAX))


@pytest.mark.parametrize("field", MANIFEST_FLOODS)
def test_a_manifest_is_refused_before_it_takes_much_memory(field: str) -> None:
    data = MANIFEST_FLOODS[field]
    with pytest.raises(PeerError):
        parse_manifest(data)
    assert_bounded(data, parse_manifest, data)


@pytest.mark.parametrize("filling", [b"\x80", b"\x90", b"\xc0"], ids=["maps", "lists", "nothing"])
def test_a_key_is_refused_before_it_takes_much_memory(filling: bytes) -> None:
    """In msgpack an empty map is one byte, and 64 in memory; lists hold lists, 1000 deep."""
    count = FILE_BYTES_MAX - 16
    nested = b"\xdd" + count.to_bytes(4, "big")
    for body in (nested + filling * count, nested * 500 + filling * (count - 2500)):
        data = PUBLIC_MAGIC + body
        with pytest.raises(PeerError):
            PublicPart.parse(data)
        assert_bounded(data, PublicPart.parse, data)


def test_what_is_nested_without_end_is_refused() -> None:
    deep = b""
    for _ in range(PAYLOAD_BYTES_MAX):
        if len(deep) > PAYLOAD_BYTES_MAX - 8:
            break
        deep = varint(200 << 3 | 2) + varint(len(deep)) + deep
    groups = varint(200 << 3 | 3) * 40_000
    event = decode("TaskCancelled", b"\x0a\x01t" + deep)
    assert event.task_id == "t", "bytes of an unknown field are not looked into"  # type: ignore[attr-defined]
    with pytest.raises(PeerError, match="not protobuf"):
        decode("TaskCancelled", groups + varint(200 << 3 | 4) * 40_000)
