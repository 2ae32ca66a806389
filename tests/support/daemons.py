"""A federation of daemons started by hand, so that a test can kill one and start it again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from joint_keys import joint_keys

from metisfl.deploy.ckks_keys import write_new_key
from metisfl.deploy.processes import free_endpoints
from metisfl.deploy.run_folder import RunFolder, create_run_folder
from metisfl.proto.records import RoundRecord, unpack_record

METISFL = str(Path(sys.executable).with_name("metisfl"))
DEADLINE_S = 60.0
APPS = Path(__file__).parents[1] / "services"

# Site of tests/services/trouble.py, but while `pause` (a FIFO) exists, training opens it and hangs.
APP = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import trouble

class Site(trouble.Site):
    def train(self, tensors, hyperparameters, seed, progress, cancelled):
        pause = Path({pause!r})
        if self.count == 2 and pause.exists():
            pause.open("w").close()
            while True:
                progress(0.5, {{}})
                time.sleep(0.01)
        return super().train(tensors, hyperparameters, seed, progress, cancelled)
"""


class Daemons:
    """A federation of daemons started by hand, each as its own process."""

    def __init__(
        self,
        folder: Path,
        sites: dict[str, str],
        *,
        encrypted: bool = False,
        joint: bool = False,
        late: str = "",
        app: str = "paused:Site",
        wires: bool = False,
        started: bool = True,
    ) -> None:
        """`sites` gives each site's behaviour. `late` is one that is not started yet.

        With `wires` everybody connects to endpoints of their own, `near`, which the test must
        relay to those that the servers bind. `started` False: the test starts all of them.
        """
        self.folder = folder
        self.sites = sites
        self.privacy = "ckks-threshold" if joint else "ckks" if encrypted else "plain"
        self.without_quorum = "wait"
        self.pause = folder / "pause"
        paused = APP.format(folder=str(APPS), pause=str(self.pause))
        (folder / "paused.py").write_text(paused)
        self.homes: RunFolder = create_run_folder(folder / "run", list(sites))
        self.app = app
        self.ingress, self.live, self.bulk = free_endpoints(["tcp://127.0.0.1:0"] * 3)
        self.near = {"ingress": self.ingress, "live": self.live, "bulk": self.bulk}
        if wires:
            found = free_endpoints(["tcp://127.0.0.1:0"] * 3)
            self.near = dict(zip(self.near, found, strict=True))
        self.environments: dict[str, dict[str, str]] = {}
        """What is added to a daemon's environment, by name."""
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.drivers: list[subprocess.Popen[str]] = []
        if encrypted:
            self._give_key()
        if joint:
            self._give_joint_key()
        for name in self.names if started else ():
            if name != late:
                self.start(name)

    @property
    def names(self) -> tuple[str, ...]:
        return ("broker", "controller", *self.sites)

    def _give_key(self) -> None:
        made = self.folder / "key"
        command = ["keys", "new", str(made), "--max-learners", str(len(self.sites))]
        subprocess.run([METISFL, *command], check=True, capture_output=True)
        for home in (self.homes.controller, *self.homes.learners.values()):
            shutil.copy(made / "public.ckks", home / "keys")
        for home in self.homes.learners.values():
            shutil.copy(made / "secret.ckks", home / "keys")

    def _give_joint_key(self) -> None:
        """What a ceremony would make."""
        for name, (public, secret) in joint_keys(list(self.sites)).items():
            write_new_key(self.homes.learners[name] / "keys", public, secret)
        shutil.copy(
            self.homes.learners[name] / "keys" / "public.ckks", self.homes.controller / "keys"
        )

    def module_and_options(self, name: str) -> tuple[str, dict[str, str]]:
        """How a daemon is started: `python -m MODULE --option value ...`."""
        options = {"ingress": self.ingress, "live": self.live}
        home = self.homes.learners.get(name, self.homes.folder / name)
        if name != "broker":
            options = {"ingress": self.near["ingress"], "live": self.near["live"]}
            options |= {"federation": "outages", "bulk": self.bulk}
        if name in self.sites:
            options |= {"name": name, "app": self.app, "data": self.sites[name]}
            options |= {"path": str(self.folder), "bulk": self.near["bulk"]}
        service = "learner" if name in self.sites else name
        return f"metisfl.{service}.service", {"home": str(home), **options}

    def start(self, name: str) -> None:
        module, options = self.module_and_options(name)
        command = [sys.executable, "-m", module]
        command += [part for key, value in options.items() for part in (f"--{key}", value)]
        with (self.homes.logs / f"{name}.log").open("a") as log:
            environment = {**os.environ, **self.environments.get(name, {})}
            self.running[name] = subprocess.Popen(
                command, stderr=log, stdout=log, text=True, env=environment
            )

    def end(self, name: str, number: int) -> None:
        self.running[name].send_signal(number)
        self.running.pop(name).wait(DEADLINE_S)

    def restart(self, name: str, number: int = signal.SIGKILL) -> None:
        self.end(name, number)
        self.start(name)

    def write_federation(self, rounds: int, quorum: int = 2, lease_s: float = 60) -> Path:
        """The file that asks for a run of these daemons."""
        text = f"[federation]\nname = 'outages'\nrounds = {rounds}\nquorum = {quorum}\n"
        text += f"privacy = '{self.privacy}'\nlease_s = {lease_s}\n"
        text += f"without_quorum = '{self.without_quorum}'\n"
        text += f"[app]\nobject = '{self.app}'\npath = '{self.folder}'\n"
        text += f"[broker]\ningress = '{self.ingress}'\nlive = '{self.live}'\n"
        text += "".join(f"[[learners]]\nname = '{name}'\n" for name in self.sites)
        path = self.folder / "federation.toml"
        path.write_text(text)
        return path

    def run(self, rounds: int, quorum: int = 2, lease_s: float = 60) -> subprocess.Popen[str]:
        """`metisfl run`."""
        path = self.write_federation(rounds, quorum, lease_s)
        command = [METISFL, "run", path, "--home", self.homes.driver]
        driver = subprocess.Popen(
            [str(part) for part in command],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.drivers.append(driver)
        return driver

    def records(self) -> list[RoundRecord]:
        paths = (self.homes.controller / "rounds").rglob("*.msgpack")
        found = [unpack_record(path.read_bytes()) for path in paths]
        return sorted(found, key=lambda record: record.round)

    def stop(self) -> None:
        """End everything; no daemon may have had an unexpected error."""
        for name in list(self.running):
            self.end(name, signal.SIGTERM)
        for driver in self.drivers:
            driver.kill()
            driver.communicate()
        for log in self.homes.logs.iterdir():
            said = log.read_text()
            assert "Traceback" not in said, said
            assert "never awaited" not in said, said
