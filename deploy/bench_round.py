"""Measure what a round costs when training costs nothing.

Rule: real processes, keys, sockets and disks, as in any federation; the time is the log's own, from
the first TaskAssigned of a round stored to its RoundClosed stored. Evaluation is outside. Memory is
the controller's, from the moment at which all have joined and nothing was uploaded yet to the end
of the run: the initial model, every round and every download are in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.message import Message

from metisfl.deploy import logs
from metisfl.deploy.driver import drive
from metisfl.deploy.memory import PeakMemory
from metisfl.deploy.options import whole_number
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.settings import ANY_PORT, App, Encryption, Federation, Learner, Training
from metisfl.deploy.view import View
from metisfl.proto import ckks
from metisfl.proto import events_pb2 as pb

__all__ = ["command"]

# The bounds are those of a federation file and of the instant application.
SIZES = (
    ("--learners", 1000, 10, "processes that answer at once"),
    ("--params", 1 << 32, 1000, "parameters of the model"),
    ("--rounds", 100_000, None, "how many to measure"),
)
BIG = 100_000  # parameters; a median of fewer rounds is steady then
ROUNDS, ROUNDS_OF_BIG = 20, 3
LEASE_S = 600.0  # many learners on few cores are slow, and none of them is lost
SPEAK_EVERY_S = 2.0


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
            help=f"{what} (default: "
            f"{default or f'{ROUNDS}, or {ROUNDS_OF_BIG} above {BIG} parameters'})",
        )
    parser.add_argument(
        "--privacy",
        choices=("plain", "ckks"),
        default="plain",
        help="whether updates are encrypted (default: plain)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args(argv)
    rounds = options.rounds or (ROUNDS_OF_BIG if options.params > BIG else ROUNDS)
    federation = Federation(
        name="bench",
        rounds=rounds,
        quorum=options.learners,
        waits_for_quorum=False,
        lease_s=LEASE_S,
        seed=0,
        privacy=options.privacy,
        encryption=Encryption(
            profile="standard",  # whatever the number of learners, so that runs compare
            error=ckks.ERROR,
            min_contributors=min(2, options.learners),
            max_share=1.0,
            verify="none",
        ),
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
        meter = _Meter()
        asyncio.run(drive(federation, Path(folder) / "run", meter, meter.on_started))
    figures = {
        "privacy": options.privacy,
        "learners": options.learners,
        "params": options.params,
        **meter.figures(),
    }
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<24} {value:.3f}" if isinstance(value, float) else f"{name:<24} {value}")
    return 0


class _Meter(LineScreen):
    """A screen that notes when rounds began and closed, and what the controller's memory did."""

    def __init__(self) -> None:
        self._began_ns: dict[int, int] = {}
        self._closed_ns: dict[int, int] = {}
        self._update_bytes = 0
        self._controller = 0  # process id
        self._memory: PeakMemory | None = None
        self._peak_bytes = 0
        self._spoke_s = time.monotonic()

    def on_started(self, processes: Mapping[str, int]) -> None:
        self._controller = processes["controller"]

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        if isinstance(message, pb.RoundOpened) and self._memory is None:
            self._memory = PeakMemory(self._controller)
        elif isinstance(message, pb.TaskAssigned) and message.kind == pb.TRAIN:
            self._began_ns.setdefault(message.round, logged_unix_ns)
        elif isinstance(message, pb.RoundClosed) and message.round > 0:
            self._closed_ns[message.round] = logged_unix_ns
            self._update_bytes = max(after.stored.values())
        elif isinstance(message, pb.RunFinished) and self._memory is not None:
            self._peak_bytes = self._memory.over_idle_bytes()
        if time.monotonic() > self._spoke_s + SPEAK_EVERY_S:
            self.say(self._progress(after))

    def say(self, text: str) -> None:
        self._spoke_s = time.monotonic()
        super().say(text)

    def _progress(self, view: View) -> str:
        """Where the run is, in one line."""
        learners = len(view.learners)
        if self._memory is None:
            joined = sum(one.state != "starting" for one in view.learners.values())
            return f"{joined} of {learners} learners have joined"
        if view.closed is not None and view.closed.round == view.round:
            what = f"{len(view.evaluated)} of {learners} have scored the model"
        else:
            asked = learners if view.round else 1
            what = f"{len(view.stored)} of {asked} updates have come"
        doing = Counter(one.state for one in view.learners.values())
        states = ", ".join(f"{number} {state}" for state, number in sorted(doing.items()))
        return f"round {view.round} of {view.rounds}: {what} ({states})"

    def figures(self) -> Mapping[str, float | int]:
        times = sorted((self._closed_ns[r] - self._began_ns[r]) / 1e6 for r in self._closed_ns)
        return {
            "rounds": len(times),
            "orchestration_ms_p50": round(statistics.median(times), 3),
            "orchestration_ms_p99": round(times[min(len(times) - 1, int(len(times) * 0.99))], 3),
            "update_bytes": self._update_bytes,
            "peak_rss_over_idle_bytes": self._peak_bytes,
        }
