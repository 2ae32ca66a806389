"""A federation of real daemons, honest sites and, beside them, whoever attacks it.

Each attack has a key of its own, by its own name, so that a line in a log says which one it is of.
"""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from daemons import DEADLINE_S, Daemons
from google.protobuf.message import Message
from watched import APP, said_by

from metisfl.deploy.broker_access import Access
from metisfl.deploy.database import open_database
from metisfl.deploy.run_folder import DRIVER
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.settings import load_federation
from metisfl.deploy.view import View
from metisfl.deploy.watch import new_view, watch
from metisfl.proto import events_pb2 as pb

HONEST = ("ada", "bob", "cyd")
TRAINING_S = "1.0"
RUN_S = 150.0
LEASE_S = 20.0
ATTACK = Path(__file__).with_name("attack.py")
FEDERATION = "outages"
FILES = 65_536  # as the units have it


class Attackers:
    """Processes of attack.py. Those that are paused do nothing, and their connections stay."""

    def __init__(self, daemons: Daemons) -> None:
        self._daemons = daemons
        self._processes: list[subprocess.Popen[str]] = []

    def start(
        self, *attacks: str, nice: int = 19, keys: bool = True, seconds: float = 600
    ) -> Attackers:
        """One process; `keys`: each attack is somebody whom the federation knows."""
        daemons = self._daemons
        command = [sys.executable, str(ATTACK), "--ingress", daemons.ingress]
        command += ["--live", daemons.live, "--bulk", daemons.bulk, "--federation", FEDERATION]
        command += ["--nice", str(nice), "--seconds", str(seconds)]
        command += ["--as", "learner:{}" if keys else "learner:mallory"]
        if keys:
            command += ["--home", str(daemons.homes.folder / "learners" / "{}")]
        started = subprocess.Popen([*command, *attacks], stdout=subprocess.PIPE, text=True)
        self._processes.append(started)
        return self

    def pause(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGCONT)

    def end(self) -> dict[str, dict[str, Any]]:
        """Stop all, and return what each attack tells."""
        self.go_on()
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        return self.wait(DEADLINE_S)

    def wait(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Wait until all have ended, and return what each attack tells."""
        told: dict[str, dict[str, Any]] = {}
        for process in self._processes:
            output, _ = process.communicate(timeout=seconds)
            told |= {one["attack"]: one for one in map(json.loads, output.splitlines())}
            assert process.returncode == 0, f"an attack broke: {told}"
        self._processes.clear()
        return told


Field = Callable[..., Daemons]


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Field]:
    """Starts broker, controller and the honest sites, with keys for whoever is named beside them.

    They serve when it returns. None of them may have had an unexpected error at the end.
    """
    started: list[Daemons] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(FILES, hard)), hard))

    def start(*others: str, encrypted: bool = False, **environment: str) -> Daemons:
        sites = dict.fromkeys((*HONEST, *others), TRAINING_S)
        daemons = Daemons(tmp_path, sites, encrypted=encrypted, app=APP, started=False)
        started.append(daemons)
        daemons.sites = dict.fromkeys(HONEST, TRAINING_S)
        for name in daemons.names:
            daemons.environments[name] = environment
            daemons.start(name)
        deadline = time.monotonic() + DEADLINE_S
        for name, word in {"broker": "serving", "controller": "serving", "cyd": "joined"}.items():
            while not any(line["event"] == word for line in said_by(daemons, name)):
                assert time.monotonic() < deadline, f"{name} is not {word}"
                time.sleep(0.05)
        return daemons

    yield start
    for daemons in started:
        daemons.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def attackers() -> Iterator[Callable[[Daemons], Attackers]]:
    """Ends those that a failed test has left."""
    started: list[Attackers] = []

    def start(daemons: Daemons) -> Attackers:
        started.append(Attackers(daemons))
        return started[-1]

    yield start
    for one in started:
        one.end()


class _Clock(LineScreen):
    """Notes when each round was opened, by the broker's clock."""

    def __init__(self, at_round: Callable[[int], None]) -> None:
        self._at_round = at_round
        self.times: dict[int, int] = {}

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        super().show(before, after, message, logged_unix_ns)
        if not logged_unix_ns or not before.started:
            return
        if isinstance(message, pb.RoundOpened):
            self.times[message.round] = logged_unix_ns
            self._at_round(message.round)
        elif isinstance(message, pb.RunFinished):
            self.times[before.rounds + 1] = logged_unix_ns


def run(
    daemons: Daemons,
    rounds: int,
    learners: Sequence[str] = HONEST,
    at_round: Callable[[int], None] = lambda _: None,
) -> tuple[View, dict[int, float]]:
    """A run of `learners`, of whom as many as are honest are enough: its end, and how long each
    round took, in seconds from opening to opening."""
    daemons.sites = dict.fromkeys(learners, TRAINING_S)
    path = daemons.write_federation(rounds, quorum=len(HONEST), lease_s=LEASE_S)
    daemons.sites = dict.fromkeys(HONEST, TRAINING_S)
    federation = load_federation(path)
    for left in daemons.homes.driver.glob("driver.db*"):
        left.unlink()
    clock = _Clock(at_round)

    async def story() -> View:
        access = Access(daemons.ingress, daemons.live, DRIVER, daemons.homes.driver_keys)
        with closing(open_database(daemons.homes.driver / "driver.db")) as connection:
            view = new_view(federation)
            work = watch(federation, access=access, connection=connection, view=view, screen=clock)
            return await asyncio.wait_for(work, RUN_S)

    view = asyncio.run(story())
    took = {
        number: (clock.times[number + 1] - at) / 1e9
        for number, at in clock.times.items()
        if number + 1 in clock.times
    }
    return view, took


@pytest.fixture
def run_of() -> Callable[..., tuple[View, dict[int, float]]]:
    return run
