"""One line of an audit log: a fact, and the digest of the line before it.

Rule: a line is its canonical bytes. What says the same in other bytes is no line, so that nothing
can be changed that the digest does not show. Pure.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from metisfl.proto.errors import MachineError

__all__ = [
    "DIGEST",
    "LINE_BYTES_MAX",
    "NO_DIGEST",
    "TEXT_CHARACTERS_MAX",
    "Fact",
    "Line",
    "bounded",
    "core_of",
    "digest_of",
    "pack",
    "parse",
]

Fact = str | int
LINE_BYTES_MAX: Final = 64 << 10
TEXT_CHARACTERS_MAX: Final = 256
NO_DIGEST: Final = "0" * 64
DIGEST: Final = re.compile(r"[0-9a-f]{64}")
TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Line:
    """`number` counts from 1, `time` is UTC to the microsecond: 2026-11-24T09:43:32.000001Z."""

    number: int
    time: str
    what: str
    facts: Mapping[str, Fact]
    previous: str
    """SHA-256 of the line before, in hex; NO_DIGEST in the first."""


_FIELDS: Final = tuple(field.name for field in fields(Line))


def pack(line: Line) -> bytes:
    """Its bytes, in ASCII and without the newline."""
    return _json({name: getattr(line, name) for name in _FIELDS})


def core_of(what: str, facts: Mapping[str, Fact]) -> bytes:
    """The bytes that all lines with this fact have in common, and no other line has."""
    return _json({"what": what, "facts": dict(facts)})[1:-1]


def digest_of(data: bytes) -> str:
    """What the next line names: SHA-256 of a line's bytes, without the newline, in hex."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes) -> Line:
    """Check and read a line. Raises MachineError with what is wrong."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise MachineError("it is not JSON") from None
    if not isinstance(found, dict) or tuple(found) != _FIELDS:
        raise MachineError(f"it has other fields than {', '.join(_FIELDS)}")
    line = Line(**found)
    if why := _problem(line):
        raise MachineError(why)
    if pack(line) != data:
        raise MachineError("it is not in its canonical encoding")
    return line


def bounded(text: str) -> str:
    """A text from outside, cut to TEXT_CHARACTERS_MAX."""
    return text if len(text) <= TEXT_CHARACTERS_MAX else text[: TEXT_CHARACTERS_MAX - 1] + "…"


def _problem(line: Line) -> str:
    if type(line.number) is not int or line.number < 1:
        return "its number is none from 1 on"
    if not isinstance(line.time, str) or not TIME.fullmatch(line.time):
        return "its time is not like 2026-11-24T09:43:32.000001Z"
    if not isinstance(line.what, str) or not isinstance(line.facts, dict):
        return "it does not say what happened"
    if any(type(value) not in (str, int) for value in line.facts.values()):
        return "its facts are not all text or whole numbers"
    if not isinstance(line.previous, str) or not DIGEST.fullmatch(line.previous):
        return "it does not name the line before by its SHA-256"
    return ""


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")
