"""A controller's shell in a test, with a broker and a learner around it that are not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, cast

import numpy as np
from google.protobuf.message import Message

from metisfl.broker.client import Batch, Outbox, Record
from metisfl.controller.admission import Expected
from metisfl.controller.effects import key_of
from metisfl.controller.shell import Controller
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.deploy.audit import Audit
from metisfl.deploy.database import open_database
from metisfl.proto import events_pb2 as pb
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.events import decode, encode
from metisfl.proto.frames import Beat
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

DEADLINE_S = 20.0
PLAN = pb.RunStarted(
    run_id="r",
    rounds=9,
    learners=["ada"],
    quorum=1,
    lease_s=60.0,
    privacy="plain",
    hyperparameters=pb.Hyperparameters(epochs=1, batch_size=1),
)


class Around:
    """A broker that logs what the outbox holds, and a learner that does its tasks at once.

    It does not do the task `refused`, but says that it was `asked`.
    """

    def __init__(self, outbox: Outbox, spool: Spool) -> None:
        self._lane: asyncio.Queue[Batch] = asyncio.Queue()
        self._outbox, self._spool = outbox, spool
        self._sent, self._logged = outbox.last(), 0
        self._drained = False
        self.keys: list[str] = []
        self.replayed: list[Batch] = []
        self.controller: Controller | None = None
        self.history: list[str] = []
        self.logged: list[Record] = []
        self.refused = ""
        self.beaten: list[Beat] = []
        self.asked = asyncio.Event()

    async def drained(self, timeout_s: float) -> None:
        self._drained = True

    async def records(self, lane: str) -> AsyncIterator[Batch]:
        assert self._drained, "the lane does not hold yet what a former process decided"
        for batch in self.replayed:
            yield batch
        while True:
            yield await self._lane.get()

    async def beats(self, prefix: str) -> AsyncIterator[Beat]:
        for beat in self.beaten:
            yield beat

    def log(self, publisher: str, message: Message, *, garbled: bool = False) -> None:
        self._logged += 1
        self.history.append(message.DESCRIPTOR.name)
        if publisher == "controller":
            self.keys.append(key_of(message))
        kind, payload = encode(message)
        payload = b"\xff" if garbled else payload
        record = Record(self._logged, self._logged, "f/run/all/", publisher, kind, "", payload)
        self.logged.append(record)
        self._lane.put_nowait(Batch((record,), self._logged, True, 0))

    def flush(self) -> None:
        for sequence, _, data in self._outbox.rows(self._sent, 1000):
            self._sent = sequence
            envelope = parse_envelope(data)
            message = decode(envelope.type, envelope.payload)
            self.log("controller", message)
            if isinstance(message, pb.TaskAssigned):
                self._answer(message)

    def expect(self, expected: Mapping[str, Expected]) -> None: ...

    def _answer(self, task: pb.TaskAssigned) -> None:
        if task.task_id == self.refused:
            self.asked.set()
            return
        digest = b""
        if task.kind != pb.EVALUATE:
            assert self.controller is not None
            tensor = Tensor("w", np.full(4, float(task.round)), True)
            digest = write_model(self._spool.update_path(task.task_id), [tensor])
            self.controller.on_stored(task.task_id, digest, 32)
        done = pb.TaskCompleted(
            task_id=task.task_id, learner="ada", update_digest=digest, examples=1
        )
        self.log("learner:ada", done)


class World:
    def __init__(self, folder: Path) -> None:
        self.connection = open_database(folder / "db")
        self.outbox = Outbox(self.connection, "controller")
        self.store, self.spool = ModelStore(folder / "models"), Spool(folder / "spool")
        self.around = Around(self.outbox, self.spool)
        self.controller = self.around.controller = Controller(
            federation="f",
            home=folder,
            connection=self.connection,
            outbox=self.outbox,
            client=cast(Any, self.around),
            bulk=cast(Any, self.around),
            store=self.store,
            spool=self.spool,
            public=None,
            audit=Audit(folder / "audit.jsonl"),
        )
        self.plan = pb.RunStarted()
        self.plan.CopyFrom(PLAN)

    def begin(self) -> None:
        self.around.log("driver:me", self.plan)
        for _ in range(2):  # the second comes while the answer to the first is on its way
            self.around.log("learner:ada", pb.LearnerJoined(learner="ada"))


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    one = World(folder)
    with closing(one.connection):
        following = asyncio.create_task(one.controller.follow())
        asyncio.get_running_loop().call_soon(one.begin)
        try:
            yield one
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            one.controller.failed.cancel()


def audited(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = (folder / "audit.jsonl").read_text().splitlines()
    return [(line["what"], line["facts"]) for line in map(json.loads, lines)]
