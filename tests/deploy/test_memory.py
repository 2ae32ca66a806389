"""The peak is the process's own since it was idle, and what it gave back still counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from metisfl.deploy.memory import PeakMemory
from metisfl.proto.errors import MachineError

MIB = 1 << 20
NOISE = 8 * MIB  # the kernel counts in batches, and Python allocates a little at any time

# Each line on stdin is a size to use and give back; each line on stdout says that it is done.
PROCESS = f"""
import mmap, sys
for line in sys.stdin:
    with mmap.mmap(-1, int(line) * {MIB}) as used:
        for page in range(0, len(used), mmap.PAGESIZE):
            used[page] = 1
    print(flush=True)
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-Ic", PROCESS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def use(process: subprocess.Popen[str], mebibytes: int) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    print(mebibytes, file=process.stdin, flush=True)
    process.stdout.readline()


def test_what_was_used_and_given_back_counts_and_what_was_before_does_not(
    process: subprocess.Popen[str],
) -> None:
    use(process, 200)
    memory = PeakMemory(process.pid)
    use(process, 1)
    assert memory.over_idle_bytes() < NOISE, "200 MiB were before"
    use(process, 64)
    assert 64 * MIB <= memory.over_idle_bytes() + NOISE < 64 * MIB + 2 * NOISE
    use(process, 16)
    assert memory.over_idle_bytes() + NOISE >= 64 * MIB, "it is the most, not the newest"


def test_a_process_that_is_gone_is_no_figure() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(MachineError, match=rf"/proc/{gone.pid}/status tells no VmRSS"):
        PeakMemory(gone.pid)


HELD = f"""
import mmap, sys
from metisfl.deploy.memory import held_bytes
with open(sys.argv[1], "rb") as file:
    before = held_bytes()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        assert sum(pages[:: mmap.PAGESIZE]) == 0
        assert held_bytes() - before < {NOISE}, "a page of a file is the kernel's to take back"
    allocated = bytearray(64 * {MIB})
    for page in range(0, len(allocated), mmap.PAGESIZE):
        allocated[page] = 1
    assert held_bytes() - before >= len(allocated) - {NOISE}
    del allocated
    assert held_bytes() - before < {NOISE}
"""


def test_what_is_allocated_is_held_and_what_is_mapped_of_a_file_is_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(bytes(64 * MIB))
    command = [sys.executable, "-Ic", HELD, str(model)]  # a process of its own: nothing else moves
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
