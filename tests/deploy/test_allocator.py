"""Memory that was freed is given back: shown by a process that frees what it had taken."""

from __future__ import annotations

import subprocess
import sys

# Buffers of a growing size, freed one by one, teach glibc to keep even larger ones.
PROGRAM = """
import sys
from metisfl.deploy.allocator import return_freed_memory
if sys.argv[1] == "set":
    return_freed_memory()
for size in range(200_000, 2_000_000, 100_000):
    bytearray(size)
held = [bytearray(250_000) for _ in range(200)]
pin = bytearray(1000)
del held[:199]
pages = int(open("/proc/self/statm").read().split()[1])
del held
print(pages * 4096 >> 20)
"""


def resident_mib(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_freed_buffers_of_a_chunk_go_back_to_the_system() -> None:
    kept, returned = resident_mib("as it is"), resident_mib("set")
    assert returned < kept - 30, f"{returned} MiB against {kept} MiB of 48 MiB freed"
