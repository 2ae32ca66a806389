"""dispatch.py: who may ask how the broker is, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest

from metisfl.broker.dispatch import TellStatus
from metisfl.broker.status import EVENT_REFUSALS
from metisfl.proto import frames
from metisfl.proto.frames import Reject

L1, L2, CONTROLLER = "learner:l1", "learner:l2", "controller"


def test_who_may_ask_how_it_is(desk: Any) -> None:
    desk.hello("driver:d")
    for principal in (CONTROLLER, "driver:d"):
        effects = desk.dispatch.handle(principal.encode(), [frames.STATUS], desk.now)
        assert effects == [TellStatus(principal.encode())]
    (reject,) = desk.send(L1, [frames.STATUS])
    assert isinstance(reject, Reject)
    assert "learner:l1 may not ask for the status" in reject.reason


def test_questions_are_rationed(desk: Any) -> None:
    effects = [
        desk.dispatch.handle(CONTROLLER.encode(), [frames.STATUS], desk.now) for _ in range(100)
    ]
    assert sum(map(len, effects)) == 10


def test_what_is_stored_and_refused_is_counted_by_cause(desk: Any) -> None:
    desk.publish(L1, 1, 2)
    poison = desk.envelope(L1, 1, 3, type="no type")
    desk.send(L1, desk.message(poison))
    desk.commit()
    desk.send(L1, desk.message(desk.envelope(L2, 1, 1)))  # in another's name
    desk.send(L1, [frames.PUBLISH, bytes(4), desk.envelope(L1, 1, 4)])  # damaged on the way
    desk.publish(L1, 1, epoch=7)
    desk.publish(L1, 4, epoch=1)  # of an older epoch
    desk.commit()
    refused = desk.dispatch.offences.events
    counted = {cause: count for cause, count in refused.items() if count}
    assert counted == {"poison": 1, "forged": 1, "damaged": 1, "fenced": 1}
    assert desk.dispatch.stored == 3
    assert set(refused) == set(EVENT_REFUSALS), "whatever comes, the causes are these"


@pytest.mark.parametrize("cause", ["full_disk", "log_limit"])
def test_every_event_that_finds_no_room_is_counted(desk: Any, cause: str) -> None:
    desk.publish(L1, 1, 2)
    desk.dispatch.sequencer.seal(1)
    desk.publish(L2, 1)
    desk.dispatch.failed("no room", desk.now, cause)
    refused = desk.dispatch.offences.events
    assert refused[cause] == 3, "in flight, and behind it"
    desk.publish(L1, 1, 2)
    assert refused[cause] == 5, "and again when they are sent again"
    assert desk.dispatch.stored == 0


def test_connections_are_counted_by_principal(desk: Any) -> None:
    desk.hello(L1, peer=b"second")
    assert desk.dispatch.connections() == {L1: 2, L2: 1, CONTROLLER: 1}
