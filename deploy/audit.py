"""The audit log of a daemon: what matters for its security, one fact a line, in `audit.jsonl`.

Rule 1: lines are only appended, and each names the one before it by its SHA-256: who changes one,
or takes one out, is found out by `metisfl audit`.
Rule 2: what an operator or a run does is on disk before it has an effect, and ends the daemon if it
cannot be written. What anybody can cause at will (a refusal) is bounded, and disturbs nobody.
Rule 3: no secret is a fact. Public keys, fingerprints and digests are.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from threading import Lock
from typing import Final

import structlog

from metisfl.deploy.audit_files import AUDIT_FILE, contains, continuation, files_of
from metisfl.deploy.audit_line import (
    LINE_BYTES_MAX,
    NO_DIGEST,
    Fact,
    Line,
    bounded,
    core_of,
    digest_of,
    pack,
    parse,
)
from metisfl.deploy.audit_refusals import LINES_MAX, Refusals
from metisfl.proto.errors import MachineError, machine_error
from metisfl.proto.model_file import sync_folder

__all__ = ["AUDIT_FILE", "Audit"]

FILE_BYTES_MAX: Final = 64 << 20
"""A file that has so many bytes is continued in a new one."""
_FLAGS: Final = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
_log = structlog.get_logger()


class Audit:
    """The log of one daemon, which holds its home; all methods may be called from any thread."""

    def __init__(self, path: Path, *, file_bytes: int = FILE_BYTES_MAX) -> None:
        """Open it, or begin one at `path`, and go on behind its last line.

        What a crash has left of a line is cut off, and that is recorded. Raises MachineError if it
        cannot be written, or if its last line is not one.
        """
        self._path = path
        self._file_bytes = file_bytes
        self._writing, self._deciding = Lock(), Lock()
        self._refusals = Refusals()
        self._warned = self._torn = False
        self._number, self._head = 0, NO_DIGEST
        try:
            files = files_of(path) or [path]
            self._file = files[-1]
            self._descriptor = _open(self._file)
            last, self._size, torn = _tail(self._file, self._descriptor)
            for older in reversed(files[:-1]):
                if last:
                    break
                last = _last_line(older)
            if last:
                self._number, self._head = _number_of(self._file, last), digest_of(last)
            if torn:
                os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            raise self._unwritten(error) from error
        if torn:
            self.record("cut", file=self._file.name, bytes=torn)

    def record(self, what: str, /, **facts: Fact) -> None:
        """Append a line, and return when it is on disk. Raises DiskFull, MachineError."""
        try:
            self._append(what, facts, durable=True)
        except OSError as error:
            raise self._unwritten(error) from error

    def record_once(self, what: str, /, **facts: Fact) -> None:
        """`record`, unless there is a line with this very fact: for what is learned again."""
        core = core_of(bounded(what), _bounded(facts))
        try:
            there = any(contains(path, core) for path in files_of(self._path))
        except OSError as error:
            raise self._unwritten(error) from error
        if not there:
            self.record(what, **facts)

    def refused(self, what: str, who: str, /, **facts: Fact) -> None:
        """Somebody was refused something: write it, unless the same or too much was written lately.

        What is not written is counted, and told later; so it is if the disk is full.
        """
        what, who = bounded(what), bounded(who)
        with self._deciding:
            self._refusals, due = self._refusals.refused(what, who, time.monotonic())
        if due is None:
            return
        if due.last:
            what, facts = "further refusals of this day are left out", {"lines": LINES_MAX}
        else:
            counts = {"unwritten": due.unwritten, "left_out": due.left_out}
            facts = {"who": who, **facts, **{name: n for name, n in counts.items() if n}}
        try:
            self._append(what, facts, durable=False)
        except OSError as error:
            with self._deciding:
                self._refusals = self._refusals.not_written(due)
            if not self._warned:
                _log.warning("refusals cannot be recorded", why=str(self._unwritten(error)))
            self._warned = True
        else:
            self._warned = False

    def close(self) -> None:
        """Write how many refusals have no line, and let go of the file."""
        if count := self._refusals.pending:
            with suppress(OSError):  # as any refusal
                self._append("refusals without a line", {"count": count}, durable=True)
        os.close(self._descriptor)

    def _append(self, what: str, facts: Mapping[str, Fact], *, durable: bool) -> None:
        """Raises OSError, and then nothing is written."""
        with self._writing:
            if self._torn:
                self._take_back()
            if self._size >= self._file_bytes:
                self._continue()
            now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
            line = Line(
                number=self._number + 1,
                time=now.replace("+00:00", "Z"),
                what=bounded(what),
                facts=_bounded(facts),
                previous=self._head,
            )
            data = pack(line)
            assert len(data) < LINE_BYTES_MAX, f"{what} has too many facts for a line"
            try:
                rest = data + b"\n"
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                if durable:
                    os.fsync(self._descriptor)
            except OSError:
                self._torn = True
                with suppress(OSError):  # else it is tried again before the next line
                    self._take_back()
                raise
            self._number, self._head = line.number, digest_of(data)
            self._size += len(data) + 1

    def _take_back(self) -> None:
        os.ftruncate(self._descriptor, self._size)
        self._torn = False

    def _continue(self) -> None:
        """Go on in a new file, whose first line names the last one of this."""
        os.fsync(self._descriptor)  # no line may be on disk before one that it follows
        file = continuation(self._path, self._file)
        descriptor = _open(file)
        os.close(self._descriptor)
        self._file, self._descriptor, self._size = file, descriptor, 0

    def _unwritten(self, error: OSError) -> MachineError:
        text = f"audit log {self._path}: {error.strerror}; make room or repair the disk"
        return machine_error(text, error)


def _open(file: Path) -> int:
    """Open or create it, for its owner alone, and see to it that its name is on disk."""
    descriptor = os.open(file, _FLAGS, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        sync_folder(file.parent)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _tail(file: Path, descriptor: int) -> tuple[bytes, int, int]:
    """Its last whole line (without the newline), the bytes up to its end, and those behind it."""
    size = os.fstat(descriptor).st_size
    looked = min(size, 2 * LINE_BYTES_MAX)
    data = os.pread(descriptor, looked, size - looked)
    end = data.rfind(b"\n") + 1
    if not end and looked < size:
        raise _changed(file, f"its last {looked} bytes hold no end of a line")
    start = data.rfind(b"\n", 0, end - 1) + 1 if end else 0
    return data[start : max(0, end - 1)], size - looked + end, looked - end


def _last_line(file: Path) -> bytes:
    with file.open("rb") as opened:
        return _tail(file, opened.fileno())[0]


def _number_of(file: Path, line: bytes) -> int:
    try:
        return parse(line).number
    except MachineError as error:
        raise _changed(file, f"its last line was not written by this program: {error}") from None


def _changed(file: Path, why: str) -> MachineError:
    return MachineError(
        f"audit log {file}: {why}. Somebody or the disk has changed it: keep all files of the log "
        "in another place, look at them with `metisfl audit`, and start again"
    )


def _bounded(facts: Mapping[str, Fact]) -> dict[str, Fact]:
    return {
        name: bounded(value) if isinstance(value, str) else value for name, value in facts.items()
    }
