"""`metisfl bench bulk`: real transfers both ways, with keys and without, in one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metisfl.learner.bench_bulk import command
from metisfl.proto.errors import MachineError


def test_the_figures_come_as_one_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["--mib", "1", "--turns", "2", "--json", "--folder", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    figures = json.loads(out)
    assert (figures["mib"], figures["turns"], err) == (1, 2, "")
    for way in ("upload", "download"):
        curve, plain = (figures[f"{way}_mb_per_s_{side}"] for side in ("curve", "plain"))
        assert figures[f"{way}_curve_of_plain"] == pytest.approx(curve / plain, rel=0.02)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_end_that_does_not_start_is_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metisfl.learner.bench_bulk.SERVER", "json.tool")
    with pytest.raises(MachineError, match="did not start"):
        command(["--mib", "1", "--turns", "1", "--folder", str(tmp_path)])
