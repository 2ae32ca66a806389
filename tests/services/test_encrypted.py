"""Encrypted federations of real processes: what they compute and survive, who can read it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from daemons import DEADLINE_S, METISFL, Daemons
from driver_output import wait_for

from metisfl.deploy.driver import Outcome, drive
from metisfl.deploy.settings import load_federation

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
APPS = Path(__file__).parent
PATTERN_BYTES = 32
"""Eight float32 weights in a row: not there by chance."""


def run(folder: Path, sites: Mapping[str, str], encryption: str = "", rounds: int = 3) -> Outcome:
    text = ["[federation]", "name = 'secret'", f"rounds = {rounds}", "privacy = 'ckks'"]
    text += ["[encryption]", encryption, "[app]", "object = 'trouble:Site'", f"path = '{APPS}'"]
    for name, behaviour in sites.items():
        text += ["[[learners]]", f"name = '{name}'", f"data = '{behaviour}'"]
    (folder / "federation.toml").write_text("\n".join(text))
    federation = load_federation(folder / "federation.toml")
    return asyncio.run(drive(federation, folder / "run"))


def log_of(outcome: Outcome, name: str) -> list[dict[str, object]]:
    lines = (outcome.folder / "logs" / f"{name}.log").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_community_model_is_the_weighted_mean_and_scales_grow_as_needed(
    tmp_path: Path,
) -> None:
    """Zeros at first, so that the values of round 1 do not fit; from then on they do."""
    outcome = run(tmp_path, {"ada": "honest 1", "bob": "honest 2", "cyd": "honest 5"})
    step = (1 * 1 + 2 * 2 + 5 * 5) / 8
    found = np.load(outcome.model / "model.npz")["w"]
    np.testing.assert_allclose(found, 3 * step, atol=1e-6 * 64)
    again = [line for line in log_of(outcome, "cyd") if "again1" in str(line.get("task"))]
    assert {line["round"] for line in again} == {1}, "the first round opened again, and no other"
    trained = [line for line in log_of(outcome, "cyd") if line["event"] == "trained"]
    assert [line["round"] for line in trained] == [1, 2, 3], "what was trained is sealed again"


def test_every_site_can_check_the_fold_itself(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"ada": "honest 1", "bob": "honest 2"}, "verify = 'full'")
    checked = [line for line in log_of(outcome, "bob") if line["event"] == "verified"]
    assert len(checked) >= 3, "one for each round"
    np.testing.assert_allclose(np.load(outcome.model / "model.npz")["w"], 5.0, atol=1e-4)


def test_one_site_may_be_a_hundred_times_larger_if_the_key_allows_it(tmp_path: Path) -> None:
    sites = {"ada": "honest 100", "bob": "honest 1", "cyd": "honest 1"}
    outcome = run(tmp_path, sites, "max_share = 1.0", rounds=1)
    step = (100 * 100 + 1 + 1) / 102
    found = np.load(outcome.model / "model.npz")["w"]
    np.testing.assert_allclose(found, step, atol=1e-6 * 512)


def test_the_first_round_gives_the_plain_model_within_a_millionth_of_the_scale(
    tmp_path: Path,
) -> None:
    models = []
    for privacy in ("plain", "ckks"):
        text = (EXAMPLES / "heart_disease" / "federation.toml").read_text()
        lines = [line for line in text.splitlines() if not line.startswith(("privacy", "rounds"))]
        lines.insert(lines.index("[federation]") + 1, f'privacy = "{privacy}"\nrounds = 1')
        path = tmp_path / f"{privacy}.toml"
        path.write_text("\n".join(lines).replace(
            'path = "."', f'path = "{EXAMPLES / "heart_disease"}"'))  # fmt: skip
        folder = tmp_path / privacy
        done = subprocess.run(
            [METISFL, "up", str(path), "--run-folder", str(folder)],
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        with np.load(folder / "model" / "model.npz") as arrays:
            models.append({name: arrays[name] for name in arrays.files})
    plain, encrypted = models
    assert plain.keys() == encrypted.keys()
    for name, values in plain.items():
        scale = max(1.0, float(np.abs(values).max()))
        np.testing.assert_allclose(encrypted[name], values, rtol=0, atol=1e-6 * scale)
    assert any((plain[name] != encrypted[name]).any() for name in plain), "one was encrypted"


# ---- Restarts ----------------------------------------------------------------------


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, {"ada": "honest 1", "bob": "honest 2"}, encrypted=True)
    try:
        yield daemons
    finally:
        daemons.stop()


def test_every_round_is_closed_once_whoever_is_killed_meanwhile(daemons: Daemons) -> None:
    driver = daemons.run(rounds=20)
    for number, name in enumerate(("controller", "ada", "broker", "bob")):
        wait_for(driver, f"round {4 * number + 2} of")
        daemons.restart(name)
    output, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    assert f"test mean {20 * 5 / 3:.3f}" in output, "every round added its mean once"
    assert [record.round for record in daemons.records()] == list(range(21))


def test_a_site_that_comes_late_opens_the_current_model(tmp_path: Path) -> None:
    sites = {"ada": "honest 1", "bob": "honest 2", "cyd": "honest 3"}
    daemons = Daemons(tmp_path, sites, encrypted=True, late="cyd")
    try:
        os.mkfifo(daemons.pause)
        driver = daemons.run(rounds=2, lease_s=5)
        daemons.pause.open().close()  # round 1 has begun without cyd
        daemons.start("cyd")
        wait_for_log(daemons, "cyd", "joined")
        daemons.pause.unlink()
        daemons.restart("bob")
        output, rest = driver.communicate(timeout=DEADLINE_S)
        assert driver.returncode == 0, rest
        first, second = daemons.records()[1:]
        assert [one.learner for one in first.counted] == ["ada", "bob"]
        assert [one.learner for one in second.counted] == ["ada", "bob", "cyd"]
        assert f"test mean {5 / 3 + 14 / 6:.3f}" in output
    finally:
        daemons.stop()


def test_a_site_without_the_key_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    sites = {"ada": "honest 1", "bob": "honest 2", "cyd": "honest 3"}
    daemons = Daemons(tmp_path, sites, encrypted=True, late="cyd")
    try:
        for path in (daemons.homes.learners["cyd"] / "keys").glob("*.ckks"):
            path.unlink()
        daemons.start("cyd")
        driver = daemons.run(rounds=1)
        _, rest = driver.communicate(timeout=DEADLINE_S)
        assert driver.returncode == 0, rest
        (missing,) = daemons.records()[1].missing
        assert (missing.learner, "no key" in missing.reason) == ("cyd", True), missing.reason
    finally:
        daemons.stop()


@pytest.mark.parametrize("place", ["spool", "keys"])
def test_a_controller_that_holds_a_secret_part_does_not_start(daemons: Daemons, place: str) -> None:
    daemons.end("controller", signal.SIGTERM)
    stolen = daemons.homes.controller / place / "harmless.update"
    stolen.parent.mkdir(exist_ok=True)
    stolen.write_bytes((daemons.homes.learners["ada"] / "keys" / "secret.ckks").read_bytes())
    daemons.start("controller")
    assert daemons.running.pop("controller").wait(DEADLINE_S) == 2
    said = (daemons.homes.logs / "controller.log").read_text()
    assert str(stolen) in said
    assert "must never hold it" in said


# ---- Who can read it ------------------------------------------------------------


def test_the_controller_holds_no_key_no_openfhe_and_no_weight(tmp_path: Path) -> None:
    """While a run is under way, its memory, files and libraries are searched for weights."""
    daemons = Daemons(tmp_path, {"ada": "secret 1", "bob": "secret 2"}, encrypted=True)
    try:
        driver = daemons.run(rounds=1000)
        wait_for(driver, "round 2 of")
        os.mkfifo(daemons.pause)
        daemons.pause.open().close()  # bob trains, and keeps the round open
        said = (daemons.homes.logs / "controller.log").read_text().splitlines()
        closed = [line for line in map(json.loads, said) if line["event"] == "round closed"]
        wait_for_log(daemons, "ada", "trained", closed[-1]["round"] + 1)
        pids = {name: daemons.running[name].pid for name in ("controller", "broker", "bob")}
        sites = [daemons.homes.learners[name] for name in daemons.sites]
        patterns = weights_at(sites)
        assert len(patterns) >= 2, "the community model, and what a site trained"
        worker = children(pids["bob"])
        assert any(found_in_memory(pid, patterns) for pid in worker), "the search finds them there"
        for name in ("controller", "broker"):
            assert found_in_memory(pids[name], patterns) == [], f"{name} holds plain weights"
            maps = Path(f"/proc/{pids[name]}/maps").read_text().lower()
            assert "openfhe" not in maps
            assert "tensorflow" not in maps
            opened = [os.readlink(f) for f in Path(f"/proc/{pids[name]}/fd").iterdir()]
            assert not [path for path in opened if "learners" in path or "secret" in path]
        for home in (daemons.homes.controller, daemons.homes.broker):
            for path in home.rglob("*"):
                if path.is_file():
                    content = path.read_bytes()
                    assert not [p for p in patterns if p in content], path
                    assert b"MFCKSEC1" not in content, path
        driver.kill()
    finally:
        daemons.stop()


def weights_at(homes: list[Path]) -> list[bytes]:
    """Some bytes out of every plain model at the sites: from its middle, where it has weights."""
    paths = [p for home in homes for kind in ("*.plain", "*.trained") for p in home.rglob(kind)]
    found = set()
    for path in paths:
        content = path.read_bytes()
        place = 4096 + (len(content) - 4096) // 2 // 4 * 4
        pattern = content[place : place + PATTERN_BYTES]
        assert len(set(pattern)) > 8, f"{path} has nothing to search for"
        found.add(pattern)
    return sorted(found)


def found_in_memory(pid: int, patterns: list[bytes]) -> list[bytes]:
    """Which of the patterns are in the private or shared writable memory of a process."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            place, modes, *_ = line.split()
            if not modes.startswith("r") or "[v" in line:
                continue
            start, end = (int(part, 16) for part in place.split("-"))
            try:
                memory.seek(start)
                content = memory.read(end - start)
            except OSError:
                continue
            found += [pattern for pattern in patterns if pattern in content]
    return found


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def wait_for_log(daemons: Daemons, name: str, event: str, number: int | None = None) -> None:
    """Until a daemon has logged this, of round `number` if that is given."""
    path = daemons.homes.logs / f"{name}.log"
    command = ["tail", "-n", "+1", "-f", f"--pid={daemons.running[name].pid}", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        try:
            for line in map(json.loads, tail.stdout):
                if line["event"] == event and number in (None, line.get("round")):
                    return
        finally:
            tail.kill()
    raise AssertionError(f"{name} never said {event!r}; it wrote {path.read_text()}")


assert sys.platform == "linux", "the search reads /proc"
