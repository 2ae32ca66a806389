"""Room for model files: what the disk has beyond its reserve, and what the folder's limit leaves.

Rule: a file is begun only when there is room for all of it. What finds none is refused with the
numbers, and welcome as soon as there is room.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Final

from metisfl.proto.errors import FULL, DiskFull, MachineError

__all__ = ["RESERVE_BYTES", "NoRoom", "Room", "explained"]

RESERVE_BYTES: Final = 64 << 20


class NoRoom(DiskFull):
    """There is no room now; there may be later."""


class Room:
    """The space of one folder. `flag` names the option that sets its limit, for people."""

    def __init__(
        self, folder: Path, flag: str, limit_bytes: int | None, reserve_bytes: int
    ) -> None:
        """`limit_bytes` bounds the folder, None leaves it to the disk, of which `reserve_bytes`
        stay free for the event log and the operating system."""
        self._folder = folder
        self._flag = flag
        self._limit_bytes = limit_bytes
        self._reserve_bytes = reserve_bytes

    def check(self, needed_bytes: int) -> None:
        """Raise NoRoom if there is none for `needed_bytes` more."""
        try:
            free = shutil.disk_usage(self._folder).free
            used = 0 if self._limit_bytes is None else self._used_bytes()
        except OSError as error:
            raise explained(self._folder, error) from None
        if self._limit_bytes is not None and used + needed_bytes > self._limit_bytes:
            raise NoRoom(
                f"{self._folder}: {used} bytes used, {needed_bytes} more asked for; the limit is "
                f"{self._limit_bytes}: raise {self._flag}"
            )
        if free - needed_bytes < self._reserve_bytes:
            raise NoRoom(
                f"{self._folder}: {os.strerror(errno.ENOSPC).lower()}: {free} bytes are free, "
                f"{needed_bytes} are needed and {self._reserve_bytes} stay in reserve; make room "
                "on that disk"
            )

    def _used_bytes(self) -> int:
        with os.scandir(self._folder) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.is_file())


def explained(path: Path, error: OSError) -> MachineError:
    """The error in words; NoRoom if it says that the disk, or a quota, is full."""
    kind = NoRoom if error.errno in FULL else MachineError
    return kind(f"{path}: {error.strerror}")
