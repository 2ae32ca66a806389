"""A small disk of its own under one folder, which can be filled and emptied. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20


class SmallDisk:
    """What is in `folder` is on a disk of `mib` MiB; what was there before is copied to it."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        assert os.geteuid() == 0, "a small disk is mounted for this test: run it as root"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = folder.with_name(f"{folder.name}.before")
        shutil.copytree(folder, before)
        options = f"size={mib}m,mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        shutil.copytree(before, folder, dirs_exist_ok=True)
        shutil.rmtree(before)
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(MIB // 16)):
                    pass
            except OSError:
                return

    def empty(self) -> None:
        self._filler.unlink()

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[SmallDisk]:
    disk = SmallDisk(folder, mib)
    try:
        yield disk
    finally:
        disk.unmount()
