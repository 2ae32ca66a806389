"""How much memory a process used at most since a moment.

Rule: the kernel counts, nothing is sampled: VmHWM is the largest resident set there ever was (code,
data and mapped files together), and writing 5 to clear_refs makes it begin anew. Where the kernel
refuses that, the figure holds the process's start, too: then it is too large, never too small.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from metisfl.proto.errors import MachineError

__all__ = ["PeakMemory"]

RESET_PEAK = "5"


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
