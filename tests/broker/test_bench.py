"""bench.py: it measures real brokers, with keys and without, and says so in one JSON object."""

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
    for side in (figures, figures["plain"]):
        for name in ("events_per_s", "events_per_s_no_outbox", "ack_us_p50", "ack_us_p99"):
            assert side[name] > 0, name
        assert side["ack_us_p50"] <= side["ack_us_p99"]
    of_plain = figures["events_per_s"] / figures["plain"]["events_per_s"]
    assert figures["curve_of_plain"] == pytest.approx(of_plain, abs=0.001)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_people_see_both_sides_of_every_figure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(["--events", "256", "--folder", str(tmp_path)]) == 0
    heading, first, *rest = capfd.readouterr().out.splitlines()
    assert heading.split() == ["curve", "plain"]
    assert first.split()[0] == "events_per_s"
    assert len(first.split()) == 3
    assert "curve_of_plain" in [line.split()[0] for line in rest]


def test_too_few_events_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--events", "1"])
    assert "--events must be at least 256" in capsys.readouterr().err
