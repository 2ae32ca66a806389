"""What the broker promises, where processes are killed and stopped: see "Guarantees" in its guide.

That an acknowledged event is on disk is in test_outages.py, with the broker killed.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from client_stories import PATIENCE_S, read, run, until
from resident import resident_bytes

from metisfl.broker.client import BrokerClient, Record
from metisfl.broker.doors import LIVE_SEND_HWM

TOPIC = "f/done/l1/"


class Subscriber:
    """A site whose reader is a process."""

    def __init__(self, site: Any, lane: str = "f/") -> None:
        self._site, self._lane = site, lane
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        broker = self._site.broker
        script = Path(__file__).with_name("subscriber.py")
        server = broker.identity.public.decode()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", str(script), str(self._site.folder)),
                *(broker.ingress, broker.live, server, self._lane),
            ],
            stdout=subprocess.PIPE,
        )

    def is_up(self) -> bool:
        """Wait until it has caught up."""
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline() == b"up\n"

    def send(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def seen(self) -> list[int]:
        """What came to it, whatever became of it."""
        path = self._site.folder / "seen"
        lines = path.read_text().split("\n") if path.exists() else []
        return [int(line) for line in lines if line]

    def effects(self) -> list[int]:
        """What it did, in order."""
        path = self._site.folder / "effects.db"
        if not path.exists():
            return []
        with closing(sqlite3.connect(path)) as database:
            if not database.execute("select 1 from sqlite_master where name = 'effect'").fetchone():
                return []
            rows = database.execute("select sequence from effect order by rowid").fetchall()
        return [sequence for (sequence,) in rows]


@pytest.fixture
def subscriber(site: Any) -> Iterator[Subscriber]:
    """The process of driver d; it ends with the test."""
    subscriber = Subscriber(site("driver:d"))
    yield subscriber
    subscriber.kill()


async def publish(site: Any, client: BrokerClient, count: int, topic: str = TOPIC) -> None:
    while count:
        some = min(count, await client.room(), 25)
        site.accept(*[topic] * some)
        client.flush()
        count -= some
    await client.drained(PATIENCE_S)


def test_all_readers_of_a_federation_see_one_order_without_holes(broker: Any, site: Any) -> None:
    learners = [site(f"learner:l{number}") for number in range(1, 4)]
    readers = [site("controller"), site("driver:d")]
    broker.start()
    each = 400

    async def publishes(learner: Any) -> None:
        async with learner.client() as client:
            await publish(learner, client, each, f"f/done/{learner.name}/")

    async def reads(reader: Any) -> list[Record]:
        async with reader.client() as client:
            return await read(client.records("f/"), len(learners) * each)

    async def story() -> list[list[Record]]:
        reading = [asyncio.ensure_future(reads(reader)) for reader in readers]
        await asyncio.gather(*map(publishes, learners))
        return list(await asyncio.gather(*reading))

    first, second = run(story())
    assert first == second, "two readers saw two orders"
    assert [record.sequence for record in first] == list(range(1, len(learners) * each + 1))
    logged = broker.log("f")
    assert [record.publisher for record in first] == [publisher for publisher, _ in logged]
    for learner in learners:
        own = [sequence for name, sequence in logged if name == learner.identity.principal]
        assert own == list(range(1, each + 1)), f"{learner.name}'s own order was not kept"


def test_a_subscriber_that_is_killed_sees_everything_and_does_it_once(
    broker: Any, site: Any, subscriber: Subscriber
) -> None:
    """Both are killed, over and over, at any moment: broker and subscriber."""
    learner = site("learner:l1")
    broker.start()
    subscriber.start()
    total, luck = 3000, random.Random(7)

    async def trouble() -> None:
        for part in range(1, 7):
            goal = part * total // 8 + luck.randrange(total // 20)
            await until(lambda goal=goal: learner.outbox.acked >= goal)
            subscriber.kill()
            if part % 2:
                await asyncio.to_thread(broker.end)
                await asyncio.to_thread(broker.start)
            subscriber.start()

    async def story() -> None:
        async with learner.client() as client:
            troubling = asyncio.ensure_future(trouble())
            await publish(learner, client, total)
            await troubling
        await until(lambda: len(subscriber.effects()) >= total)

    run(story())
    assert subscriber.effects() == list(range(1, total + 1)), "each once, in order, none left out"
    assert set(subscriber.seen()) == set(range(1, total + 1))


# ---- A subscriber that is stopped ------------------------------------------------------------

REASON = "\N{SNOWMAN WITHOUT SNOW}" * 2000
EVENT_BYTES = len(REASON.encode())
EVENTS = 8000
PHASES = 3
SLACK_BYTES = 16 * 1024 * 1024
"""Batches on their way to the disk, and what libzmq and the allocator hold."""
BOUND_BYTES = LIVE_SEND_HWM * (EVENT_BYTES + 1024) + SLACK_BYTES
assert EVENTS * EVENT_BYTES > 1.5 * BOUND_BYTES, "a queue without a bound would pass, too"


def test_a_stopped_subscriber_costs_bounded_memory_and_slows_nobody(
    broker: Any, site: Any, subscriber: Subscriber
) -> None:
    """It takes the live queue (2,048 messages) and no more, and others read half as fast at least.

    Times are compared within one run, in turns; the disk's moods are of the machine, so the best
    of three turns counts.
    """
    controller, driver = site("controller"), site("driver:r")
    broker.start()
    pid = broker.process.pid

    async def phase(client: BrokerClient, feed: Any, count: int = EVENTS) -> float:
        """Seconds until the other subscriber has read what is published now."""
        started = time.perf_counter()
        publishing = asyncio.ensure_future(publish_big(client, count))
        await read(feed, count)
        await publishing
        return time.perf_counter() - started

    async def publish_big(client: BrokerClient, count: int) -> None:
        while count:
            some = min(count, await client.room(), 100)
            controller.accept(*["f/task/l1/"] * some, reason=REASON)
            client.flush()
            count -= some

    async def story() -> None:
        async with controller.client() as client, driver.client() as reader:
            feed = reader.records("f/")
            ratios, growth = [], 0
            await phase(client, feed, EVENTS // 4)  # it warms up
            before = resident_bytes(pid)
            for _ in range(PHASES):
                alone_s = await phase(client, feed)
                await asyncio.to_thread(subscriber.start)
                assert await asyncio.to_thread(subscriber.is_up)
                subscriber.send(signal.SIGSTOP)
                beside_s = await phase(client, feed)
                growth = max(growth, resident_bytes(pid) - before)
                subscriber.kill()
                ratios.append(alone_s / beside_s)
                if ratios[-1] >= 0.5:
                    break
            assert max(ratios) >= 0.5, f"beside a stopped subscriber the pace fell to {ratios}"
            assert growth < BOUND_BYTES, f"{growth >> 20} MiB; at most {BOUND_BYTES >> 20}"

    asyncio.run(asyncio.wait_for(story(), 110))
