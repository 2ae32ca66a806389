"""`metisfl bench round` measures what it says, in both privacy modes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

METISFL = Path(sys.executable).with_name("metisfl")
PARAMS = 5000
PAGE = 4096  # the payload of a model file begins on one
CIPHERTEXT = 2048  # values


@pytest.mark.parametrize(
    ("privacy", "payload_bytes"),
    [("plain", 4 * PARAMS), ("ckks", 44 * CIPHERTEXT // 8 * 3 + 64 + 20)],
)
def test_time_and_memory_of_a_round(privacy: str, payload_bytes: int, tmp_path: Path) -> None:
    sizes = {"learners": 2, "params": PARAMS, "rounds": 2}
    options = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    done = subprocess.run(
        [str(METISFL), "bench", "round", *options, "--privacy", privacy, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {name: figures.pop(name) for name in sizes} == sizes
    assert figures.pop("privacy") == privacy
    assert figures.pop("update_bytes") == PAGE + payload_bytes
    assert 0 <= figures.pop("peak_rss_over_idle_bytes") < 32 << 20
    assert 0 < figures.pop("orchestration_ms_p50") <= figures.pop("orchestration_ms_p99")
    assert figures == {}
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"
