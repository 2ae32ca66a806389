"""Errors by whose fault they are.

Rule: the class says who must act (the user, the peer, the machine's owner); the text says what was
found, what is allowed and what to do. A defect of ours is an AssertionError or an ordinary Python
exception and is never caught to be carried on from.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

__all__ = [
    "FULL",
    "DiskFull",
    "MachineError",
    "MetisError",
    "PeerError",
    "UserError",
    "machine_error",
]

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Of an OSError: the disk is full, or somebody's part of it."""


class MetisError(Exception):
    """Never raised itself. `exit_code` is what a command ends with when nobody handles it."""

    exit_code: ClassVar[int] = 70


class UserError(MetisError):
    """What the user asked for or wrote down cannot be: a typo, an impossible value."""

    exit_code = 2


class MachineError(MetisError):
    """This machine cannot serve: a port in use, a full disk, a missing package."""

    exit_code = 3


class DiskFull(MachineError):
    """There is no room now, and may be later: whoever started the process starts it again then."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class PeerError(MetisError):
    """Another process sent what it must not send. It is told, counted, and nothing else stops."""

    exit_code = 4


def machine_error(text: str, error: OSError) -> MachineError:
    """The error that says `text`: DiskFull if `error` is that, which heals by itself."""
    return (DiskFull if error.errno in FULL else MachineError)(text)
