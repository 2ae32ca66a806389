"""A learner that trains nothing: real connections, events and uploads, and a file made before."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import load_identity
from metisfl.learner.transfer import BulkClient
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.events import decode

Gate = Callable[[pb.TaskAssigned], Awaitable[None]]
"""Awaited with each task before anything is done for it."""


class StubLearner:
    """Answers every task with `update` (a model file) and one example."""

    def __init__(
        self, name: str, federation: str, update: Path, client: BrokerClient, bulk: BulkClient,
        outbox: Outbox, connection: sqlite3.Connection,
    ) -> None:  # fmt: skip
        self._name, self._federation, self._update = name, federation, update
        self._client, self._bulk = client, bulk
        self._outbox, self._connection = outbox, connection

    async def join(self) -> None:
        topic = topics.member_topic(self._federation, self._name)
        self._append(topic, pb.LearnerJoined(learner=self._name, examples=1))
        await self._client.drained(60)

    async def work(self, gate: Gate) -> None:
        """Do every task, for ever."""
        async for batch in self._client.records(topics.task_topic(self._federation, self._name)):
            for record in batch.records:
                task = decode(record.type, record.payload)
                if isinstance(task, pb.TaskAssigned):
                    await gate(task)
                    await self._answer(task)

    async def _answer(self, task: pb.TaskAssigned) -> None:
        done = pb.TaskCompleted(task_id=task.task_id, learner=self._name, examples=1)
        if task.kind == pb.EVALUATE:
            done.metrics["test.examples"] = 1.0
        else:
            done.update_digest = await self._bulk.upload(
                task.task_id, self._update, run_id=task.run_id
            )
        self._append(topics.done_topic(self._federation, self._name), done)

    def _append(self, topic: str, message: pb.LearnerJoined | pb.TaskCompleted) -> None:
        with self._connection:
            self._connection.execute("begin")
            self._outbox.append(topic, message)
        self._client.flush()


@asynccontextmanager
async def stub_learner(
    name: str, federation: str, home: Path, update: Path, endpoints: tuple[str, str, str]
) -> AsyncIterator[StubLearner]:
    """Connect a learner whose keys are in `home`; endpoints are ingress, live and bulk."""
    ingress, live, bulk_endpoint = endpoints
    identity = load_identity(home / "keys")
    servers = load_servers(home / "keys", "broker", "controller")
    connection = sqlite3.connect(":memory:", isolation_level=None)
    outbox = Outbox(connection, identity.principal)
    client = BrokerClient(
        ingress=ingress,
        live=live,
        keys=ClientKeys(identity.public, identity.secret, servers["broker"]),
        principal=identity.principal,
        outbox=outbox,
        software="stub",
    )
    keys = ClientKeys(identity.public, identity.secret, servers["controller"])
    async with client, BulkClient(bulk_endpoint, keys, federation=federation) as bulk:
        yield StubLearner(name, federation, update, client, bulk, outbox, connection)
    connection.close()
