"""trouble.py: a client says once what is wrong, and that it is over."""

from __future__ import annotations

from structlog.testing import capture_logs

from metisfl.broker.trouble import UNANSWERED_S, Trouble

NOW = 1000.0
WHERE = "tcp://127.0.0.1:5570"


def trouble() -> Trouble:
    return Trouble(WHERE, "learner:ada", NOW)


def test_a_refusal_is_told_at_once_and_once_until_it_is_another() -> None:
    one = trouble()
    with capture_logs() as lines:
        for why in ("it wants keys", "", "it wants keys", "", "it does not know this key"):
            one.refused(why)
            one.silent(NOW + 100)
    about = {"endpoint": WHERE, "principal": "learner:ada", "log_level": "error"}
    event = "the broker refuses the connection"
    assert lines == [
        {"event": event, "reason": "it wants keys", **about},
        {"event": event, "reason": "it does not know this key", **about},
    ], "and nobody is asked whether the broker runs: it does"
    assert one.refusal == "it does not know this key"


def test_what_was_told_is_told_to_be_over_and_may_come_again() -> None:
    one = trouble()
    with capture_logs() as lines:
        one.welcomed("metisfl 1")
        one.refused("it wants keys")
        one.welcomed("metisfl 2")
        one.refused("it wants keys")
    assert [line["event"] for line in lines] == [
        "the broker refuses the connection",
        "the broker answers",
        "the broker refuses the connection",
    ]
    assert lines[1]["software"] == "metisfl 2"


def test_silence_is_told_when_it_lasts() -> None:
    one = trouble()
    with capture_logs() as lines:
        one.silent(NOW + UNANSWERED_S - 0.1)
        assert lines == []
        one.silent(NOW + UNANSWERED_S)
        one.silent(NOW + 10 * UNANSWERED_S)
        assert [line["event"][:26] for line in lines] == ["the broker does not answer"]
        one.welcomed("metisfl 1")
        one.silent(NOW + 100)
        one.silent(NOW + 100 + UNANSWERED_S)
    assert [line["log_level"] for line in lines] == ["warning", "info", "warning"]


def test_a_busy_broker_is_told_once_for_each_reason() -> None:
    one = trouble()
    with capture_logs() as lines:
        for reason in ("disk full", "disk full", "log limit"):
            one.busy(reason)
        one.not_busy()
        one.busy("log limit")
    assert [line["reason"] for line in lines] == ["disk full", "log limit", "log limit"]
