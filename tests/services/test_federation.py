"""Whole federations of real processes on loopback: broker, controller, learners, sockets, disks."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metisfl.deploy.driver import Outcome, RunFailed, drive
from metisfl.deploy.settings import Federation, load_federation
from metisfl.proto.records import RoundRecord, unpack_record

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"


def federation(folder: Path, sites: dict[str, str], **settings: object) -> Federation:
    """A federation of the test application; `sites` gives each site's behaviour."""
    values = {"rounds": 2, "quorum": len(sites), "lease_s": 30.0, "privacy": '"plain"', **settings}
    text = ["[federation]", 'name = "trouble"', *(f"{k} = {v}" for k, v in values.items())]
    text += ["[app]", 'object = "trouble:Site"', f'path = "{Path(__file__).parent}"']
    for name, behaviour in sites.items():
        text += ["[[learners]]", f'name = "{name}"', f'data = "{behaviour}"']
    path = folder / "federation.toml"
    path.write_text("\n".join(text))
    return load_federation(path)


def records(outcome_folder: Path) -> list[RoundRecord]:
    paths = sorted((outcome_folder / "controller" / "rounds").rglob("*.msgpack"))
    return [unpack_record(path.read_bytes()) for path in paths]


def run(folder: Path, sites: dict[str, str], **settings: object) -> Outcome:
    return asyncio.run(drive(federation(folder, sites, **settings), folder / "run"))


def metisfl(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the installed command as a user does."""
    command = [Path(sys.executable).with_name("metisfl"), *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=100
    )


def test_the_community_model_is_the_weighted_mean_of_the_updates(tmp_path: Path) -> None:
    outcome = run(tmp_path, {"ada": "honest 1", "bob": "honest 2", "cyd": "honest 5"}, rounds=3)
    step = (1 * 1 + 2 * 2 + 5 * 5) / 8
    found = np.load(outcome.model / "model.npz")["w"]
    np.testing.assert_allclose(found, 3 * step, rtol=1e-6)
    assert outcome.metrics["test.mean"] == pytest.approx(3 * step)
    kept = records(outcome.folder)
    assert [record.round for record in kept] == [0, 1, 2, 3]
    assert [c.learner for c in kept[1].counted] == ["ada", "bob", "cyd"]
    assert [c.weight for c in kept[1].counted] == [1, 2, 5]
    log = (outcome.folder / "logs" / "bob.log").read_text().splitlines()
    trained = [line for line in map(json.loads, log) if line["event"] == "trained"]
    assert [(line["round"], line["learner"], line["federation"]) for line in trained] == [
        (number, "bob", "trouble") for number in (1, 2, 3)
    ]
    assert all(line["task"].endswith(f".{line['round']}.train.bob") for line in trained)
    assert kept[1].opened_ns < kept[1].closed_ns < kept[1].evaluated_ns


def test_each_trouble_hurts_only_its_own_site_and_is_named(tmp_path: Path) -> None:
    sites = {
        "ada": "honest 1",
        "bob": "raises",
        "cyd": "nan",
        "dan": "shape",
        "eve": "crash",
        "fay": "broken",
        "gus": "honest 3",
    }
    outcome = run(tmp_path, sites, quorum=2)
    record = records(outcome.folder)[1]
    assert [c.learner for c in record.counted] == ["ada", "gus"]
    reasons = {one.learner: one.reason for one in record.missing}
    assert set(reasons) == {"bob", "cyd", "dan", "eve"}, "fay never joined"
    assert "ZeroDivisionError: no rows left after filtering" in reasons["bob"]
    assert "'w'" in reasons["cyd"]
    assert "nan" in reasons["cyd"].lower()
    assert "'w' is (5001,) here and (5000,) in the federation" in reasons["dan"]
    assert "SIGSEGV" in reasons["eve"]
    log = (outcome.folder / "logs" / "fay.log").read_text()
    assert "FileNotFoundError: patients.csv" in log


def test_a_site_that_hangs_is_out_of_the_round_when_its_lease_ends(tmp_path: Path) -> None:
    sites = {"ada": "honest 1", "bob": "hangs", "cyd": "slow 3"}
    outcome = run(tmp_path, sites, quorum=2, lease_s=5.0, rounds=1)
    record = records(outcome.folder)[1]
    assert [c.learner for c in record.counted] == ["ada", "cyd"], "progress renews a lease"
    assert record.counted[1].training_s > 5.0
    assert "silent for 5." in record.missing[0].reason


def test_a_run_without_quorum_fails_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"round 1 has 1 updates; the quorum is 2.*no rows left"):
        run(tmp_path, {"ada": "honest 1", "bob": "raises"})
    failed = records(tmp_path / "run")[-1]
    assert (failed.round, failed.model_digest, failed.counted) == (1, b"", ())
    reasons = {one.learner: one.reason for one in failed.missing}
    assert reasons["ada"] == "answered, but the round failed"
    assert "no rows left" in reasons["bob"]


def test_two_runs_of_three_islands_of_penguins_give_the_same_model(tmp_path: Path) -> None:
    """The whole way of a user: the command, real training, a model that opens elsewhere."""
    models = []
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        done = metisfl(
            "up", EXAMPLES / "penguins" / "federation.toml", "--run-folder", folder, "--json"
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["metrics"]["test.accuracy"] > 0.9
        with np.load(Path(result["model"]) / "model.npz") as arrays:
            models.append({name: arrays[name] for name in arrays.files})
        assert (Path(result["model"]) / "model.keras").stat().st_size > 1000
        assert list((folder / "controller" / "rounds").rglob("*.msgpack"))
    first, second = models
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_typo_in_the_federation_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    text = (EXAMPLES / "penguins" / "federation.toml").read_text()
    path.write_text(text.replace("rounds =", "roundz ="))
    done = metisfl("up", path)
    assert done.returncode == 2
    assert "federation.roundz" in done.stderr
    assert "rounds" in done.stderr
