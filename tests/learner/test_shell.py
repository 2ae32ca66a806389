"""What the tasks call for is done once, let go of when it must be, and never ends the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from google.protobuf.message import Message

from metisfl.broker.client import Batch, Outbox, Record
from metisfl.deploy.database import open_database
from metisfl.learner.shell import Learner
from metisfl.learner.state import TaskTable
from metisfl.learner.task import Stage
from metisfl.learner.transfer import DownloadRefused
from metisfl.learner.worker import Result, TrainingCancelled
from metisfl.proto import events_pb2 as pb
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.events import decode, encode
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

DEADLINE_S = 10.0
LANE = "f/task/ada/"


def task(number: int) -> pb.TaskAssigned:
    return pb.TaskAssigned(
        task_id=f"r.{number}.train.ada",
        run_id="r",
        round=number,
        kind=pb.TRAIN,
        learner="ada",
        model_digest=bytes([number]) * 32,
        lease_s=5.0,
        hyperparameters=pb.Hyperparameters(epochs=1, batch_size=1),
    )


class Around:
    """Client, bulk and worker of a learner: what is asked of them is noted."""

    def __init__(self) -> None:
        self.lane: asyncio.Queue[Batch] = asyncio.Queue()
        self.asked: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        self.refuse_models = False
        self.trains_at_once = False
        self.cancelled = asyncio.Event()
        self._read = 0

    # the broker
    def log(self, *messages: Message, publisher: str = "controller") -> None:
        self.log_raw(*(encode(message) for message in messages), publisher=publisher)

    def log_raw(self, *events: tuple[str, bytes], publisher: str = "controller") -> None:
        records = []
        for kind, payload in events:
            self._read += 1
            records.append(Record(self._read, 1, LANE, publisher, kind, "", payload))
        self.lane.put_nowait(Batch(tuple(records), self._read, True))

    async def records(self, lane: str) -> AsyncIterator[Batch]:
        while True:
            yield await self.lane.get()

    def flush(self) -> None: ...

    def beat(self, topic: str, event: Message) -> None: ...

    # the controller's bulk endpoint
    async def download(self, digest: bytes, path: Path, *, on_progress: object) -> None:
        if self.refuse_models:
            raise DownloadRefused("no model of this digest here")
        self.asked.put_nowait(("download", digest[0]))

    async def upload(self, task_id: str, path: Path, **_: object) -> None:
        self.asked.put_nowait(("upload", path.name))
        await asyncio.get_running_loop().create_future()

    # the training process: it works until it is cancelled, and writes its update even then
    async def start(self) -> None: ...

    async def run(self, job: Any, on_progress: object) -> Result:
        self.asked.put_nowait(("train", job.update_path.name))
        if self.trains_at_once:
            return Result(write_model(job.update_path, [Tensor("w", np.ones(3), True)]), 5, 1)
        await self.cancelled.wait()
        self.cancelled.clear()
        job.update_path.write_bytes(b"too late")
        raise TrainingCancelled("stopped by request", "cancelled")

    async def cancel(self, grace_s: float) -> None:
        self.asked.put_nowait(("cancel", grace_s))

    async def next(self) -> tuple[str, object]:
        return await asyncio.wait_for(self.asked.get(), DEADLINE_S)


class Site:
    def __init__(self, folder: Path) -> None:
        self.home = folder
        self.database = open_database(folder / "db")
        self.outbox = Outbox(self.database, "learner:ada")
        self.around = Around()
        for name in ("models", "outbox", "final"):
            (folder / name).mkdir(exist_ok=True)
        self.learner = Learner(
            name="ada",
            federation="f",
            home=folder,
            connection=self.database,
            outbox=self.outbox,
            client=cast(Any, self.around),
            bulk=cast(Any, self.around),
            worker=cast(Any, self.around),
        )

    def published(self) -> list[Message]:
        envelopes = [parse_envelope(row[2]) for row in self.outbox.rows(0, 100)]
        return [decode(envelope.type, envelope.payload) for envelope in envelopes]


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    one = Site(folder)
    with closing(one.database):
        await one.learner.begin()
        following = asyncio.create_task(one.learner.follow(LANE))
        try:
            yield one
            assert not one.learner.failed.done(), one.learner.failed
            assert not following.done(), following
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await one.learner.end()
            one.learner.failed.cancel()


def test_a_learner_that_ends_while_it_trains_reports_nothing_and_trains_later(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.log(task(1))
            assert await ada.around.next() == ("download", 1)
            assert await ada.around.next() == ("train", "r.1.train.ada.update")
            ada.learner.save()
            await ada.learner.end()
            assert [type(one) for one in ada.published()] == [pb.LearnerJoined]
            (job,) = TaskTable(ada.database).load("ada").jobs.values()
            assert job.stage is Stage.WORKING

    asyncio.run(scenario())


def test_stopping_a_task_that_waits_its_turn_stops_that_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.log(task(1))
            assert await ada.around.next() == ("download", 1)
            assert (await ada.around.next())[0] == "train"
            cancels = [pb.TaskCancelled(task_id=task(number).task_id) for number in (1, 2)]
            # As after a long absence: the log holds tasks that were given up in the meantime.
            ada.around.log(cancels[0], task(2), cancels[1], task(3))
            assert (await ada.around.next())[0] == "cancel"
            ada.around.cancelled.set()
            assert await ada.around.next() == ("download", 3), "nothing is fetched for task 2"
            assert await ada.around.next() == ("train", "r.3.train.ada.update")
            left = [path.name for path in (tmp_path / "outbox").iterdir()]
            assert left == [], "what a stopped task wrote at last is gone"

    asyncio.run(scenario())


def test_a_model_that_the_controller_has_no_more_fails_the_task_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.refuse_models = True
            ada.around.log(task(1))
            while not (failed := [m for m in ada.published() if isinstance(m, pb.TaskFailed)]):
                await asyncio.sleep(0)
            assert failed[0].reason.endswith("no model of this digest here")
            ada.around.refuse_models = False
            ada.around.log(task(2))
            assert await ada.around.next() == ("download", 2)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("event", "publisher"),
    [
        (("TaskAssigned", b"\xff\xff"), "controller"),
        (("FromTheFuture", b""), "controller"),
        (encode(task(1)), "driver:mallory"),
        (encode(pb.RunFinished(run_id="r", outcome=pb.RunFinished.FAILED)), "driver:mallory"),
    ],
)
def test_what_is_no_event_or_not_the_senders_to_send_changes_nothing(
    tmp_path: Path, event: tuple[str, bytes], publisher: str
) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.log(task(2))
            assert await ada.around.next() == ("download", 2)
            assert (await ada.around.next())[0] == "train"
            ada.around.log_raw(event, publisher=publisher)
            ada.around.log(task(3))
            while len(jobs := TaskTable(ada.database).load("ada").jobs) < 2:
                await asyncio.sleep(0)
                ada.learner.save()
            assert {key: job.stage for key, job in jobs.items()} == {
                task(2).task_id: Stage.WORKING,
                task(3).task_id: Stage.QUEUED,
            }

    asyncio.run(scenario())


def test_updates_of_tasks_that_are_over_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    for name in ("r.7.train.ada.update", "r.8.train.ada.update.partial"):
        (tmp_path / "outbox" / name).touch()

    async def scenario() -> None:
        async with site(tmp_path):
            assert list((tmp_path / "outbox").iterdir()) == []

    asyncio.run(scenario())


def test_an_update_is_sent_again_after_a_restart_and_made_again_only_if_it_is_lost(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.trains_at_once = True
            ada.around.log(task(1))
            steps = [(await ada.around.next())[0] for _ in range(3)]
            assert steps == ["download", "train", "upload"]
            assert ada.outbox.cursor(LANE) == 1, "saved with the update, before it is sent"
        async with site(tmp_path) as ada:
            assert await ada.around.next() == ("upload", "r.1.train.ada.update")
        (tmp_path / "outbox" / "r.1.train.ada.update").unlink()
        async with site(tmp_path) as ada:
            assert [(await ada.around.next())[0] for _ in range(2)] == ["download", "train"]

    asyncio.run(scenario())
