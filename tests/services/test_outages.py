"""Daemons that are killed and started again, one by one: the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import DEADLINE_S, Daemons
from driver_output import wait_for

SITES = {"ada": "honest 1", "bob": "honest 2"}


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, SITES)
    try:
        yield daemons
    finally:
        daemons.stop()


def test_every_round_is_closed_once_whoever_is_killed_meanwhile(daemons: Daemons) -> None:
    driver = daemons.run(rounds=40)
    for number, name in enumerate(("controller", "broker", "ada", "controller", "bob", "broker")):
        wait_for(driver, f"round {5 * number + 2} of")
        daemons.restart(name)
    output, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    mean = 40 * (1 * 1 + 2 * 2) / 3
    assert f"test mean {mean:.3f}" in output, "every round added its mean once"
    assert [record.round for record in daemons.records()] == list(range(41))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_site_that_is_restarted_while_it_trains_is_counted(
    daemons: Daemons, number: signal.Signals
) -> None:
    os.mkfifo(daemons.pause)
    driver = daemons.run(rounds=1)
    daemons.pause.open().close()  # returns when the site trains
    daemons.pause.unlink()
    daemons.restart("bob", number)
    output, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    assert "1 rounds in" in output
    assert "failed" not in rest


def test_who_asks_while_a_run_goes_on_is_told_so_and_disturbs_nobody(daemons: Daemons) -> None:
    os.mkfifo(daemons.pause)
    first = daemons.run(rounds=2)
    daemons.pause.open().close()
    second = daemons.run(rounds=1)
    _, rest = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 1
    assert "is training; wait for its end" in rest
    daemons.pause.unlink()
    daemons.restart("bob")
    _, rest = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 0, rest


def test_an_interrupted_command_says_so_and_what_never_reached_the_broker_is_not_asked_again(
    daemons: Daemons,
) -> None:
    daemons.end("broker", signal.SIGKILL)
    lonely = daemons.run(rounds=9)
    wait_for(lonely, "the broker does not answer")
    lonely.send_signal(signal.SIGINT)
    output, rest = lonely.communicate(timeout=DEADLINE_S)
    assert (lonely.returncode, output) == (130, ""), "stdout is for the result"
    assert "interrupted" in rest
    daemons.start("broker")
    driver = daemons.run(rounds=1)
    _, rest = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, rest
    assert [record.round for record in daemons.records()] == [0, 1]
