"""`metisfl bench bulk`: how fast a model goes to a controller and back, with keys and without.

Rule: real processes, sockets and disks; a transfer counts when the whole model is on the other
end's disk and its digest was found right. With keys (CURVE) and without (PLAIN, `--insecure`) take
turns, so that whatever disturbs this machine disturbs both; each figure is the median of its turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import zmq

from metisfl.broker.client import Claim, ClientKeys, Credentials
from metisfl.deploy.options import whole_number
from metisfl.learner.transfer import BulkClient
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

__all__ = ["command"]

MIB: Final = 64
MIB_MAX: Final = 1 << 16
TURNS: Final = 3
TURNS_MAX: Final = 1000
LEARNER: Final = "learner:bench"
SERVER: Final = "metisfl.controller.bench_bulk"  # of another folder: started, never imported
SIDES: Final = ("curve", "plain")


@dataclass(frozen=True, slots=True)
class Side:
    """A controller, by what we are known to it, and the seconds of each transfer so far."""

    endpoint: str
    credentials: Credentials
    upload_s: list[float] = field(default_factory=list)
    download_s: list[float] = field(default_factory=list)


def command(argv: list[str]) -> int:
    """`metisfl bench bulk`: print the figures; with --json as one object."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench bulk",
        description="Upload one model to a controller on this machine and download it again, with "
        "keys (curve) and without (plain) in turns.",
    )
    parser.add_argument(
        "--mib",
        type=whole_number(1, MIB_MAX),
        default=MIB,
        metavar="N",
        help=f"size of the model in MiB (default: {MIB})",
    )
    parser.add_argument(
        "--turns",
        type=whole_number(1, TURNS_MAX),
        default=TURNS,
        metavar="N",
        help=f"transfers each way and side (default: {TURNS})",
    )
    parser.add_argument(
        "--folder", type=Path, help="where all disks are (default: a temporary folder)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="metisfl-bench-", dir=options.folder) as folder:
        figures = _measure(Path(folder), options.mib, options.turns)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:28} {value:>12,}")
    return 0


def _measure(folder: Path, mib: int, turns: int) -> dict[str, float]:
    model = folder / "model"
    values = np.random.default_rng(1).standard_normal((mib << 20) // 4, dtype=np.float32)
    digest = write_model(model, [Tensor("w", values, trainable=True)])
    with ExitStack() as stack:
        sides = {name: stack.enter_context(_side(folder, name, turns)) for name in SIDES}
        asyncio.run(_transfer(sides, model, digest, turns))
    megabytes = model.stat().st_size / 1e6
    figures: dict[str, float] = {"mib": mib, "turns": turns}
    for way in ("upload", "download"):
        curve, plain = (median(getattr(sides[name], f"{way}_s")) for name in SIDES)
        figures |= {
            f"{way}_mb_per_s_curve": round(megabytes / curve, 1),
            f"{way}_mb_per_s_plain": round(megabytes / plain, 1),
            f"{way}_curve_of_plain": round(plain / curve, 3),
        }
    return figures


async def _transfer(sides: dict[str, Side], model: Path, digest: bytes, turns: int) -> None:
    """Bring the model there and fetch it again, `turns` times, and once before to warm up."""
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(
                BulkClient(side.endpoint, side.credentials, federation="bench")
            )
            for name, side in sides.items()
        }
        for turn in range(turns + 1):
            for name in SIDES if turn % 2 == 0 else SIDES[::-1]:
                side, client = sides[name], clients[name]
                fetched = model.with_name(f"fetched-{name}")
                began = time.perf_counter()
                await client.upload(f"t{turn}", model, digest=digest)
                there = time.perf_counter()
                await client.download(digest, fetched)
                back = time.perf_counter()
                fetched.unlink()
                if turn:
                    side.upload_s.append(there - began)
                    side.download_s.append(back - there)


@contextmanager
def _side(folder: Path, name: str, turns: int) -> Iterator[Side]:
    """A controller's bulk endpoint in a process of its own."""
    public, secret = zmq.curve_keypair()
    command = [
        *(sys.executable, "-I", "-m", SERVER, "--home", str(folder / name)),
        *("--model", str(folder / "model"), "--tasks", str(turns + 1), "--learner", LEARNER),
        *((f"--public={public.decode()}",) if name == "curve" else ()),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if not (line := process.stdout.readline()):
                raise MachineError("the controller's end did not start; it says why above")
            told = json.loads(line)
            keys = ClientKeys(public, secret, told["public"].encode())
            yield Side(told["endpoint"], keys if name == "curve" else Claim(LEARNER))
        finally:
            process.stdin.close()  # it ends by that
