"""How the C library's allocator keeps memory.

Rule: a daemon that moves model bytes gives them back. glibc raises, by itself, the size above which
a block is returned to the system when it is freed; buffers of a chunk then stay for good, as many
as were ever there at once.
"""

from __future__ import annotations

import ctypes
from typing import Final

__all__ = ["return_large_blocks"]

M_MMAP_THRESHOLD: Final = -3  # malloc.h of glibc
LARGE_BYTES: Final = 128 * 1024  # glibc's own first value; setting it keeps it


def return_large_blocks() -> None:
    """From now on blocks of 128 KiB and more go back to the system when they are freed.

    Does nothing where the C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
