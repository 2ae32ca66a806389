"""Measure this machine: the speed of the parts, next to its own limits and the alternatives.

Rule: like `metisfl` itself, it only dispatches; each folder registers its benches, `command(argv)
-> int`, in the entry-point group `metisfl.benches`.
"""

from __future__ import annotations

from metisfl.deploy.command import dispatch

__all__ = ["command"]

BENCHES_GROUP = "metisfl.benches"
ABOUT = "Measure a part of MetisFL on this machine, next to the limit that it cannot pass."


def command(argv: list[str]) -> int:
    """`metisfl bench NAME ...`: run the bench NAME with the rest of the arguments."""
    return dispatch("metisfl bench", BENCHES_GROUP, ABOUT, argv)
