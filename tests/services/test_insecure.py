"""A federation under `--insecure`: it works like any other, and nobody can overlook what it is."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemons import METISFL, Daemons
from driver_output import wait_for

from metisfl.deploy.insecure import INSECURE, INSECURE_VARIABLE

APPS = Path(__file__).parent
SITES = {"ada": "honest 1", "bob": "honest 2"}


def metisfl(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user does."""
    return subprocess.run(
        [METISFL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **environment},
        check=False,
    )


def federation(folder: Path, privacy: str) -> Path:
    text = ["[federation]", "name = 'lab'", "rounds = 2", f"privacy = '{privacy}'"]
    text += ["[app]", "object = 'trouble:Site'", f"path = '{APPS}'"]
    text += [f"[[learners]]\nname = '{name}'\ndata = '{does}'" for name, does in SITES.items()]
    path = folder / "federation.toml"
    path.write_text("\n".join(text))
    return path


def log_of(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("privacy", ["plain", "ckks"])
def test_a_run_without_keys_gives_the_same_model_and_every_daemon_shouts(
    tmp_path: Path, privacy: str
) -> None:
    """Encrypted or not: what is encrypted at the sites stays encrypted."""
    run = tmp_path / "run"
    done = metisfl("up", federation(tmp_path, privacy), "--run-folder", run, "--insecure", "--json")
    assert done.returncode == 0, done.stderr
    assert INSECURE in done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["privacy"] == privacy
    found = np.load(Path(outcome["model"]) / "model.npz")["w"]
    np.testing.assert_allclose(found, 2 * (1 * 1 + 2 * 2) / 3, atol=1e-6 * 64)
    assert list(run.rglob("identity.key")) == [], "no keys are needed, so none are made"
    for name in ("broker", "controller", *SITES):
        shouted = [
            line for line in log_of(run / "logs" / f"{name}.log") if line["level"] == "critical"
        ]
        assert [line["event"] for line in shouted][:1] == [INSECURE], name
    audit = (run / "broker" / "audit.jsonl").read_text()
    assert "started insecure" in audit, "who looks back can see it, too"


def test_a_variable_of_the_shell_makes_the_whole_run_insecure_or_none_of_it(tmp_path: Path) -> None:
    path = federation(tmp_path, "plain")
    wanted = metisfl("up", path, "--run-folder", tmp_path / "1", **{INSECURE_VARIABLE: "1"})
    assert (wanted.returncode, INSECURE in wanted.stderr) == (0, True), wanted.stderr
    plain = metisfl("up", path, "--run-folder", tmp_path / "2", **{INSECURE_VARIABLE: "0"})
    assert (plain.returncode, "INSECURE" in plain.stderr) == (0, False), plain.stderr
    for log in (tmp_path / "2" / "logs").iterdir():
        assert "INSECURE" not in log.read_text()
    wrong = metisfl("up", path, "--run-folder", tmp_path / "3", **{INSECURE_VARIABLE: "on"})
    assert wrong.returncode == 2
    assert not (tmp_path / "3").exists()


Start = Callable[..., Daemons]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons, of which those that are named are insecure. All have keys."""
    started: list[Daemons] = []

    def start(*names: str, insecure: tuple[str, ...]) -> Daemons:
        daemons = Daemons(tmp_path, SITES, started=False)
        started.append(daemons)
        daemons.environments = {name: {INSECURE_VARIABLE: "1"} for name in insecure}
        daemons.write_federation(rounds=1)
        for name in names or daemons.names:
            daemons.start(name)
        return daemons

    yield start
    for daemons in started:
        daemons.stop()


def status(daemons: Daemons, *arguments: object) -> subprocess.CompletedProcess[str]:
    return metisfl("status", daemons.folder / "federation.toml", *arguments)


def test_status_says_first_of_all_that_it_is_insecure(start: Start) -> None:
    daemons = start(insecure=("broker", "controller", *SITES))
    shown = status(daemons, "--insecure")
    assert shown.returncode == 0, shown.stderr
    first, second, *_ = shown.stdout.splitlines()
    assert first == INSECURE.upper()
    assert second.startswith("outages: ")
    told = json.loads(status(daemons, "--insecure", "--json").stdout)["broker"]
    assert told["insecure"] is True
    with_keys = status(daemons, "--home", daemons.homes.driver)
    assert with_keys.returncode == 3
    assert "it was started with --insecure and this process was not" in with_keys.stderr
    done = metisfl(
        *("run", daemons.folder / "federation.toml", "--home", daemons.folder / "new"),
        "--insecure",
    )
    assert done.returncode == 0, done.stderr
    assert INSECURE in done.stderr


def test_without_the_flag_nothing_speaks_of_it(start: Start) -> None:
    daemons = start("broker", "controller", insecure=())
    home = ("--home", daemons.homes.driver)
    assert "INSECURE" not in status(daemons, *home).stdout
    assert json.loads(status(daemons, *home, "--json").stdout)["broker"]["insecure"] is False
    refused = status(daemons, "--insecure")
    assert refused.returncode == 3
    assert "it wants keys" in refused.stderr


def test_who_has_keys_and_meets_a_broker_without_reads_why_at_once(start: Start) -> None:
    daemons = start("broker", insecure=("broker",))
    driver = daemons.run(rounds=1)
    wait_for(driver, "it was started with --insecure and this process was not")
