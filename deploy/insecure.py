"""`--insecure`: no keys and no encryption, for a lab network or for measuring.

Rule: it is asked for by name, never a default, never implied, not in a federation file; and whoever
runs like that says so, at the start and once a minute.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Final

import structlog

from metisfl.deploy.options import add_flag
from metisfl.deploy.run import StopSignal

__all__ = ["INSECURE", "INSECURE_VARIABLE", "Shout", "add_insecure", "shout_until"]

INSECURE: Final = (
    "INSECURE: nothing is encrypted and nobody is authenticated: whoever reaches a port can read "
    "all that passes and be anybody; for a lab network or for measuring, and nothing else; start "
    "without --insecure"
)
INSECURE_VARIABLE: Final = "METISFL_INSECURE"
AGAIN_S: Final = 60.0

log = structlog.get_logger()


def add_insecure(parser: argparse.ArgumentParser) -> None:
    """Add --insecure, which everybody of a federation must have, or nobody."""
    add_flag(
        parser,
        "insecure",
        help="no keys and no encryption: everybody is believed to be who they say; for a lab "
        "network or for measuring, with all of a federation alike",
    )


class Shout:
    """For a daemon that polls: call `tick` as often as you like."""

    def __init__(self) -> None:
        self._next = 0.0

    def tick(self, now: float) -> None:
        """`now` is monotonic, in seconds."""
        if now >= self._next:
            self._next = now + AGAIN_S
            log.critical(INSECURE)


async def shout_until(stop: StopSignal) -> None:
    """For an asyncio daemon, in place of `stop.wait()`."""
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while not stopped.done():
            log.critical(INSECURE)
            await asyncio.wait({stopped}, timeout=AGAIN_S)
    finally:
        stopped.cancel()
