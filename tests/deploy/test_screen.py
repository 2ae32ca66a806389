"""The live table on a terminal, plain lines elsewhere: both tell of the same run."""

from __future__ import annotations

import io
import sys
from types import MappingProxyType

import pytest

from metisfl.deploy.screen import LineScreen, TableScreen, screen_for
from metisfl.deploy.view import LearnerView, View
from metisfl.proto import events_pb2 as pb

VIEW = View("r", 3, MappingProxyType({"ada": LearnerView(), "bob": LearnerView()}), started=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_table_that_follows_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    view = VIEW
    with screen_for(view) as screen:
        assert isinstance(screen, TableScreen)
        for message in (
            pb.RoundOpened(run_id="r", round=2),
            pb.Progress(task_id="t", learner="ada", state="working", metrics={"loss": 0.25}),
            pb.UpdateStored(task_id="t", learner="ada", update_bytes=28_400),
        ):
            before, view = view, view.after(message)
            screen.show(before, view, message, 0)
        screen.say("a line of its own")
    drawn = terminal.getvalue()
    for text in ("round 2 of 3", "working", "0.250", "28.4 kB", "bob", "a line of its own"):
        assert text in drawn, drawn


def test_elsewhere_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    message = pb.TaskFailed(task_id="t", learner="ada", reason="no rows left")
    view = VIEW.after(pb.TaskAssigned(run_id="r", task_id="t", learner="ada"))
    with screen_for(view) as screen:
        assert isinstance(screen, LineScreen)
        screen.show(view, view.after(message), message, 0)
    captured = capsys.readouterr()
    assert captured.err == "ada failed: no rows left\n"
    assert captured.out == "", "stdout is for programs"
