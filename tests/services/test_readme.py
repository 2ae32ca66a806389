"""The README's commands do what it says, as they stand there."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from metisfl.proto.model_file import open_model
from metisfl.proto.tensors import is_encrypted

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
EXAMPLE = ROOT / "deploy" / "examples" / "penguins"
DAEMON = re.compile(r"metisfl-(broker|controller|learner) ")
SETTINGS = re.compile(r"set -a; \. (\S+); set \+a")
FINGERPRINT = re.compile(r"(?:[A-Z2-7]{4}-){4}[A-Z2-7]{4}")
DEADLINE_S = 90.0
SITES = ("biscoe", "dream", "torgersen")
SCORED = r"8 rounds in .* test accuracy (0\.9|1\.0)"


def commands(section: str) -> list[str]:
    """The lines after `$ ` in one section's console blocks."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


def test_the_readmes_own_application_trains_as_it_stands_there(tmp_path: Path) -> None:
    (application,), (federation,) = blocks("python"), blocks("toml")
    assert len(application.splitlines()) < 25
    (tmp_path / "strength.py").write_text(application)
    (tmp_path / "factories.toml").write_text(federation.replace("/data", str(tmp_path)))
    draw = np.random.default_rng(3)
    for site in ("north", "south"):
        x = draw.normal(size=(200, 8))
        table = np.column_stack([x, x.sum(axis=1)])
        np.savetxt(tmp_path / f"{site}.csv", table, delimiter=",", header="a,b,c,d,e,f,g,h,y")
    (command,) = commands("Your own model and data")
    output = Shell(tmp_path).run(command)
    assert "10 rounds in" in output
    assert "test mae" in output


def test_every_make_target_that_is_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|\$ )make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    with Shell(tmp_path) as shell:
        yield shell


class Shell:
    """Runs the section's commands on one machine: names become loopback, daemons run behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "deploy").symlink_to(ROOT / "deploy")
        self._ports = {port: str(free_port()) for port in ("5570", "5571", "5572")}
        self._environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons:
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            daemon.wait(20)

    def here(self, text: str) -> str:
        for name in ("BROKER", "CONTROLLER"):
            text = re.sub(rf"\b{name}:", "127.0.0.1:", text)
        for port, free in self._ports.items():
            text = text.replace(port, free)
        return text

    def run(self, command: str, *, typed: str = "") -> str:
        command = self.here(command)
        if command.startswith("export "):
            self._environment.update(part.split("=", 1) for part in command.split()[1:])
            return ""
        if settings := SETTINGS.fullmatch(command):
            lines = (self._folder / settings[1]).read_text().splitlines()
            said = [line.split("=", 1) for line in lines if not line.startswith("#")]
            self._environment.update((name, value) for name, value in said)
            return ""
        if DAEMON.match(command):
            self._daemons.append(
                subprocess.Popen(command.split(), cwd=self._folder, env=self._environment)
            )
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            input=typed,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def enrol(self, invite: str, join: str, admit: str) -> Iterator[None]:
        """Let a site in; it waits, and so do we, until the operator has compared and admitted."""
        (code,) = re.findall(r"metisfl\d_\w+", self.run(invite))
        with subprocess.Popen(
            ["bash", "-c", f"exec {join.replace('CODE', code)}"],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as joining:
            try:
                yield
                assert joining.stdout is not None
                shown = filter(None, map(FINGERPRINT.search, joining.stdout))
                assert (read_out := next(shown, None)), f"{join} has shown no fingerprint"
                assert read_out[0] in self.run(admit, typed="y\n")
                yield
                assert "is admitted" in joining.stdout.read()
            finally:
                if joining.poll() is None:
                    joining.terminate()
        assert joining.returncode == 0

    def codes(self) -> list[int | None]:
        return [daemon.poll() for daemon in self._daemons]


def begin(shell: Shell) -> list[str]:
    """Run the section's commands until all are admitted; return the others, for all three sites."""
    todo = commands("On different machines")
    first = next(n for n, command in enumerate(todo) if command.startswith("metisfl invite"))
    for command in todo[:first]:
        shell.run(command)
    enrolments = []
    for home, principal in (*((site, site) for site in SITES), ("ops", "driver:ops")):
        invite, join, admit = (
            re.sub("(invite|admit) biscoe", rf"\1 {principal}", command).replace("biscoe", home)
            for command in todo[first : first + 3]
        )
        enrolments.append(shell.enrol(invite, join, admit))
    for _ in zip_longest(*enrolments):
        pass  # all are invited, then all are admitted
    rest = todo[first + 3 :]
    sites = [command for command in rest if "biscoe" in command]
    at = rest.index(sites[0])
    for site in reversed(SITES[1:]):
        others = (command.replace("biscoe", site) for command in sites)
        rest[at:at] = [command.replace("Biscoe", site.capitalize()) for command in others]
    return rest


def write_federation(shell: Shell, folder: Path, privacy: str) -> None:
    federation = (EXAMPLE / "federation.toml").read_text()
    assert 'privacy = "plain"' in federation
    federation = federation.replace('privacy = "plain"', f'privacy = "{privacy}"')
    where = "[broker]\ningress = 'tcp://BROKER:5570'\nlive = 'tcp://BROKER:5571'\n"
    text = federation.replace('path = "."', f"path = '{EXAMPLE}'") + where
    (folder / "penguins.toml").write_text(shell.here(text))


def test_a_federation_of_separate_daemons_is_set_up_as_the_readme_says(
    shell: Shell, tmp_path: Path
) -> None:
    write_federation(shell, tmp_path, "plain")
    output = ""
    for command in begin(shell):
        output = shell.run(command)
    assert re.search(SCORED, output)
    for site in SITES:
        assert list((tmp_path / site / "final").rglob("model.keras")), f"{site} has no model"
    assert shell.codes() == [None] * 5, "daemons outlive a run"
    again = shell.run(commands("On different machines")[-1])
    assert again.count("built the initial model") == 1, "another run begins anew"
    assert all(
        len(list((tmp_path / site / "final").iterdir())) == 2 for site in ("dream", "biscoe")
    )
    assert "secret" not in "".join(commands("On different machines"))
    audited, expelled = (shell.run(command) for command in commands("Security"))
    assert re.search("admitted .*learner:torgersen", audited)
    assert expelled.count("learner:torgersen is expelled") == 2


def test_its_sites_make_a_joint_key_as_the_readme_says(shell: Shell, tmp_path: Path) -> None:
    write_federation(shell, tmp_path, "ckks-threshold")
    after = begin(shell)
    shown = [shell.run(command) for command in commands("No one holds the key")]
    fingerprints = re.findall(r"fingerprint[a-z ]*: ((?:[A-Z2-7]{4}-){7}[A-Z2-7]{4})", shown[1])
    assert len(fingerprints) == 3
    assert set(fingerprints) < {*shown[0].split()}, "all have the operator's file"
    parts = [(tmp_path / site / "keys" / "secret.ckks").read_bytes() for site in SITES]
    assert len({*parts}) == 3, "each has a share of its own"
    for command in after:
        output = shell.run(command)
    assert re.search(SCORED, output)


def test_the_same_federation_is_encrypted_as_the_readme_says(shell: Shell, tmp_path: Path) -> None:
    write_federation(shell, tmp_path, "ckks")
    after, shown = begin(shell), ""
    for command in commands("Encryption across machines"):
        shown = shell.run(command)
    fingerprint = re.search(r"fingerprint +(\w+)", shown)
    assert fingerprint is not None, shown
    assert fingerprint[1] in shell.run("metisfl keys show biscoe/keys")
    secret = {path.relative_to(tmp_path).parts[0] for path in tmp_path.glob("*/keys/secret.ckks")}
    assert secret == {"biscoe", "dream", "torgersen"}
    for command in after:
        output = shell.run(command)
    assert re.search(SCORED, output)
    for model in (tmp_path / "controller" / "models").glob("*.model"):
        with open_model(model) as opened:
            assert is_encrypted(opened.manifest)
    for site in SITES:
        assert list((tmp_path / site / "final").rglob("model.keras")), f"{site} has no model"
