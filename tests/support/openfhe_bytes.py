"""What OpenFHE serialises, made by hand in a ring of 8, and the law for whoever parses it.

Rule: whatever the bytes, a parser raises PeerError or returns polynomials that lie within them.
`tests/fuzz` starts from `samples`, and test_ciphertext_layout.py replays them.
"""

from __future__ import annotations

import struct

from metisfl.learner.ciphertext_layout import parse_ciphertext, parse_secret_key
from metisfl.proto.errors import PeerError

NOT_POLYMORPHIC = 0x40000000
NEW = 0x80000000
MODULUS = (1 << 44) - 16383


def check_parsers(data: bytes) -> bool:
    """Parse `data` as everything that it could be; tell whether it was anything."""
    taken = False
    for parse in (parse_ciphertext, parse_secret_key):
        try:
            layout = parse(data)
        except PeerError:
            continue
        taken = True
        assert 1 <= layout.ring_dimension <= 1 << 16
        assert 3 <= layout.modulus < 1 << 60
        end = 0
        for place in layout.polynomials:
            assert end <= place <= len(data) - layout.polynomial_bytes
            end = place + layout.polynomial_bytes
    return taken


def samples() -> list[bytes]:
    """Objects as OpenFHE writes them, in a ring of 8: parameters in place or pointed to."""
    return [
        serialised(elements, inlined)
        for elements in (1, 2)
        for inlined in (frozenset(), frozenset({0}), frozenset({0, 1}))
        if max(inlined, default=0) < elements
    ]


def serialised(
    elements: int,
    inlined: frozenset[int],
    *,
    ring: int = 8,
    modulus: int = MODULUS,
    towers: int = 1,
    forms: tuple[int, int] = (0, 0),
    tag: bytes = b"0123456789abcdef" * 2,
) -> bytes:
    """A secret key (one element) or a ciphertext (two). `inlined`: which carry their parameters."""
    data = b"\x01" + b"context" * 9 + struct.pack("<Q", 32) + tag
    if elements > 1:
        data += struct.pack("<Q", elements)
    for number in range(elements):
        first = number == 0  # cereal writes a class's version where it meets it first
        version = struct.pack("<I", 1) if first else b""
        data += version + struct.pack("<Q", towers)
        data += version + struct.pack("<IB", NOT_POLYMORPHIC, 1)
        data += version + struct.pack("<Q", ring)
        data += bytes(8 * min(ring, 1 << 17)) + struct.pack("<Qi", modulus, forms[0])
        data += _pointer(number in inlined, struct.pack("<IIQQQQ", 16, 8, modulus, 5, 7, 9))
        words = b"".join(struct.pack("<QQI", 1, value, 44) for value in (modulus, 5, 7, 9))
        tower = struct.pack("<Q", 1) + _pointer(False, b"")
        data += struct.pack("<i", forms[1])
        data += _pointer(number in inlined, struct.pack("<II", 16, 8) + words + tower)
    if elements > 1:
        data += struct.pack("<IIIIdQiIQ", 4, 0, 0, 1, 2.0**30, 1, 4, NEW + 9, 0)
    return data


def _pointer(inlined: bool, content: bytes) -> bytes:
    head = struct.pack("<II", NOT_POLYMORPHIC, NEW + 5 if inlined else 5)
    return head + content if inlined else head
