"""bench.py: it measures a real broker and says so in one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metisfl.broker.bench import command


def test_the_figures_come_as_one_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(["--events", "600", "--json", "--folder", str(tmp_path)]) == 0
    figures = json.loads(capfd.readouterr().out)
    assert figures["events"] == 600
    assert figures["window"] == 256
    for name in ("events_per_s", "events_per_s_no_outbox", "ack_us_p50", "ack_us_p99"):
        assert figures[name] > 0, name
    assert figures["ack_us_p50"] <= figures["ack_us_p99"]
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_too_few_events_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--events", "1"])
    assert "--events must be at least 256" in capsys.readouterr().err
