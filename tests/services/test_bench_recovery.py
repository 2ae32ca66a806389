"""`metisfl bench recovery` measures what it says, and finds nothing lost and no bit changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

METISFL = Path(sys.executable).with_name("metisfl")


@pytest.mark.parametrize("privacy", ["plain", pytest.param("ckks", marks=pytest.mark.chaos)])
def test_kills_are_measured(privacy: str, tmp_path: Path) -> None:
    options = ["--learners", "2", "--times", "1", "--privacy", privacy, "--json"]
    done = subprocess.run(
        [METISFL, "bench", "recovery", *options],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures.pop("privacy"), figures.pop("learners")) == (privacy, 2)
    assert figures.pop("retrained") == 0
    assert figures.pop("bits_equal") is True
    assert set(figures) == {"controller_s", "broker_s", "learner_s", "learner_import_s"}
    assert all(seconds > 0 for seconds in figures.values()), figures
    assert figures["learner_s"] > figures["learner_import_s"] / 2, "it cannot work without its app"
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
