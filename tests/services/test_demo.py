"""The demo does what the README promises: four hospitals reach more together than alone, and in the
encrypted mode, which is the default, as much as in the plain one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

METISFL = Path(sys.executable).with_name("metisfl")
HOSPITALS = {"cleveland", "hungary", "switzerland", "va-long-beach"}
TEST_PATIENTS = 230  # of all hospitals


def demo(folder: Path, *options: str) -> Any:
    """What the demo prints as JSON."""
    done = subprocess.run(
        [str(METISFL), "demo", "--json", "--run-folder", str(folder), *options],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "encrypted"


@pytest.fixture(scope="module")
def encrypted(folder: Path) -> Any:
    return demo(folder)


def test_four_hospitals_reach_more_together_than_alone(encrypted: Any, folder: Path) -> None:
    assert set(encrypted) == {
        *("rounds", "accuracy", "alone", "seconds", "model"),
        *("privacy", "update_bytes", "plain_bytes"),
    }
    assert set(encrypted["alone"]) == HOSPITALS
    assert encrypted["accuracy"] >= 0.75
    assert encrypted["accuracy"] > statistics.mean(encrypted["alone"].values())
    with np.load(Path(encrypted["model"]) / "model.npz") as arrays:
        assert sum(arrays[name].size for name in arrays.files) >= 4096
    records = list((folder / "run" / "controller" / "rounds").rglob("*.msgpack"))
    assert len(records) == encrypted["rounds"] + 1


def test_no_hospital_holds_the_key_of_the_joint_mode(tmp_path: Path) -> None:
    told = demo(tmp_path / "joint", "--privacy", "ckks-threshold", "--rounds", "3")
    assert told["privacy"] == "ckks-threshold"
    assert told["accuracy"] >= 0.7
    assert told["update_bytes"] <= 3.4 * told["plain_bytes"]
    keys = [*(tmp_path / "joint").rglob("secret.ckks")]
    assert {path.parent.parent.name for path in keys} == HOSPITALS
    assert len({path.read_bytes() for path in keys}) == len(HOSPITALS), "one share each"
    assert not [*(tmp_path / "joint").rglob("ceremony.state")], "a secret is left"


def test_nobody_but_the_hospitals_could_read_an_update(encrypted: Any, folder: Path) -> None:
    assert encrypted["privacy"] == "ckks", "without being asked"
    secret = {path.parent.parent for path in folder.rglob("secret.ckks")}
    assert secret == {folder / "run" / "learners" / name for name in HOSPITALS}


def test_encryption_costs_two_patients_and_a_tenth_of_the_bytes_at_the_most(
    encrypted: Any, folder: Path
) -> None:
    told_plain = folder.with_name("plain")
    plain = demo(told_plain, "--privacy", "plain")
    assert plain["privacy"] == "plain"
    assert not list(told_plain.rglob("*.ckks"))
    assert plain["alone"] == encrypted["alone"], "what a hospital does alone is the same"
    difference = abs(plain["accuracy"] - encrypted["accuracy"]) * TEST_PATIENTS
    assert difference <= 2.001, f"{difference:.1f} patients"  # accuracies have six decimals
    assert plain["update_bytes"] == plain["plain_bytes"] == encrypted["plain_bytes"]
    assert 1.0 < encrypted["update_bytes"] / encrypted["plain_bytes"] < 1.1
