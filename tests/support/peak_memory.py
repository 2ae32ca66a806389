"""How much memory a call takes at its peak, measured in a fresh process."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from metisfl.proto.errors import PeerError

__all__ = ["peak_bytes"]

SELF = Path("/proc/self")


def peak_bytes(parse: Callable[..., object], *arguments: Any) -> int:
    """The memory that `parse(*arguments)` adds at its peak, whatever it says to them.

    The process is forked from one that has only imported things: in one with a past, what is free
    in its heap would hide what is taken.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["peak_memory", parse.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measured, parse, arguments).result(timeout=60)


def _measured(parse: Callable[..., object], arguments: tuple[Any, ...]) -> int:
    (SELF / "clear_refs").write_text("5")  # the peak is what is used now
    before = _peak()
    with suppress(PeerError):
        parse(*arguments)
    return _peak() - before


def _peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", (SELF / "status").read_text())
    assert found is not None
    return int(found[1]) * 1024
