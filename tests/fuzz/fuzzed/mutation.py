"""Mutations that keep a structure: else most bytes die at the first length or checksum.

Rule: all luck comes from the seed that libFuzzer gives. Nothing here knows a message of ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from fuzzed.target import Mutate, joined, parts_of

__all__ = ["behind", "in_parts", "protobuf"]

Mutation = Callable[[bytes, int, int, Mutate], bytes]
Fields = list[tuple[int, bytes]]
NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)


def behind(first: int, mutation: Mutation) -> Mutation:
    """Mutate what is behind the first bytes, which say what it is, and seldom these."""

    def mutated(data: bytes, most: int, seed: int, mutate: Mutate) -> bytes:
        if len(data) <= first or seed % 8 == 0:
            return mutate(data, most)
        return data[:first] + mutation(data[first:], most - first, seed, mutate)

    return mutated


def in_parts(data: bytes, most: int, seed: int, mutate: Mutate) -> bytes:
    """Mutate one part of a message, or their row."""
    luck, parts = random.Random(seed), parts_of(data)
    if not parts:
        return mutate(data, most)
    place = luck.randrange(len(parts))
    match luck.randrange(8):
        case 0:
            parts.insert(place, luck.choice(parts))
        case 1:
            del parts[place]
        case 2:
            parts = parts * luck.randrange(2, 5)
        case 3 | 4:
            parts[place] = protobuf(parts[place], most, seed, mutate)
        case _:
            parts[place] = mutate(parts[place], max(1, min(most, 2 * len(parts[place]) + 8)))
    return joined(parts)[:most]


def protobuf(data: bytes, most: int, seed: int, mutate: Mutate) -> bytes:
    """Mutate a field somewhere in a message and set the lengths around it right."""
    return _mutated(data, most, random.Random(seed), mutate)[:most]


def _mutated(data: bytes, most: int, luck: random.Random, mutate: Mutate) -> bytes:
    fields = _fields(data)
    if not fields or luck.random() < 0.1:
        return mutate(data, most)
    place = luck.randrange(len(fields))
    key, value = fields[place]
    match luck.randrange(10):
        case 0:
            fields.insert(place, luck.choice(fields))
        case 1:
            del fields[place]
        case 2:
            luck.shuffle(fields)
        case 3:
            fields[place:place] = [(key, value)] * _some(luck, most // (len(value) + 4))
        case 4:
            fields.insert(place, _new_field(luck))
        case 5 if key & 7 == 2:  # as many of one number as there is room for
            number = _varint(luck.choice(NUMBERS))
            fields[place] = (key, number * _some(luck, most // len(number)))
        case _:
            fields[place] = (key, _value(key & 7, value, most, luck, mutate))
    return b"".join(_packed(key, value) for key, value in fields)


def _some(luck: random.Random, most: int) -> int:
    """1 to `most`, seldom many: each order of magnitude is as likely."""
    return int(max(1, most) ** luck.random())


def _new_field(luck: random.Random) -> tuple[int, bytes]:
    kind = luck.choice((0, 1, 2, 3, 4, 5))
    value = {0: _varint(luck.choice(NUMBERS)), 1: bytes(8), 2: b"\x08\x01", 5: bytes(4)}
    return luck.randrange(1, 24) << 3 | kind, value.get(kind, b"")


def _value(kind: int, value: bytes, most: int, luck: random.Random, mutate: Mutate) -> bytes:
    if kind == 0:
        return _varint(luck.choice(NUMBERS) if luck.random() < 0.7 else luck.getrandbits(64))
    if kind == 2:
        if luck.random() < 0.5 and _fields(value):
            return _mutated(value, most, luck, mutate)
        return mutate(value, max(1, min(most, 2 * len(value) + 8)))
    return mutate(value, len(value)).ljust(len(value), b"\0")[: len(value)] if value else b""


def _fields(data: bytes) -> Fields:
    """The fields of a message as (key, content); none if it is no message."""
    fields, place = [], 0
    while place < len(data):
        key, start = _number(data, place)
        kind = key & 7
        if start < 0 or key < 8 or kind > 5:
            return []
        if kind == 2:
            length, start = _number(data, start)
            place = start + length
        elif kind == 0:
            _, place = _number(data, start)
        else:
            place = start + {1: 8, 5: 4}.get(kind, 0)
        if start < 0 or not start <= place <= len(data):
            return []
        fields.append((key, data[start:place]))
    return fields


def _number(data: bytes, place: int) -> tuple[int, int]:
    """A varint and where it ends; -1 if it does not."""
    number = 0
    for shift in range(0, 70, 7):
        if place + shift // 7 >= len(data):
            break
        byte = data[place + shift // 7]
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place + shift // 7 + 1
    return 0, -1


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _packed(key: int, value: bytes) -> bytes:
    return _varint(key) + (_varint(len(value)) if key & 7 == 2 else b"") + value
