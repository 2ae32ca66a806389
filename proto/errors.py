"""Errors by whose fault they are.

Rule: the class says who must act (the user, the peer, the machine's owner); the text says what was
found, what is allowed and what to do. A defect of ours is an AssertionError or an ordinary Python
exception and is never caught to be carried on from.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = ["MachineError", "MetisError", "PeerError", "UserError"]


class MetisError(Exception):
    """Never raised itself. `exit_code` is what a command ends with when nobody handles it."""

    exit_code: ClassVar[int] = 70


class UserError(MetisError):
    """What the user asked for or wrote down cannot be: a typo, an impossible value."""

    exit_code = 2


class MachineError(MetisError):
    """This machine cannot serve: a port in use, a full disk, a missing package."""

    exit_code = 3


class PeerError(MetisError):
    """Another process sent what it must not send. It is told, counted, and nothing else stops."""

    exit_code = 4
