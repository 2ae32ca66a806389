"""The process that trains is killed, its daemon is not: the task is done again at that site."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, check, watched

from metisfl.deploy.view import View
from metisfl.proto import events_pb2 as pb

pytestmark = pytest.mark.chaos

SITES = {"ada": "0.4", "bob": "0.4"}
ROUNDS = 4
INTO_TRAINING_S = 0.1


@pytest.fixture(params=["plain", "ckks"])
def daemons(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, SITES, encrypted=request.param == "ckks", app=APP)
    try:
        yield daemons
    finally:
        daemons.stop()


def kill_training_of(daemons: Daemons, name: str) -> None:
    pid = daemons.running[name].pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)


def test_a_killed_training_process_costs_its_task_some_time(
    daemons: Daemons, undisturbed: Callable[[Daemons, int], str]
) -> None:
    left = {2: "ada", 3: "bob"}

    def act(before: View, message: Message) -> None:
        if isinstance(message, pb.TaskAssigned) and left.get(message.round) == message.learner:
            loop = asyncio.get_running_loop()
            name = left.pop(message.round)
            loop.call_later(INTO_TRAINING_S, kill_training_of, daemons, name)

    view = asyncio.run(watched(daemons, rounds=ROUNDS, act=act))
    assert left == {}
    check(daemons, view, undisturbed(daemons, ROUNDS))
