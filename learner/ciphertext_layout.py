"""Where the limbs lie in what OpenFHE serialises: a structural parser, without OpenFHE.

Rule 1: OpenFHE's bindings give no access to a ciphertext's limbs; its binary serialisation does.
That layout is OpenFHE's own, so every length, identifier and modulus on the way is checked, and
nothing is assumed to be at a fixed place.
Rule 2: the bytes may come from anywhere. What is not understood is a PeerError, never a wrong read.

The layout (cereal portable binary, little-endian; the same for OpenFHE 1.3.1 to 1.6.1): one byte,
1; an object with the whole crypto context, opaque here; the key's tag (u64 32, then 32 hex digits);
in a ciphertext or public key the number of its elements (u64 2, in a partial decryption 1); the
elements; in a ciphertext a tail. An element:

    [u32 class version, the first time]  u64 number of towers, 1
    [u32 class version, the first time]  u32 0x40000000  u8 1
    [u32 class version, the first time]  u64 N  N limbs of u64
    u64 modulus  i32 format, 0 (EVALUATION)  pointer to the tower's parameters
    i32 format, 0                            pointer to the element's parameters

A pointer is u32 0x40000000 and a u32 identifier; with its highest bit set the object follows.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Final

from metisfl.proto.errors import PeerError

__all__ = ["Layout", "parse_ciphertext", "parse_public_key", "parse_secret_key"]

BYTES_MAX: Final = 4 << 20
RING_MAX: Final = 1 << 16
CONTEXT_BYTES_MAX: Final = 1 << 16
PARAMETERS_MAX: Final = 4
LIMB_BYTES: Final = 8
_TAG: Final = re.compile(rb"\x20\x00{7}[0-9a-f]{32}")
_NOT_POLYMORPHIC: Final = 0x40000000
_NEW_OBJECT: Final = 0x80000000
_TAIL_BYTES: Final = 4 + 4 + 4 + 4 + 8 + 8 + 4 + 4 + 8
_TOWER_PARAMETERS: Final = 4 + 4 + 4 * 8  # order, root tables: numbers that we do not need


@dataclass(frozen=True, slots=True)
class Layout:
    """The byte offsets of the polynomials; each is `ring_dimension` u64 limbs below `modulus`."""

    polynomials: tuple[int, ...]
    ring_dimension: int
    modulus: int

    @property
    def polynomial_bytes(self) -> int:
        return self.ring_dimension * LIMB_BYTES


def parse_ciphertext(data: bytes, polynomials: int = 2) -> Layout:
    """Find the polynomials of a ciphertext of one tower, or with 1 that of a partial decryption.

    Raises PeerError.
    """
    cursor = _Cursor(data)
    elements = cursor.elements(polynomials)
    cursor.take(_TAIL_BYTES, "tail")
    return _layout(cursor, elements)


def parse_public_key(data: bytes) -> Layout:
    """Find both polynomials of a public key of one tower: b = -a s + e, and a. Raises PeerError."""
    cursor = _Cursor(data)
    return _layout(cursor, cursor.elements(2))


def parse_secret_key(data: bytes) -> Layout:
    """Find the polynomial of a secret key of one tower. Raises PeerError."""
    cursor = _Cursor(data)
    cursor.skip_to_tag()
    return _layout(cursor, [cursor.element()])


def _layout(cursor: _Cursor, elements: list[tuple[int, int, int]]) -> Layout:
    cursor.end()
    rings, moduli = {ring for _, ring, _ in elements}, {modulus for _, _, modulus in elements}
    if len(rings) > 1 or len(moduli) > 1:
        raise PeerError(f"elements of different rings {sorted(rings)} or moduli {sorted(moduli)}")
    return Layout(tuple(place for place, _, _ in elements), rings.pop(), moduli.pop())


class _Cursor:
    """Reads forward through serialised bytes; whatever is not there is a PeerError."""

    def __init__(self, data: bytes) -> None:
        if len(data) > BYTES_MAX:
            raise PeerError(f"serialised object of {len(data)} bytes; at most {BYTES_MAX}")
        self._data = data
        self._place = 0
        self._seen: set[str] = set()

    def take(self, count: int, what: str) -> int:
        """Skip `count` bytes; return where they begin."""
        place = self._place
        if count > len(self._data) - place:
            raise PeerError(f"{what} of {count} bytes at byte {place}, beyond the end")
        self._place = place + count
        return place

    def number(self, kind: str, what: str) -> int:
        place = self.take(struct.calcsize("<" + kind), what)
        (value,) = struct.unpack_from("<" + kind, self._data, place)
        return int(value)

    def expect(self, kind: str, wanted: int, what: str) -> None:
        found = self.number(kind, what)
        if found != wanted:
            raise PeerError(f"{what} is {found}; expected {wanted}")

    def skip_to_tag(self) -> None:
        """Pass the context, to behind the key's tag."""
        self.expect("B", 1, "endianness")
        tag = _TAG.search(self._data, self._place, CONTEXT_BYTES_MAX)
        if tag is None:
            raise PeerError(f"no key tag within {CONTEXT_BYTES_MAX} bytes")
        self._place = tag.end()

    def elements(self, count: int) -> list[tuple[int, int, int]]:
        """Pass the context, the tag and so many elements."""
        self.skip_to_tag()
        self.expect("Q", count, "number of elements")
        return [self.element() for _ in range(count)]

    def element(self) -> tuple[int, int, int]:
        """Pass one element; return the offset of its limbs, the ring dimension, the modulus."""
        self._version("element")
        self.expect("Q", 1, "number of towers")
        self._version("tower")
        self.expect("I", _NOT_POLYMORPHIC, "limb vector")
        self.expect("B", 1, "limb vector's presence")
        self._version("limb vector")
        ring = self.number("Q", "ring dimension")
        if not 1 <= ring <= RING_MAX or ring & (ring - 1):
            raise PeerError(f"ring dimension is {ring}; allowed are powers of two to {RING_MAX}")
        place = self.take(ring * LIMB_BYTES, "limbs")
        modulus = self.number("Q", "modulus")
        if not 3 <= modulus < 1 << 60:
            raise PeerError(f"modulus is {modulus}; allowed are 3 to 2^60")
        self.expect("i", 0, "format of a tower")
        if self._is_new("tower parameters"):
            self.take(_TOWER_PARAMETERS, "tower parameters")
        self.expect("i", 0, "format of an element")
        if self._is_new("element parameters"):
            self._element_parameters()
        return place, ring, modulus

    def _version(self, what: str) -> None:
        """cereal writes a class's version where it meets the class for the first time."""
        if what not in self._seen:
            self._seen.add(what)
            self.number("I", f"class version of {what}")

    def _is_new(self, what: str) -> bool:
        self.expect("I", _NOT_POLYMORPHIC, f"pointer to {what}")
        return bool(self.number("I", f"identifier of {what}") & _NEW_OBJECT)

    def _element_parameters(self) -> None:
        self.take(8, "element parameters")
        for what in ("modulus", "root", "big modulus", "big root"):
            words = self.number("Q", f"length of {what}")
            if words > PARAMETERS_MAX:
                raise PeerError(f"{what} of {words} words; at most {PARAMETERS_MAX}")
            self.take(8 * words + 4, what)
        count = self.number("Q", "number of tower parameters")
        if count > PARAMETERS_MAX:
            raise PeerError(f"parameters of {count} towers; at most {PARAMETERS_MAX}")
        for _ in range(count):
            if self._is_new("tower parameters"):
                self.take(_TOWER_PARAMETERS, "tower parameters")

    def end(self) -> None:
        if self._place != len(self._data):
            raise PeerError(f"{len(self._data) - self._place} bytes behind the end")
