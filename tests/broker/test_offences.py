"""offences.py, and dispatch.py where it refuses: each refusal is counted, named and bounded."""

from __future__ import annotations

from typing import Any

import pytest

from metisfl.broker.offences import KEPT_MAX, Offence, Offences
from metisfl.broker.status import OFFENDERS_MAX, POISON, REFUSALS
from metisfl.proto import frames
from metisfl.proto.frames import Beat, Fetch

L1, L2 = "learner:l1", "learner:l2"


def test_a_forger_is_named_with_the_name_that_it_took(desk: Any) -> None:
    desk.send(L1, desk.message(desk.envelope(L2, 1, 1)))
    (offence,) = desk.dispatch.take_offences()
    assert (offence.principal, offence.cause, offence.times) == (L1, "forged", 1)
    assert "an event of 'learner:l2' came from learner:l1" in offence.reason
    assert desk.dispatch.offences.offenders == {L1: 1}, "and its victim is no offender"
    assert desk.dispatch.take_offences() == [], "told once"


@pytest.mark.parametrize(
    ("cause", "parts"),
    [
        ("forged", lambda desk: desk.message(desk.envelope(L2, 1, 1))),
        ("forbidden_topic", lambda desk: desk.message(desk.envelope(L1, 1, 1, topic="f/done/x/"))),
        ("poison", lambda desk: desk.message(desk.envelope(L1, 1, 1, topic="nonsense"))),
        ("invalid", lambda desk: desk.message(b"\xff")),
        ("lane", lambda desk: frames.pack_fetch(Fetch(1, 0, 1, "f/"))),
        ("beat", lambda desk: frames.pack_beat(Beat("f/beat/l2/", "Progress", b""))),
        ("status", lambda desk: [frames.STATUS]),
        ("malformed", lambda desk: [b"Q"]),
    ],
)
def test_each_refusal_is_counted_once_under_its_cause(desk: Any, cause: str, parts: Any) -> None:
    desk.send(L1, parts(desk))
    desk.commit()
    offences = desk.dispatch.offences
    counted = {**offences.events, **offences.requests}
    assert set(counted) == REFUSALS
    assert {name: times for name, times in counted.items() if times} == {cause: 1}
    assert offences.offenders == {L1: 1}
    assert [(one.principal, one.cause) for one in desk.dispatch.take_offences()] == [(L1, cause)]


def test_what_is_nobodys_fault_makes_no_offender(desk: Any) -> None:
    desk.send(L1, [frames.PUBLISH, bytes(4), desk.envelope(L1, 1, 1)])
    desk.publish(L1, 1)
    desk.dispatch.failed("disk full", desk.now)
    assert desk.dispatch.offences.events["damaged"] == 1
    assert desk.dispatch.offences.events["full_disk"] == 1
    assert desk.dispatch.offences.offenders == {}
    assert desk.dispatch.take_offences() == []


def test_a_refusal_is_counted_also_when_its_answer_is_rationed(desk: Any) -> None:
    for _ in range(100):
        desk.send(L1, [b"Q"])
    assert desk.dispatch.offences.requests["malformed"] == 100
    (offence,) = desk.dispatch.take_offences()
    assert offence.times == 100


def test_one_loud_principal_does_not_hide_another() -> None:
    offences = Offences()
    for number in range(100_000):
        offences.add(L1, POISON, f"reason {number}")
    offences.add(L2, POISON, "quietly")
    assert offences.take() == [
        Offence(L1, POISON, "reason 0", 100_000),
        Offence(L2, POISON, "quietly", 1),
    ]


def test_however_many_offend_what_is_kept_of_them_is_bounded() -> None:
    offences = Offences()
    for _ in range(3):
        offences.add(L1, POISON, "again")
    for number in range(10_000):
        offences.add(f"learner:n{number}", POISON, "x" * 100_000)
    assert len(offences.offenders) == OFFENDERS_MAX
    assert offences.offenders[L1] == 3, "those that do it most are kept"
    told = offences.take()
    assert len(told) == KEPT_MAX
    assert all(len(offence.reason) <= 500 for offence in told)
    assert offences.events[POISON] == 10_003
