"""A learner whose client, bulk and worker are stand-ins: what is asked of them is noted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.message import Message

from metisfl.broker.client import Batch, Outbox, Record
from metisfl.deploy.database import open_database
from metisfl.learner.home import Home
from metisfl.learner.shell import Learner
from metisfl.learner.transfer import DownloadRefused, UploadRefused
from metisfl.learner.worker import Job, Result, TrainingCancelled
from metisfl.proto import events_pb2 as pb
from metisfl.proto.bulk import Code
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.events import decode, encode
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

DEADLINE_S = 10.0
LANE = "f/task/ada/"


def task(number: int, **fields: Any) -> pb.TaskAssigned:
    """Train in round `number`."""
    given: dict[str, Any] = {
        "task_id": f"r.{number}.train.ada",
        "run_id": "r",
        "round": number,
        "kind": pb.TRAIN,
        "learner": "ada",
        "model_digest": bytes([number]) * 32,
        "lease_s": 5.0,
        "hyperparameters": pb.Hyperparameters(epochs=1, batch_size=1),
    }
    return pb.TaskAssigned(**{**given, **fields})


class Around:
    """Client, bulk and worker of a learner."""

    examples = 7

    def __init__(self) -> None:
        self.lane: asyncio.Queue[Batch] = asyncio.Queue()
        self.asked: asyncio.Queue[tuple[str, object]] = asyncio.Queue()
        self.refuse_models = False
        self.trains_at_once = False
        self.stores_at_once = False
        self.no_room_for = 0  # uploads
        self.answer: Callable[[Job], Result] | None = None
        self.jobs: list[Job] = []
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
        if self.no_room_for:
            self.no_room_for -= 1
            raise UploadRefused(Code.NO_SPACE, "no space left on device")
        if not self.stores_at_once:
            await asyncio.get_running_loop().create_future()

    # the training process: it works until it is cancelled, and writes its update even then
    async def start(self) -> None: ...

    async def run(self, job: Job, on_progress: object) -> Result:
        assert job.update_path is not None
        self.jobs.append(job)
        self.asked.put_nowait((job.kind, job.update_path.name))
        if self.answer is not None:
            return self.answer(job)
        if self.trains_at_once:
            digest = write_model(job.update_path, [Tensor("w", np.ones(3), True)])
            return Result(digest, 5, 1)
        await self.cancelled.wait()
        self.cancelled.clear()
        job.update_path.write_bytes(b"too late")
        raise TrainingCancelled("stopped by request", "cancelled")

    async def cancel(self, grace_s: float) -> None:
        self.asked.put_nowait(("cancel", grace_s))

    async def next(self) -> tuple[str, object]:
        return await asyncio.wait_for(self.asked.get(), DEADLINE_S)


class Site:
    """With `public`, a site that holds a key."""

    def __init__(self, folder: Path, public: Any = None) -> None:
        self.database = open_database(folder / "db")
        self.outbox = Outbox(self.database, "learner:ada")
        self.around = Around()
        self.home = Home(folder)
        self.learner = Learner(
            name="ada",
            federation="f",
            home=self.home,
            connection=self.database,
            outbox=self.outbox,
            client=cast(Any, self.around),
            bulk=cast(Any, self.around),
            worker=cast(Any, self.around),
            public=public,
        )

    def published(self) -> list[Message]:
        envelopes = [parse_envelope(row[2]) for row in self.outbox.rows(0, 100)]
        return [decode(envelope.type, envelope.payload) for envelope in envelopes]

    async def said(self, kind: type[Message]) -> Any:
        """The last event of this kind, as soon as there is one."""
        while not (found := [one for one in self.published() if isinstance(one, kind)]):
            await asyncio.sleep(0)
        return found[-1]


@asynccontextmanager
async def site(folder: Path, public: Any = None) -> AsyncIterator[Site]:
    """A learner at work; it must not have failed by itself."""
    one = Site(folder, public)
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
