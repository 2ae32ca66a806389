"""client.py when the broker is killed, away, full, or not the one that it was."""

from __future__ import annotations

import asyncio
import resource
import shutil
import signal
from contextlib import closing
from typing import Any

import pytest
from client_stories import PATIENCE_S, read, run, soon, until
from wire import Wire

from metisfl.broker.client import BrokerClient, Record
from metisfl.broker.window import Fenced, HistoryLost
from metisfl.proto.errors import MachineError
from metisfl.proto.events_pb2 import TaskFailed


def test_a_killed_broker_loses_nothing_that_it_acknowledged(broker: Any, site: Any) -> None:
    learner, controller = site("learner:l1"), site("controller")
    broker.start()
    topic = "f/done/l1/"
    total, acked_at_kill = 3000, []

    async def publish(client: BrokerClient) -> None:
        while (left := total - learner.outbox.last()) > 0:
            learner.accept(*[topic] * min(await client.room(), left, 50))
            client.flush()

    async def kill(client: BrokerClient) -> None:
        for part in range(1, 4):
            await until(lambda part=part: learner.outbox.acked >= part * total // 5)
            acked_at_kill.append(learner.outbox.acked)
            await asyncio.to_thread(broker.end)
            assert len(broker.log("f")) >= acked_at_kill[-1], "acknowledged and lost"
            await asyncio.to_thread(broker.start)

    async def story() -> list[Record]:
        async with learner.client() as publisher, controller.client() as reader:
            feed = reader.records("f/")
            publishing = asyncio.ensure_future(publish(publisher))
            killing = asyncio.ensure_future(kill(publisher))
            records = await read(feed, total)
            await asyncio.gather(publishing, killing)
            await publisher.drained(PATIENCE_S)
            return records

    records = run(story())
    assert len(acked_at_kill) == 3
    assert broker.log("f") == [("learner:l1", number) for number in range(1, total + 1)]
    assert [record.sequence for record in records] == list(range(1, total + 1))


def test_cut_connections_lose_nothing(broker: Any, site: Any) -> None:
    learner, controller = site("learner:l1"), site("controller")
    broker.start()
    ingress, live = Wire(broker.ingress), Wire(broker.live)
    total = 2000

    async def publish(client: BrokerClient) -> None:
        while (left := total - learner.outbox.last()) > 0:
            learner.accept(*["f/done/l1/"] * min(await client.room(), left, 25))
            client.flush()

    async def cut() -> int:
        cuts = 0
        for part in range(1, 5):
            await until(lambda part=part: learner.outbox.acked >= part * total // 5)
            cuts += ingress.cut() + live.cut()
        return cuts

    async def story() -> list[Record]:
        broker.ingress, broker.live = await ingress.open(), await live.open()
        async with learner.client() as publisher, controller.client() as reader:
            feed = reader.records("f/")
            publishing = asyncio.ensure_future(publish(publisher))
            cutting = asyncio.ensure_future(cut())
            records = await read(feed, total)
            await publishing
            await publisher.drained(PATIENCE_S)
            assert await cutting >= 4, "hardly a connection was cut: this test shows nothing"
        await ingress.close()
        await live.close()
        return records

    records = run(story())
    assert broker.log("f") == [("learner:l1", number) for number in range(1, total + 1)]
    assert [record.sequence for record in records] == list(range(1, total + 1))


def test_a_client_waits_for_a_broker_that_is_not_there_yet(
    broker: Any, site: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = site("learner:l1")

    async def story() -> None:
        async with learner.client() as client:
            learner.accept("f/done/l1/")
            with pytest.raises(MachineError) as error:
                await client.drained(0.2)
            assert (
                f"1 events of learner:l1 were not acknowledged by the broker at {broker.ingress} "
                "within 0.2 s; they stay in the outbox"
            ) in str(error.value)
            assert not client.connected
            await asyncio.to_thread(broker.start)
            await client.drained(PATIENCE_S)
            assert client.connected

    run(story())
    assert broker.end(signal.SIGTERM) == 0


def test_a_full_disk_stops_acknowledgements_and_nothing_else(broker: Any, site: Any) -> None:
    """The broker's files may not grow for a while: as good as a full disk, without one."""
    learner = site("learner:l1")
    broker.start()
    topic = "f/done/l1/"

    async def story() -> int:
        async with learner.client() as client:
            learner.accept(topic)
            await client.drained(PATIENCE_S)
            pid = broker.process.pid
            unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
            learner.accept(*[topic] * 2000)
            client.flush()
            await until(lambda: "events cannot be stored" in broker.said())
            with pytest.raises(MachineError, match="events of learner:l1 were not acknowledged"):
                await client.drained(0.6)
            assert broker.process.poll() is None, "the broker ended"
            assert len(broker.log("f")) == learner.outbox.acked < 2001
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
            await client.drained(PATIENCE_S)
            while "events are stored again" not in broker.said():
                learner.accept(topic)
                await client.drained(PATIENCE_S)
            return learner.outbox.last()

    last = run(story())
    assert broker.log("f") == [("learner:l1", number) for number in range(1, last + 1)]
    failures = [line for line in broker.said().splitlines() if '"level": "error"' in line]
    assert len(failures) == 1, f"told once: {failures}"


def test_a_log_file_on_the_full_disk_does_not_end_the_broker(broker: Any, site: Any) -> None:
    """Not a byte can be written: neither events nor what the broker says about it."""
    learner = site("learner:l1")
    broker.start()

    async def story() -> None:
        async with learner.client() as client:
            learner.accept("f/done/l1/")
            await client.drained(PATIENCE_S)
            pid = broker.process.pid
            unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, unlimited[1]))
            learner.accept("f/done/l1/")
            with pytest.raises(MachineError, match="1 events of learner:l1"):
                await client.drained(1)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
            await client.drained(PATIENCE_S)

    run(story())
    assert broker.log("f") == [("learner:l1", 1), ("learner:l1", 2)]


def test_a_restored_log_stops_readers_and_publishers(broker: Any, site: Any) -> None:
    learner, controller, other = site("learner:l1"), site("controller"), site("learner:l2")
    log, copy = broker.home / "log", broker.home / "copy"

    async def publish(count: int) -> None:
        async with learner.client() as publisher:
            learner.accept(*["f/done/l1/"] * count)
            await publisher.drained(PATIENCE_S)

    async def story() -> None:
        async with controller.client() as reader:
            feed = reader.records("f/")
            await soon(feed.__anext__())
            await publish(5)
            await read(feed, 5)
            await asyncio.to_thread(broker.end)
            shutil.rmtree(log)
            shutil.copytree(copy, log)
            await asyncio.to_thread(broker.start)
            with pytest.raises(HistoryLost, match="log ends at 2, but lane f/ was read up to 7"):
                await soon(feed.__anext__())
        with pytest.raises(HistoryLost, match="expects event 3 of learner:l1"):
            await publish(1)
        async with other.client() as publisher:
            other.accept("f/done/l2/")
            await publisher.drained(PATIENCE_S)

    broker.start()
    run(publish(2))
    assert broker.end(signal.SIGTERM) == 0
    shutil.copytree(log, copy)
    broker.start()
    run(story())


def test_a_newer_database_of_the_same_principal_fences_the_older(broker: Any, site: Any) -> None:
    learner = site("learner:l1")
    broker.start()

    async def story() -> None:
        async with learner.client() as zombie:
            learner.accept("f/done/l1/")
            await zombie.drained(PATIENCE_S)
            old_database, old_outbox = learner.database, learner.outbox
            learner.open(learner.folder / "newer.db")
            async with learner.client() as newer:
                learner.accept("f/done/l1/")
                await newer.drained(PATIENCE_S)
            with closing(old_database):
                old_database.execute("begin")
                old_outbox.append("f/done/l1/", TaskFailed(task_id="t", learner="l1"))
                old_database.execute("commit")
                with pytest.raises(Fenced, match="publishes from a newer database elsewhere"):
                    await zombie.drained(PATIENCE_S)

    run(story())
    assert broker.log("f") == [("learner:l1", 1), ("learner:l1", 1)]
