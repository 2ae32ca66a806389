"""Measure what a round costs when training costs nothing.

Rule: real processes, keys, sockets and disks, as in any federation; the time is the log's own, from
the first TaskAssigned of a round stored to its RoundClosed stored. Evaluation is outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from metisfl.deploy import logs
from metisfl.deploy.driver import drive
from metisfl.deploy.options import whole_number
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.settings import ANY_PORT, App, Federation, Learner, Training
from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

__all__ = ["command"]

# The bounds are those of a federation file and of the instant application.
SIZES = (
    ("--learners", 1000, 10, "processes that answer at once"),
    ("--params", 1 << 32, 1000, "parameters of the model"),
    ("--rounds", 100_000, 20, "how many to measure"),
)


def command(argv: list[str]) -> int:
    """`metisfl bench round`: the time of a round without training."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench round",
        description="Run a federation whose learners return at once, and measure the rounds.",
    )
    for flag, most, default, what in SIZES:
        parser.add_argument(
            flag,
            type=whole_number(1, most),
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args(argv)
    federation = Federation(
        name="bench",
        rounds=options.rounds,
        quorum=options.learners,
        lease_s=60.0,
        seed=0,
        privacy="plain",
        training=Training(epochs=1, batch_size=1, learning_rate=None),
        app=App("metisfl.learner.instant:Instant", Path(".")),
        learners=tuple(
            Learner(f"l{number:04d}", str(options.params)) for number in range(options.learners)
        ),
        ingress=ANY_PORT,
        live=ANY_PORT,
        bulk=ANY_PORT,
    )
    logs.configure("metisfl", level="warning")
    with tempfile.TemporaryDirectory(prefix="metisfl-bench-") as folder:
        stopwatch = _Stopwatch(options.rounds)
        asyncio.run(drive(federation, Path(folder) / "run", stopwatch))
    figures = stopwatch.figures(options.learners, options.params)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<22} {value:.3f}" if isinstance(value, float) else f"{name:<22} {value}")
    return 0


class _Stopwatch(LineScreen):
    """A screen that notes when the rounds began and closed."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._began_ns: dict[int, int] = {}
        self._closed_ns: dict[int, int] = {}

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        if isinstance(message, pb.TaskAssigned) and message.kind == pb.TRAIN:
            self._began_ns.setdefault(message.round, logged_unix_ns)
        elif isinstance(message, pb.RoundClosed) and message.round > 0:
            self._closed_ns[message.round] = logged_unix_ns
            if message.round % 10 == 0:
                print(f"round {message.round} of {self._rounds}", file=sys.stderr, flush=True)

    def figures(self, learners: int, params: int) -> Mapping[str, float | int]:
        times = sorted((self._closed_ns[r] - self._began_ns[r]) / 1e6 for r in self._closed_ns)
        return {
            "learners": learners,
            "params": params,
            "rounds": len(times),
            "orchestration_ms_p50": round(statistics.median(times), 3),
            "orchestration_ms_p99": round(times[min(len(times) - 1, int(len(times) * 0.99))], 3),
        }
