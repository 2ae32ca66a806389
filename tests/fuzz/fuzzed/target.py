"""A parser under a fuzzer: what it must do with any bytes, and bytes that it takes to begin with.

Law of a law: it returns whether the bytes were taken, and raises if the parser did what it must
not.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

__all__ = ["Target", "file_named", "joined", "parts_of", "refused"]

TEXT_CHARACTERS_MAX: Final = 4_000
"""Of an error: a peer must not fill a log with what it sent."""

Mutate = Callable[[bytes, int], bytes]
"""What libFuzzer does to bytes, to at most so many: `atheris.Mutate`."""


@dataclass(frozen=True, slots=True)
class Target:
    """`bytes_max`: the parser's own limit, and a little more, where a fuzzer can afford it."""

    name: str
    law: Callable[[bytes], bool]
    seeds: Callable[[], Iterable[bytes]]
    bytes_max: int
    mutation: Callable[[bytes, int, int, Mutate], bytes] | None = None
    """(data, most bytes, seed, mutate) -> data that keeps the structure; None: libFuzzer's own."""
    rss_mb: int = 300


@contextmanager
def refused(*errors: type[Exception]) -> Iterator[None]:
    """What is raised inside is one of the errors that the parser's docstring names, with a text."""
    try:
        yield
        return
    except errors as error:
        name, text = type(error).__name__, str(error)
    assert text, f"a {name} that says nothing"
    assert len(text) <= TEXT_CHARACTERS_MAX, f"{name} of {len(text)} characters: {text[:200]}"


# Parts of a message, each behind its length in three bytes; a length beyond the end is cut.


def joined(parts: Sequence[bytes]) -> bytes:
    return b"".join(len(part).to_bytes(3, "little") + part for part in parts)


def parts_of(data: bytes) -> list[bytes]:
    """The parts in `data`; any bytes are some."""
    parts, place = [], 0
    while place < len(data):
        start = place + 3
        place = start + int.from_bytes(data[place:start], "little")
        parts.append(data[start:place])
    return parts


def file_named(name: str, data: bytes) -> Path:
    """A file with this content that only its owner may read, in a folder of this process."""
    path = _folder() / name
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
    return path


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())
