"""Daemons that are killed and started again, one by one: the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from driver_output import wait_for

from metisfl.deploy.processes import free_endpoints
from metisfl.deploy.run_folder import RunFolder, create_run_folder
from metisfl.proto.records import unpack_record

DEADLINE_S = 60.0

# Site of tests/services/trouble.py, but while `pause` (a FIFO) exists, training opens it and hangs.
APP = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import trouble

class Site(trouble.Site):
    def train(self, tensors, hyperparameters, seed, progress, cancelled):
        pause = Path({pause!r})
        if self.examples == 2 and pause.exists():
            pause.open("w").close()
            while True:
                progress(0.5, {{}})
                time.sleep(0.01)
        return super().train(tensors, hyperparameters, seed, progress, cancelled)
"""
SITES = {"ada": "honest 1", "bob": "honest 2"}


class Daemons:
    """A federation of daemons started by hand, each as its own process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pause = folder / "pause"
        app = APP.format(folder=str(Path(__file__).parent), pause=str(self.pause))
        (folder / "paused.py").write_text(app)
        self.homes: RunFolder = create_run_folder(folder / "run", list(SITES))
        self.ingress, self.live, self.bulk = free_endpoints(["tcp://127.0.0.1:0"] * 3)
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.drivers: list[subprocess.Popen[str]] = []
        for name in ("broker", "controller", *SITES):
            self.start(name)

    def start(self, name: str) -> None:
        options = {"ingress": self.ingress, "live": self.live}
        home = self.homes.learners.get(name, self.homes.folder / name)
        if name != "broker":
            options |= {"federation": "outages", "bulk": self.bulk}
        if name in SITES:
            options |= {"name": name, "app": "paused:Site", "data": SITES[name]}
            options["path"] = str(self.folder)
        service = "learner" if name in SITES else name
        command = [sys.executable, "-m", f"metisfl.{service}.service", "--home", str(home)]
        command += [part for key, value in options.items() for part in (f"--{key}", value)]
        with (self.homes.logs / f"{name}.log").open("a") as log:
            self.running[name] = subprocess.Popen(command, stderr=log, stdout=log, text=True)

    def end(self, name: str, number: int) -> None:
        self.running[name].send_signal(number)
        self.running.pop(name).wait(DEADLINE_S)

    def restart(self, name: str, number: int = signal.SIGKILL) -> None:
        self.end(name, number)
        self.start(name)

    def run(self, rounds: int, quorum: int = 2) -> subprocess.Popen[str]:
        """`metisfl run`."""
        text = f"[federation]\nname = 'outages'\nrounds = {rounds}\nquorum = {quorum}\n"
        text += f"[app]\nobject = 'paused:Site'\npath = '{self.folder}'\n"
        text += f"[broker]\ningress = '{self.ingress}'\nlive = '{self.live}'\n"
        text += "".join(f"[[learners]]\nname = '{name}'\n" for name in SITES)
        (self.folder / "federation.toml").write_text(text)
        metisfl = Path(sys.executable).with_name("metisfl")
        command = [metisfl, "run", self.folder / "federation.toml", "--home", self.homes.driver]
        driver = subprocess.Popen(
            [str(part) for part in command],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver)
        return driver

    def rounds(self) -> list[int]:
        records = (self.homes.controller / "rounds").rglob("*.msgpack")
        return sorted(unpack_record(path.read_bytes()).round for path in records)


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path)
    try:
        yield daemons
    finally:
        for name in list(daemons.running):
            daemons.end(name, signal.SIGTERM)
        for driver in daemons.drivers:
            driver.kill()
            driver.communicate()
    for log in daemons.homes.logs.iterdir():
        said = log.read_text()
        assert "Traceback" not in said, said
        assert "never awaited" not in said, said


def test_every_round_is_closed_once_whoever_is_killed_meanwhile(daemons: Daemons) -> None:
    driver = daemons.run(rounds=40)
    for number, name in enumerate(("controller", "broker", "ada", "controller", "bob", "broker")):
        wait_for(driver, f"round {5 * number + 2} of")
        daemons.restart(name)
    output, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    mean = 40 * (1 * 1 + 2 * 2) / 3
    assert f"test mean {mean:.3f}" in output, "every round added its mean once"
    assert daemons.rounds() == list(range(41))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_site_that_is_restarted_while_it_trains_is_counted(
    daemons: Daemons, number: signal.Signals
) -> None:
    os.mkfifo(daemons.pause)
    driver = daemons.run(rounds=1)
    daemons.pause.open().close()  # returns when the site trains
    daemons.pause.unlink()
    daemons.restart("bob", number)
    output, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    assert "1 rounds in" in output
    assert "failed" not in rest


def test_who_asks_while_a_run_goes_on_is_told_so_and_disturbs_nobody(daemons: Daemons) -> None:
    os.mkfifo(daemons.pause)
    first = daemons.run(rounds=2)
    daemons.pause.open().close()
    second = daemons.run(rounds=1)
    _, rest = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 1
    assert "is training; wait for its end" in rest
    daemons.pause.unlink()
    daemons.restart("bob")
    _, rest = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 0, rest


def test_an_interrupted_command_says_so_and_what_never_reached_the_broker_is_not_asked_again(
    daemons: Daemons,
) -> None:
    daemons.end("broker", signal.SIGKILL)
    lonely = daemons.run(rounds=9)
    wait_for(lonely, "the broker does not answer")
    lonely.send_signal(signal.SIGINT)
    output, rest = lonely.communicate(timeout=DEADLINE_S)
    assert (lonely.returncode, output) == (130, ""), "stdout is for the result"
    assert "interrupted" in rest
    daemons.start("broker")
    driver = daemons.run(rounds=1)
    _, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    assert daemons.rounds() == [0, 1]
