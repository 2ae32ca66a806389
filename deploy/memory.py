"""How much memory a process holds, and how much one used at most since a moment.

What this process holds is what it has allocated (RssAnon): pages of files that it reads or maps are
the kernel's to take back, and do not count.

Rule of the peak: the kernel counts, nothing is sampled. VmHWM is the largest resident set there
ever was (code, data and mapped files together), and writing 5 to clear_refs makes it begin anew.
Where the kernel refuses that, the figure holds the process's start, too: then it is too large,
never too small.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

from metisfl.proto.errors import MachineError

__all__ = ["PeakMemory", "give_back", "held_bytes", "needed_bytes"]

RESET_PEAK = "5"


def held_bytes() -> int:
    """What this process has allocated and uses; 0 where no /proc tells (other systems than Linux).

    Takes about 40 us.
    """
    try:
        data = Path("/proc/self/status").read_bytes()
    except OSError:
        return 0
    _, _, rest = data.partition(b"RssAnon:")
    return int(rest.split(maxsplit=1)[0]) * 1024 if rest else 0


def needed_bytes(limit_bytes: int) -> int:
    """What this process holds; where that is over the limit, what it holds and still needs."""
    held = held_bytes()
    if held <= limit_bytes:
        return held
    give_back()
    return held_bytes()


def give_back() -> None:
    """Return to the system what was freed and the C library still keeps, where it can do that."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """The resident memory of process `pid`, from its idle moment on, which is now."""

    def __init__(self, pid: int) -> None:
        """Raises MachineError where there is no /proc (other systems than Linux)."""
        self._folder = Path("/proc") / str(pid)
        self._idle_bytes = self._read("VmRSS")
        with suppress(OSError):
            (self._folder / "clear_refs").write_text(RESET_PEAK)

    def over_idle_bytes(self) -> int:
        """The most that there was above the idle moment. The process must still be there."""
        return max(0, self._read("VmHWM") - self._idle_bytes)

    def _read(self, key: str) -> int:
        try:
            lines = (self._folder / "status").read_text().splitlines()
            (line,) = (line for line in lines if line.startswith(f"{key}:"))
        except (OSError, ValueError):
            raise MachineError(f"{self._folder}/status tells no {key}; is this Linux?") from None
        return int(line.split()[1]) * 1024
