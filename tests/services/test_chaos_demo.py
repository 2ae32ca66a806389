"""`metisfl demo --chaos SEED`: whoever is killed, the hospitals end with the same bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

METISFL = Path(sys.executable).with_name("metisfl")
HOSPITALS = {"cleveland", "hungary", "switzerland", "va-long-beach"}
ROUNDS = 5
SEED = 7


def test_four_kills_change_no_bit(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    options = ["--rounds", ROUNDS, "--run-folder", folder, "--json"]
    done = subprocess.run(
        [METISFL, "demo", "--chaos", str(SEED), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["seed"], found["privacy"], found["rounds"]) == (SEED, "ckks", ROUNDS)
    assert found["same_bits"] is True
    assert found["undisturbed_digest"] == found["disturbed_digest"]
    victims = [kill["victim"] for kill in found["kills"]]
    assert len(victims) == len(set(victims)) == 4
    assert {"broker", "controller"} < set(victims)
    assert set(victims) < {"broker", "controller", *HOSPITALS}
    for victim in victims:
        assert f"{victim} was killed (SIGKILL); started again" in done.stderr
    for kill in found["kills"]:
        assert 1 <= kill["round"] <= ROUNDS
        assert kill["missed_s"] is None or kill["missed_s"] > 0
    runs = [folder / name / "model" / "model.npz" for name in ("undisturbed", "disturbed")]
    with np.load(runs[0]) as one, np.load(runs[1]) as other:
        assert one.files == other.files
        for name in one.files:
            assert one[name].tobytes() == other[name].tobytes()
