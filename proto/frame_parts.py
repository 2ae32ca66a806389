"""One part of a message: its length or its limit is checked before it is read any further.

What breaks a bound is a PeerError that names the value and the bound. Integers are little-endian
and unsigned; 64-bit ones stay below 2**63, as in SQLite.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from metisfl.proto.envelope import INTEGER_MAX
from metisfl.proto.errors import PeerError

__all__ = ["exact", "text", "unpack"]


def unpack(layout: struct.Struct, part: bytes, what: str) -> tuple[int, ...]:
    """Return the integers of a part, which is as long as its layout."""
    if len(part) != layout.size:
        raise PeerError(f"{what} has {len(part)} bytes; it has exactly {layout.size}")
    values: tuple[int, ...] = layout.unpack(part)
    if max(values) > INTEGER_MAX:
        raise PeerError(f"{what} holds {max(values)}; at most {INTEGER_MAX}")
    return values


def text(part: bytes, most: int, what: str) -> str:
    """Return a part of at most `most` bytes as the UTF-8 that it is."""
    if len(part) > most:
        raise PeerError(f"{what} has {len(part)} bytes; at most {most}")
    try:
        return part.decode()
    except UnicodeDecodeError as error:
        raise PeerError(f"{what} is not UTF-8: {part[:40]!r}") from error


def exact(parts: Sequence[bytes], count: int, what: str) -> None:
    """A message has exactly so many parts."""
    if len(parts) != count:
        raise PeerError(f"{what} has {len(parts)} parts; it has exactly {count}")
