"""Targets under atheris, each in a process of its own: libFuzzer ends the process when it is done.

Rule: everything is loaded and instrumented once, before the processes are forked. They share no
file but the folder of what is found, and write nothing to the terminal.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

from fuzzed.target import Target
from metisfl.proto.errors import MachineError

__all__ = ["fuzz_all", "replay"]

INPUT_S = 10
SHOWN_LINES = 40


def fuzz_all(targets: Sequence[Target], seconds: float, folder: Path) -> list[str]:
    """Feed each target for so long, as many at a time as there are processors.

    Returns what was found, in words. Raises MachineError if there is no atheris.
    """
    try:
        import atheris
    except ImportError:
        raise MachineError("atheris is missing: run `make setup`") from None
    # Function by function: atheris's import hook does not see an editable install.
    for each in gc.get_objects():
        if isinstance(each, FunctionType) and _is_ours(each):
            atheris.instrument_func(each)
    running: dict[int, Target] = {}
    reports: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for target in targets:
            if len(running) == os.cpu_count():
                reports += _next_end(running, folder)
            running[_start(atheris, target, seconds, folder, Path(scratch))] = target
        while running:
            reports += _next_end(running, folder)
    return reports


def replay(target: Target, path: Path) -> None:
    """Give one input to the law, without a fuzzer: what it raises is the finding."""
    taken = target.law(path.read_bytes())
    print(f"{target.name}: {path} is {'taken' if taken else 'refused'}, as it should be")


def _start(atheris: Any, target: Target, seconds: float, folder: Path, scratch: Path) -> int:
    found, temporary = folder / "found" / target.name, scratch / target.name
    for each in (folder / target.name, found, temporary):
        each.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            _fuzz(atheris, target, seconds, folder, temporary)
        finally:
            # Not Python's way out, which would tidy up for the parent; but libFuzzer is told, and
            # writes down what it was trying.
            ctypes.CDLL(None).exit(1)
    return pid


def _fuzz(atheris: Any, target: Target, seconds: float, folder: Path, temporary: Path) -> NoReturn:
    log = os.open(folder / f"{target.name}.log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    tempfile.tempdir = str(temporary)
    seeds = Path(tempfile.mkdtemp())
    for number, seed in enumerate(target.seeds()):
        (seeds / f"seed-{number}").write_bytes(seed)
    arguments = [
        f"-max_total_time={max(1, round(seconds))}",
        f"-max_len={target.bytes_max}",
        "-len_control=100",
        f"-timeout={INPUT_S}",
        f"-rss_limit_mb={target.rss_mb}",
        "-print_final_stats=1",
        f"-artifact_prefix={folder / 'found' / target.name}/",
        str(folder / target.name),
        str(seeds),
        str(folder / "found" / target.name),  # what was found is tried again, until it is mended
    ]
    more = {}
    if (mutation := target.mutation) is not None:
        more["custom_mutator"] = lambda data, most, seed: mutation(data, most, seed, atheris.Mutate)
    atheris.Setup([sys.argv[0], *arguments], target.law, **more)
    atheris.Fuzz()
    raise AssertionError("libFuzzer came back")


def _next_end(running: dict[int, Target], folder: Path) -> list[str]:
    """Wait until one of the processes ends; what it found, if it did."""
    pid, status = os.wait()
    target = running.pop(pid)
    if status == 0:
        return []
    lines = (folder / f"{target.name}.log").read_text(errors="replace").splitlines()
    again = [
        f".venv/bin/python -I tests/fuzz {target.name} --input {path}"
        for path in sorted((folder / "found" / target.name).iterdir())
    ]
    return ["\n".join([f"---- {target.name}", *lines[-SHOWN_LINES:], *again])]


def _is_ours(function: FunctionType) -> bool:
    module = function.__module__ or ""
    return module.startswith("metisfl.") and not module.endswith("_pb2")
