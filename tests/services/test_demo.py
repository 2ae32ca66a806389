"""The demo does what the README promises: four hospitals reach more together than alone."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np


def test_four_hospitals_reach_more_together_than_alone(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    metisfl = Path(sys.executable).with_name("metisfl")
    done = subprocess.run(
        [str(metisfl), "demo", "--json", "--run-folder", str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"rounds", "accuracy", "alone", "seconds", "model"}
    assert set(result["alone"]) == {"cleveland", "hungary", "switzerland", "va-long-beach"}
    assert result["accuracy"] >= 0.75
    assert result["accuracy"] > statistics.mean(result["alone"].values())
    with np.load(Path(result["model"]) / "model.npz") as arrays:
        assert sum(arrays[name].size for name in arrays.files) >= 4096
    records = list((folder / "run" / "controller" / "rounds").rglob("*.msgpack"))
    assert len(records) == result["rounds"] + 1
