"""logs.py: the same facts as JSON for machines and as a line for people, ours and libraries'."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog

from metisfl.deploy import logs
from metisfl.proto.errors import UserError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(logs.LEVEL_VARIABLE, raising=False)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_elsewhere_than_on_a_terminal_each_event_is_one_line_of_json() -> None:
    stream = io.StringIO()
    logs.configure("metisfl-controller", stream=stream)
    structlog.get_logger().warning("round closed\nlate", counted=3)
    (event,) = events(stream)
    timestamp = datetime.fromisoformat(event.pop("timestamp").replace("Z", "+00:00"))
    assert timestamp.utcoffset() == timedelta(0)
    assert event == {
        "event": "round closed\nlate",
        "level": "warning",
        "logger": "metisfl-controller",
        "counted": 3,
    }


def test_bound_loggers_say_what_they_are_about_in_four_keys() -> None:
    stream = io.StringIO()
    logs.configure("metisfl-learner", stream=stream)
    logs.bind(federation="hearts", round=0, task="t1", learner="cleveland").info("training")
    logs.bind(federation="hearts").info("idle")
    first, second = events(stream)
    about = {key: first[key] for key in ("federation", "round", "task", "learner")}
    assert about == {"federation": "hearts", "round": 0, "task": "t1", "learner": "cleveland"}
    assert "round" not in second


def test_context_variables_are_part_of_every_line() -> None:
    stream = io.StringIO()
    logs.configure("metisfl-learner", stream=stream)
    with structlog.contextvars.bound_contextvars(task="t1"):
        structlog.get_logger().info("training")
        logging.getLogger("keras").warning("slow")
    assert [event["task"] for event in events(stream)] == ["t1", "t1"]


def test_what_libraries_log_comes_out_in_the_same_form() -> None:
    stream = io.StringIO()
    logs.configure("metisfl-broker", stream=stream)
    logging.getLogger("asyncio").warning("took %.1f seconds", 1.5)
    (event,) = events(stream)
    assert event.pop("timestamp")
    assert event == {
        "event": "took 1.5 seconds",
        "level": "warning",
        "logger": "metisfl-broker",
        "module": "asyncio",
    }


def test_an_exception_keeps_its_traceback_in_its_line() -> None:
    stream = io.StringIO()
    logs.configure("metisfl-broker", stream=stream)
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError:
        structlog.get_logger().exception("broken")
        logging.getLogger("zmq").exception("broken")
    for event in events(stream):
        assert event["level"] == "error"
        assert event["exception"].startswith("Traceback")
        assert event["exception"].endswith("ZeroDivisionError: a defect")


def test_a_terminal_gets_a_line_for_people() -> None:
    stream = Terminal()
    logs.configure("metisfl-broker", stream=stream)
    logs.bind(learner="cleveland").info("joined")
    logging.getLogger("zmq").warning("odd")
    first, second = stream.getvalue().splitlines()
    assert "joined" in first
    assert "cleveland" in first
    assert "\x1b[" in first, "no colours on a terminal"
    assert "odd" in second


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    logs.configure("metisfl-broker", stream=stream)
    structlog.get_logger().info("joined")
    assert "\x1b[" not in stream.getvalue()


@pytest.mark.parametrize("level", logs.LEVELS)
def test_a_level_hides_what_is_below_it(level: str) -> None:
    stream = io.StringIO()
    logs.configure("metisfl-broker", level=level, stream=stream)
    for name in logs.LEVELS:
        getattr(structlog.get_logger(), name)("ours")
        getattr(logging.getLogger("zmq"), name)("theirs")
    shown = list(logs.LEVELS)[list(logs.LEVELS).index(level) :]
    assert [event["level"] for event in events(stream)] == [name for name in shown for _ in "12"]


def test_the_environment_beats_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "debug")
    stream = io.StringIO()
    logs.configure("metisfl-broker", level="error", stream=stream)
    structlog.get_logger().debug("details")
    assert len(events(stream)) == 1


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "loud")
    with pytest.raises(UserError, match="'loud': use debug, info, warning, error"):
        logs.configure("metisfl-broker")


def test_configured_again_the_old_stream_is_let_go() -> None:
    old, new = io.StringIO(), io.StringIO()
    logger = structlog.get_logger()
    logs.configure("metisfl-broker", stream=old)
    logger.info("first")
    logs.configure("metisfl-broker", stream=new)
    logger.info("second")
    logging.getLogger("zmq").warning("third")
    assert [event["event"] for event in events(old)] == ["first"]
    assert [event["event"] for event in events(new)] == ["second", "third"]


def test_stderr_is_where_logs_go(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("metisfl-broker")
    structlog.get_logger().info("joined")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert json.loads(printed.err)["event"] == "joined"
