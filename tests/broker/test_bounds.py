"""dispatch.py: principals that may be in some federations only, and the end of all connections."""

from __future__ import annotations

from typing import Any

from metisfl.proto import frames
from metisfl.proto.frames import Beat, Busy, Fetch, FetchedBatch, Reject

L1, L2 = "learner:l1", "learner:l2"


def test_after_a_cut_nobody_is_connected_and_publishers_go_on_where_they_were(desk: Any) -> None:
    desk.publish(L1, 1)
    desk.dispatch.cut_off()
    assert not desk.dispatch.knows(L1.encode())
    assert desk.dispatch.connections() == {}
    assert desk.commit() == [], "nobody is there to be told"
    (welcome,) = desk.hello(L1)
    assert welcome.publisher_sequence == 1
    desk.publish(L1, 2)
    desk.commit()
    assert len(desk.log) == 2


def test_who_is_bound_to_a_federation_has_nothing_to_do_with_others(desk: Any) -> None:
    desk.publish(L1, 1)
    desk.commit()
    desk.dispatch.bind({L1: {"other"}, L2: set()})
    desk.publish(L1, 2)
    desk.publish(L2, 1)
    refused = [answer for answer in desk.commit() if isinstance(answer, Reject)]
    assert [(one.code, one.sequence) for one in refused] == [(frames.POISON, 2)]
    assert len(desk.log) == 2
    (reject,) = desk.send(L1, frames.pack_fetch(Fetch(1, 0, 1, "f/done/l1/")))
    assert "may not read" in reject.reason
    (reject,) = desk.send(L1, frames.pack_beat(Beat("f/beat/l1/", "Progress", b"")))
    assert "may not send beats" in reject.reason
    (answer,) = desk.send(L1, frames.pack_fetch(Fetch(1, 0, 1, "other/done/l1/")))
    assert isinstance(answer, FetchedBatch | Busy)


def test_a_bound_lifted_is_lifted_at_once(desk: Any) -> None:
    desk.dispatch.bind({L1: {"other"}})
    assert not desk.dispatch.may_be_in(L1, "f/")
    desk.dispatch.bind({L1: set()})
    assert desk.dispatch.may_be_in(L1, "f/")
    desk.publish(L1, 1)
    desk.commit()
    assert len(desk.log) == 1
