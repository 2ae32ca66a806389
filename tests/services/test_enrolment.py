"""A hospital joins a running federation by telephone: invite, join, compare, admit, take part."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import DEADLINE_S, METISFL, Daemons

FINGERPRINT = re.compile(r"(?:[A-Z2-7]{4}-){4}[A-Z2-7]{4}")
BIN = str(Path(METISFL).parent)


class Hospital:
    """Commands at the operator's and at the site, whose home is `ada`."""

    def __init__(self, daemons: Daemons) -> None:
        self.daemons, self.folder = daemons, daemons.folder
        self.broker, self.controller = daemons.homes.broker, daemons.homes.controller
        self.joining: list[subprocess.Popen[str]] = []

    def operator(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [METISFL, *command], capture_output=True, text=True, timeout=DEADLINE_S
        )

    def invite(self) -> str:
        ends = {"ingress": self.daemons.ingress, "live": self.daemons.live}
        options = {**ends, "bulk": self.daemons.bulk, "federation": "outages"}
        flags = [part for name, value in options.items() for part in (f"--{name}", value)]
        done = self.operator("invite", "ada", "--home", str(self.broker), *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def join(self, code: str, home: str = "ada") -> subprocess.Popen[str]:
        command = [METISFL, "join", code, "--home", home, "--wait-s", str(int(DEADLINE_S))]
        joining = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.joining.append(joining)
        return joining

    def admit(self, fingerprint: str) -> subprocess.CompletedProcess[str]:
        homes = ["--home", str(self.broker), "--home", str(self.controller)]
        return self.operator("admit", "ada", *homes, "--fingerprint", fingerprint)

    def listed(self) -> str:
        return self.operator("admit", "--home", str(self.broker)).stdout

    def start_learner(self, said: str) -> None:
        """With the last two lines that `metisfl join` has printed, and an application."""
        settings, learner = (line.strip() for line in said.splitlines()[-2:])
        learner = learner.replace("MODULE:OBJECT", self.daemons.app)
        command = f"{settings}\nexec {learner} --path {self.folder} --data 'honest 1'"
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        with (self.daemons.homes.logs / "ada.log").open("w") as log:
            self.daemons.running["ada"] = subprocess.Popen(
                ["bash", "-ec", command],
                cwd=self.folder,
                env=environment,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.daemons.sites["ada"] = "honest 1"


def fingerprint_of(joining: subprocess.Popen[str]) -> str:
    """Read what the site shows until there is a fingerprint in it."""
    assert joining.stdout is not None
    for line in joining.stdout:
        if found := FINGERPRINT.search(line):
            return found[0]
    raise AssertionError(f"no fingerprint was shown: {joining.communicate()}")


def refusal(joining: subprocess.Popen[str]) -> str:
    said, why = joining.communicate(timeout=DEADLINE_S)
    assert joining.returncode in (2, 4), said + why
    return why


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[Hospital]:
    daemons = Daemons(tmp_path, {"bob": "honest 2"})
    hospital = Hospital(daemons)
    try:
        yield hospital
    finally:
        for joining in hospital.joining:
            joining.kill()
            joining.communicate()
        daemons.stop()


def test_a_site_joins_by_telephone_and_takes_part(hospital: Hospital) -> None:
    code = hospital.invite()
    joining = hospital.join(code)
    read_out = fingerprint_of(joining)
    assert read_out in hospital.listed(), "both ends show the same"
    done = hospital.admit(read_out)
    assert done.returncode == 0, done.stderr
    said, why = joining.communicate(timeout=DEADLINE_S)
    assert joining.returncode == 0, why
    assert "learner:ada is admitted to outages." in said
    assert "controller" not in said, "it lets the site in, too"

    hospital.start_learner(said)
    driver = hospital.daemons.run(rounds=2)
    output, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    assert f"test mean {2 * (1 * 1 + 2 * 2) / 3:.3f}" in output, "its examples count"

    again = hospital.join(code)
    assert "is admitted" in again.communicate(timeout=DEADLINE_S)[0], "the site itself goes on"
    assert "does not know this code any more" in refusal(hospital.join(code, home="other"))


def test_a_thief_of_the_code_gains_nothing_whoever_is_first(hospital: Hospital) -> None:
    code = hospital.invite()
    thief = hospital.join(code, home="thief")
    stolen = fingerprint_of(thief)
    assert stolen in hospital.listed()
    site = hospital.join(code)
    assert "another key has asked with this code before" in refusal(site)

    newer = hospital.invite()
    assert re.search("newer code|does not know this code any more", refusal(thief))
    site = hospital.join(newer)
    read_out = fingerprint_of(site)
    assert read_out != stolen
    assert "another key has asked" in refusal(hospital.join(newer, home="thief"))
    assert hospital.admit(stolen).returncode == 2, "what the thief would read"
    assert hospital.admit(read_out).returncode == 0
    assert site.wait(DEADLINE_S) == 0


def test_a_site_that_was_broken_off_goes_on_with_the_same_command(hospital: Hospital) -> None:
    code = hospital.invite()
    first = hospital.join(code)
    shown = fingerprint_of(first)
    first.kill()
    hospital.daemons.restart("broker")
    second = hospital.join(code)
    assert fingerprint_of(second) == shown
    hospital.daemons.restart("broker")
    assert hospital.admit(shown).returncode == 0
    assert second.wait(DEADLINE_S) == 0
