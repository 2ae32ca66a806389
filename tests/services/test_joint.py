"""Federations of real processes under a joint key: what they compute, and that opening survives."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from daemons import Daemons
from google.protobuf.message import Message
from watched import APP, check, digest_of, said_by, watched

from metisfl.deploy.view import View
from metisfl.deploy.watch import RunFailed
from metisfl.proto import events_pb2 as pb

SITES = {"ada": "0.05", "bob": "0.05", "cyd": "0.05"}
ROUNDS = 5
STEPS = ("RoundClosed", "TaskAssigned", "UpdateStored", "TaskCompleted", "ModelOpened")
"""What the log holds of each opening, in the order in which it can be seen first."""


@pytest.fixture
def field(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, SITES, joint=True, app=APP)
    yield daemons
    daemons.stop()


def step_of(message: Message) -> str:
    """Which step of an opening an event is; "" if it is of something else."""
    name = message.DESCRIPTOR.name
    if isinstance(message, (pb.RoundClosed, pb.ModelOpened)):
        return name
    return name if ".open." in getattr(message, "task_id", "") else ""


def partials_made(daemons: Daemons) -> Mapping[str, int]:
    """How often each site has made its partial for a task."""
    return Counter(
        str(line["task"])
        for name in SITES
        for line in said_by(daemons, name)
        if line["event"] == "partial made"
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    daemons = Daemons(tmp_path_factory.mktemp("quiet"), SITES, joint=True, app=APP)
    try:
        view = asyncio.run(watched(daemons, rounds=ROUNDS))
        check(daemons, view, digest := digest_of(daemons, view))
        made = partials_made(daemons)
    finally:
        daemons.stop()
    assert len(made) == len(SITES) * (ROUNDS + 1), "each site opens each round, the initial one too"
    assert set(made.values()) == {1}
    return digest


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["broker", "controller", "bob"])
def test_a_kill_at_any_step_of_an_opening_changes_nothing(
    field: Daemons, undisturbed: str, victim: str
) -> None:
    left = list(STEPS)

    def act(before: View, message: Message) -> None:
        if left and before.round >= len(STEPS) - len(left) and step_of(message) == left[0]:
            left.pop(0)
            field.restart(victim, signal.SIGKILL)

    view = asyncio.run(watched(field, rounds=ROUNDS, act=act))
    assert not left, f"there was no {left}"
    check(field, view, undisturbed)
    twice = {task for task, times in partials_made(field).items() if times > 1}
    assert not twice, f"partials made more than once: {twice}"


@pytest.mark.chaos
def test_a_run_that_waits_asks_a_site_that_was_silent_for_its_partial_again(
    field: Daemons, undisturbed: str
) -> None:
    def act(before: View, message: Message) -> None:
        if isinstance(message, pb.RoundClosed) and message.round == 2:
            field.end("cyd", signal.SIGKILL)
        elif isinstance(message, pb.LeaseEnded) and "cyd" not in field.running:
            field.start("cyd")

    view = asyncio.run(watched(field, rounds=ROUNDS, act=act, lease_s=2.0))
    check(field, view, undisturbed)


def test_a_site_that_is_missing_when_a_round_is_opened_ends_the_run_by_name(field: Daemons) -> None:
    field.without_quorum = "fail"

    def act(before: View, message: Message) -> None:
        if isinstance(message, pb.RoundClosed) and message.round == 1:
            field.end("cyd", signal.SIGKILL)

    with pytest.raises(RunFailed, match="round 1 is folded and cannot be opened") as failed:
        asyncio.run(watched(field, rounds=2, act=act, lease_s=2.0))
    assert "cyd: silent for" in str(failed.value)


def test_sites_go_on_under_a_new_key_with_the_model_that_they_have_opened(tmp_path: Path) -> None:
    """One of them is lost for good; the others make a key without it."""
    for name in ("three", "two"):
        (tmp_path / name).mkdir()
    three = Daemons(tmp_path / "three", dict.fromkeys(SITES, "honest 1"), joint=True)
    try:
        before = asyncio.run(watched(three, rounds=2))
    finally:
        three.stop()
    two = Daemons(tmp_path / "two", dict.fromkeys(["ada", "bob"], "honest 1"), joint=True,
                  started=False)  # fmt: skip
    for name in two.sites:
        kept = three.homes.learners[name] / "checkpoints"
        shutil.copytree(kept, two.homes.learners[name] / "checkpoints")
    try:
        for name in two.names:
            two.start(name)
        after = asyncio.run(watched(two, rounds=1, continues=before.run_id))
        assert (before.metrics["test.mean"], after.metrics["test.mean"]) == (2.0, 3.0)
        with pytest.raises(RunFailed, match="opened no model of run never"):
            asyncio.run(watched(two, rounds=1, continues="never"))
    finally:
        two.stop()
