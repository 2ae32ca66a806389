"""A lease ends once, after its time without a renewal, and never before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metisfl.controller.lease import Leases, Wait

ADA, BOB = Wait("ada", "t1", 10.0), Wait("bob", "t2", 10.0)


@given(st.lists(st.floats(0, 30), max_size=12))
def test_a_lease_ends_exactly_when_nothing_was_heard_for_its_time(gaps: list[float]) -> None:
    leases, now, heard, ended_at = Leases().watch([ADA], 0.0), 0.0, 0.0, None
    for gap in gaps:
        now += gap
        leases, ended = leases.end(now)
        assert bool(ended) == (ended_at is None and now - heard > ADA.lease_s)
        if ended:
            ended_at = now
        leases, heard = leases.renew("ada", "t1", now), now
        leases, again = leases.end(now)
        assert not again, "a renewed or reported lease does not end again"


def test_progress_of_one_learner_does_not_renew_another() -> None:
    leases = Leases().watch([ADA, BOB], 0.0).renew("ada", "t1", 9.0).renew("ada", "t2", 9.0)
    _, ended = leases.end(12.0)
    assert [(one.wait, one.silent_s) for one in ended] == [(BOB, 12.0)]


def test_what_is_no_longer_awaited_cannot_end() -> None:
    leases = Leases().watch([ADA, BOB], 0.0).watch([BOB], 5.0)
    assert leases.next_end() == 10.0
    _, ended = leases.end(100.0)
    assert [one.wait for one in ended] == [BOB]


def test_the_next_end_is_known_so_that_nobody_polls() -> None:
    assert Leases().next_end() is None
    assert Leases().watch([ADA], 3.0).next_end() == 13.0


def test_while_nobody_can_be_heard_no_lease_runs() -> None:
    leases = Leases().watch([ADA, BOB], 0.0).afresh(9.0)
    assert leases.next_end() == 19.0
    leases, ended = leases.end(20.0)
    assert {one.wait.learner for one in ended} == {"ada", "bob"}
    assert leases.afresh(21.0).end(99.0)[1] == (), "what has ended stays ended"
