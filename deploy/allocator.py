"""How the C library's allocator keeps memory.

Rule: a daemon that moves model bytes gives them back. glibc raises, by itself, the size above which
a block is returned to the system when it is freed, and gives every thread an arena of its own;
buffers of a chunk then stay for good, as many as were ever there at once.
"""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["return_freed_memory"]

M_MMAP_THRESHOLD: Final = -3  # both from glibc's malloc.h
M_ARENA_MAX: Final = -8
LARGE_BYTES: Final = 128 * 1024  # glibc's own first value; setting it keeps it


def return_freed_memory() -> None:
    """From now on blocks of 128 KiB and more go back when they are freed; threads share an arena.

    Does nothing where the C library has no such settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(M_ARENA_MAX, 1)
