"""Who is killed comes back, unless it is killed again and again; who ends by itself does not.

Who has no room on its disk comes back for ever.
"""

from __future__ import annotations

import math
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.deploy.restarts import FULL_PAUSE_S, KILLS_MAX, WITHIN_S, Fate, Past, fate_of
from metisfl.proto.errors import DiskFull


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS])
def test_who_is_killed_is_started_again(number: signal.Signals) -> None:
    assert fate_of(-number, Past(), 0.0) == (Fate.AGAIN, Past(killed_s=(0.0,)))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 70, -signal.SIGTERM, -signal.SIGINT])
def test_who_ends_by_itself_or_as_asked_is_left(code: int) -> None:
    past = Past(killed_s=(1.0, 2.0), full_s=2.5)
    assert fate_of(code, past, 3.0) == (Fate.ENDED, past)


@given(st.lists(st.floats(0, 40), min_size=1, max_size=100), st.floats(0, 1e6))
def test_the_sixth_kill_within_a_minute_is_the_last(gaps_s: list[float], start_s: float) -> None:
    """Said again with the whole history, of which the code keeps only what still counts."""
    past, now_s, history = Past(), start_s, []
    for gap_s in gaps_s:
        now_s += gap_s
        history.append(now_s)
        fate, past = fate_of(-signal.SIGKILL, past, now_s)
        lately = [at for at in history if now_s - at < WITHIN_S]
        expected = Fate.AGAIN if len(lately) <= KILLS_MAX else Fate.GIVEN_UP
        assert fate is expected, f"kills {now_s - min(lately):.1f} s back: {lately}"
        if fate is Fate.GIVEN_UP:
            return


def test_kills_that_are_a_minute_old_are_forgotten() -> None:
    past = Past()
    for number in range(1000):
        fate, past = fate_of(-signal.SIGKILL, past, number * WITHIN_S / KILLS_MAX)
        assert fate is Fate.AGAIN
        assert len(past.killed_s) <= KILLS_MAX


@given(st.lists(st.floats(0, 2 * WITHIN_S), min_size=1, max_size=50), st.floats(0, 1e6))
def test_a_full_disk_is_told_once_a_stretch_and_never_given_up(
    gaps_s: list[float], start_s: float
) -> None:
    past, now_s, before_s = Past(), start_s, -math.inf
    for gap_s in gaps_s:
        now_s += gap_s
        fate, past = fate_of(DiskFull.exit_code, past, now_s)
        assert fate is (Fate.STILL_FULL if now_s - before_s < WITHIN_S else Fate.FULL)
        assert past == Past(full_s=now_s), "it counts as no kill"
        before_s = now_s


def test_a_disk_that_stays_full_for_days_is_one_stretch() -> None:
    past, told = Past(), 0
    for number in range(50_000):
        fate, past = fate_of(DiskFull.exit_code, past, number * (FULL_PAUSE_S + 5.0))
        told += fate is Fate.FULL
    assert told == 1


def test_kills_are_counted_through_a_full_disk() -> None:
    past = Past()
    for number in range(KILLS_MAX):
        _, past = fate_of(-signal.SIGKILL, past, number)
        _, past = fate_of(DiskFull.exit_code, past, number + 0.5)
    assert fate_of(-signal.SIGKILL, past, KILLS_MAX)[0] is Fate.GIVEN_UP
