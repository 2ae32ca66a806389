"""Whatever others send, the driver follows its run to the end, and believes who may say it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from google.protobuf.message import Message

from metisfl.broker.client import Batch, Beat, Record
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.settings import load_federation
from metisfl.deploy.view import LearnerView, View
from metisfl.deploy.watch import Follower, RunStopped, _run_started, new_view, watch
from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import encode

VIEW = View("r", 3, MappingProxyType({"ada": LearnerView(), "bob": LearnerView()}))
START = ("driver:me", encode(pb.RunStarted(
    run_id="r", rounds=3, learners=["ada"], quorum=1, lease_s=5.0, privacy="plain",
    hyperparameters=pb.Hyperparameters(epochs=1, batch_size=1),
)))  # fmt: skip
END = pb.RunFinished(run_id="r", outcome=pb.RunFinished.COMPLETED, rounds=3)


class Broker:
    """A lane and beats that hold what a test puts there."""

    def __init__(
        self, *events: tuple[str, tuple[str, bytes]], beats: tuple[Beat, ...] = ()
    ) -> None:
        self._events, self._beats = events, beats

    async def records(self, lane: str) -> AsyncIterator[Batch]:
        for number, (publisher, (kind, payload)) in enumerate(self._events, 1):
            record = Record(number, 1, "f/run/all/", publisher, kind, "", payload)
            yield Batch((record,), number, True)

    async def beats(self, prefix: str) -> AsyncIterator[Beat]:
        for beat in self._beats:
            yield beat


class Recorder(LineScreen):
    """Keeps the beats that are shown."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        if not logged_unix_ns:
            self.seen.append(message)


def follower(broker: Broker) -> Follower:
    return Follower(cast(Any, broker), "f", VIEW, LineScreen())


def test_the_bound_on_examples_goes_with_the_run(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        """
        federation = { name = "f", rounds = 1, max_examples = 5000 }
        app = { object = "f:F" }
        learners = [{ name = "a" }, { name = "b" }]
        """
    )
    federation = load_federation(file)
    assert _run_started(federation, new_view(federation)).max_examples == 5000


def test_a_run_ends_when_the_controller_says_so_and_not_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    follow = follower(
        Broker(
            START,
            ("learner:ada", encode(END)),
            ("driver:other", encode(END)),
            ("learner:ada", ("TaskFailed", b"\xff\xff")),
            ("controller", ("FromTheFuture", b"")),
            ("controller", encode(pb.RoundOpened(
                run_id="r", round=2, invited=[pb.Invitation(learner="ada", task_id="t")]
            ))),
            ("controller", encode(END)),
        )
    )  # fmt: skip
    asyncio.run(follow.follow())
    assert follow.view.round == 2, "nobody else ends it"
    assert follow.view.finished == END
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" are ignored")[0] for line in said] == [
        "events of learner:ada",
        "events of driver:other",
        "events of controller",
    ], "one line for each"


def test_a_bad_beat_or_one_in_anothers_name_is_not_shown() -> None:
    progress = pb.Progress(task_id="t", learner="bob", state="working", fraction=0.5)
    kind, payload = encode(progress)
    beats = (
        Beat("f/beat/ada/", kind, payload),
        Beat("f/beat/bob/", kind, b"\xff"),
        Beat("f/beat/bob/", kind, payload),
    )
    shown = Recorder()
    follow = Follower(cast(Any, Broker(START, beats=beats)), "f", VIEW, shown)

    async def scenario() -> None:
        await follow.follow()
        await follow.listen()
        assert shown.seen == [progress]

    asyncio.run(scenario())


def test_a_run_that_somebody_stops_ends_with_who_did_why_and_what_is_kept(
    tmp_path: Path,
) -> None:
    file = tmp_path / "f.toml"
    file.write_text(
        """
        federation = { name = "f", rounds = 1 }
        app = { object = "f:F" }
        learners = [{ name = "ada" }, { name = "bob" }]
        """
    )
    why = "stopped by driver:eve: the data are wrong"
    end = pb.RunFinished(
        run_id="r", outcome=pb.RunFinished.STOPPED, reason=why, rounds=2, model_digest=bytes(32)
    )

    class Client(Broker):
        async def __aenter__(self) -> Client:
            return self

        async def __aexit__(self, *_: object) -> None: ...

        def flush(self) -> None: ...

        async def beats(self, prefix: str) -> AsyncIterator[Beat]:
            await asyncio.Event().wait()
            yield cast(Any, None)

    access = MagicMock(principal="driver:me")
    access.client.return_value = Client(START, ("controller", encode(end)))

    async def scenario() -> None:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            await watch(
                load_federation(file),
                access=access,
                connection=connection,
                view=VIEW,
                screen=LineScreen(),
            )

    with pytest.raises(RunStopped) as stopped:
        asyncio.run(scenario())
    assert str(stopped.value).startswith(f"the run was {why}; stopped after round 2")
    assert stopped.value.exit_code == 5
