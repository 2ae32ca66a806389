"""Who is killed comes back, unless it is killed again and again; who ends by itself does not."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.deploy.restarts import KILLS_MAX, WITHIN_S, Fate, Kills, fate_of


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS])
def test_who_is_killed_is_started_again(number: signal.Signals) -> None:
    assert fate_of(-number, Kills(), 0.0) == (Fate.AGAIN, Kills((0.0,)))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 70, -signal.SIGTERM, -signal.SIGINT])
def test_who_ends_by_itself_or_as_asked_is_left(code: int) -> None:
    kills = Kills((1.0, 2.0))
    assert fate_of(code, kills, 3.0) == (Fate.ENDED, kills)


@given(st.lists(st.floats(0, 40), min_size=1, max_size=100), st.floats(0, 1e6))
def test_the_sixth_kill_within_a_minute_is_the_last(gaps_s: list[float], start_s: float) -> None:
    """Said again with the whole history, of which the code keeps only what still counts."""
    kills, now_s, history = Kills(), start_s, []
    for gap_s in gaps_s:
        now_s += gap_s
        history.append(now_s)
        fate, kills = fate_of(-signal.SIGKILL, kills, now_s)
        lately = [at for at in history if now_s - at < WITHIN_S]
        expected = Fate.AGAIN if len(lately) <= KILLS_MAX else Fate.GIVEN_UP
        assert fate is expected, f"kills {now_s - min(lately):.1f} s back: {lately}"
        if fate is Fate.GIVEN_UP:
            return


def test_kills_that_are_a_minute_old_are_forgotten() -> None:
    kills = Kills()
    for number in range(1000):
        fate, kills = fate_of(-signal.SIGKILL, kills, number * WITHIN_S / KILLS_MAX)
        assert fate is Fate.AGAIN
        assert len(kills.at_s) <= KILLS_MAX
