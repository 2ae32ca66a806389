"""The files of an audit log, `audit.jsonl`, `audit-0001.jsonl`, ...: one chain of lines, read.

Rule: what does not follow from the line before it is named by file and line, and nothing behind it
is believed. What a chain cannot show is that its end is missing: for this, somebody elsewhere must
have noted the digest of a line.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metisfl.deploy.audit_line import LINE_BYTES_MAX, NO_DIGEST, Line, digest_of, parse
from metisfl.proto.errors import MachineError

__all__ = ["AUDIT_FILE", "Checked", "check", "contains", "continuation", "files_of", "read"]

AUDIT_FILE: Final = "audit.jsonl"


@dataclass(frozen=True, slots=True)
class Checked:
    """What is good of a log. `fault` says why it ends before the files do."""

    lines: int
    first: int
    """The number of the first line."""
    head: str
    """The digest of the last good line."""
    noted: int | None = None
    """The number of the line with the digest that was looked for."""
    unfinished_bytes: int = 0
    """Of a last line without an end: it is being written now, or its writer was killed."""
    fault: str = ""


def files_of(path: Path) -> list[Path]:
    """The files of the log that begins with `path`, in their order; none if there is no log."""
    later = {
        int(number): found
        for found in path.parent.glob(f"{path.stem}-*{path.suffix}")
        if (number := found.stem.removeprefix(f"{path.stem}-")).isdecimal() and number.isascii()
    }
    return [*([path] if path.exists() else []), *(later[number] for number in sorted(later))]


def continuation(path: Path, last: Path) -> Path:
    """The file after `last` of the log that begins with `path`."""
    number = 0 if last == path else int(last.stem.removeprefix(f"{path.stem}-"))
    return path.with_name(f"{path.stem}-{number + 1:04d}{path.suffix}")


def check(paths: Sequence[Path], *, whole: bool = True, noted: str = "") -> Checked:
    """Read all lines and check how they follow each other; see which has the digest `noted`.

    A `whole` log begins with line 1; else it is a part of one. Raises MachineError if a file cannot
    be read.
    """
    number, first, head, found, rest = 0, 1, NO_DIGEST, None, 0
    for path in paths:
        for row, data in enumerate(_rows(path), start=1):
            if not data.endswith(b"\n") and path == paths[-1] and len(data) <= LINE_BYTES_MAX:
                rest = len(data)
                break
            try:
                line = parse(data.removesuffix(b"\n"))
                why = "" if data.endswith(b"\n") else "it has no end"
            except MachineError as error:
                why = str(error)
            if not why and not number and not whole:
                number, first = line.number - 1, line.number
                head = line.previous if number else NO_DIGEST
            if why := why or _break(line, number, head):
                fault = f"{path.name}, line {row}: {why}"
                return Checked(number - first + 1, first, head, found, fault=fault)
            number, head = line.number, digest_of(data[:-1])
            found = number if head == noted else found
    return Checked(number - first + 1, first, head, found, rest)


def read(paths: Sequence[Path], lines: int) -> Iterator[tuple[bytes, Line]]:
    """The first `lines` lines, which `check` has found to be good: their bytes, and what they say.

    Raises MachineError if a file cannot be read.
    """
    for path in paths:
        for data in _rows(path):
            if lines == 0:
                return
            lines -= 1
            yield data[:-1], parse(data[:-1])


def contains(path: Path, core: bytes) -> bool:
    """Whether these bytes are in the file. Raises OSError."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return view.find(core) >= 0


def _break(line: Line, number: int, head: str) -> str:
    """Why the line does not follow line `number`, which has the digest `head`; "" if it does."""
    if line.number != number + 1:
        return (
            f"it is number {line.number}, where {number + 1} belongs: lines were taken out, put in "
            "or moved"
        )
    if line.previous != head:
        return (
            f"it names {line.previous} as the digest of the line before, which has {head}: that "
            "line or this one was changed"
        )
    return ""


def _rows(path: Path) -> Iterator[bytes]:
    """Its rows with their newlines; one that is longer than any line can be comes in pieces."""
    try:
        with path.open("rb") as file:
            while data := file.readline(LINE_BYTES_MAX + 1):
                yield data
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from None
