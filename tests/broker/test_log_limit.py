"""A real broker whose log is trimmed: who reads, who publishes, who asks how it is."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from client_stories import PATIENCE_S, read, run, soon, until

from metisfl.broker.client import Batch, BrokerClient, BrokerStatus
from metisfl.proto.errors import MachineError, UserError

TOPIC = "f/done/l1/"
BIG = "x" * 1900
LIMIT = ["--log-limit", "2MiB"]


def advance(site: Any, lane: str, through: int) -> None:
    with site.database:
        site.database.execute("begin")
        site.outbox.advance(lane, through)


async def publish(site: Any, client: BrokerClient, count: int) -> None:
    while count:
        some = min(count, await soon(client.room()))
        site.accept(*[TOPIC] * some, reason=BIG)
        client.flush()
        count -= some
    await client.drained(PATIENCE_S)


async def told(client: BrokerClient, holds: Callable[[BrokerStatus], bool]) -> BrokerStatus:
    """Ask until the answer is as expected."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not holds(status := await client.status(PATIENCE_S)):
        assert asyncio.get_running_loop().time() < deadline, f"it stays like this: {status}"
        await asyncio.sleep(0.1)
    return status


def test_a_log_at_its_limit_stops_publishers_until_its_controller_has_read_on(
    broker: Any, site: Any
) -> None:
    learner, controller = site("learner:l1"), site("controller")
    broker.options = LIMIT
    broker.start()

    async def story() -> int:
        async with learner.client() as publisher, controller.client() as reader:
            feed = reader.records("f/")
            publishing = asyncio.ensure_future(publish(learner, publisher, 2000))
            status = await told(reader, lambda status: status.full_since_unix_ns > 0)
            assert "controller of federation f has read nothing yet" in status.full_reason
            assert "may take 2097152 (--log-limit)" in status.full_reason
            assert status.events_refused["log_limit"] > 0
            assert status.events_refused["full_disk"] == status.floor == 0
            assert status.events_stored == status.head == len(broker.log("f")) < 2000
            assert status.log_bytes <= 2 * status.log_limit_bytes
            read_to = 0
            while read_to < 2000:
                batch = await soon(feed.__anext__())
                assert batch.trimmed_to == 0, "a controller misses nothing"
                assert [record.sequence for record in batch.records] == list(
                    range(read_to + 1, read_to + 1 + len(batch.records))
                )
                read_to += len(batch.records)
                advance(controller, "f/", batch.through)
            await publishing
            status = await told(reader, lambda status: not status.full_since_unix_ns)
            assert 0 < status.floor < status.head == 2000
            return status.floor

    floor = run(story())
    assert "the controller of federation f has read nothing yet" in broker.said()
    assert "events are stored again" in broker.said()
    assert broker.end(signal.SIGTERM) == 0
    kept = [sequence for _, sequence in broker.log("f")]
    assert kept == list(range(2001 - len(kept), 2001))
    assert len(kept) <= 2000 - floor
    checked = subprocess.run([*broker.command(), "--check"], capture_output=True, text=True)
    assert checked.returncode == 0
    assert f"is whole: {len(kept)} events, behind {2000 - len(kept)} that were trimmed" in (
        checked.stdout
    )


def test_a_reader_behind_the_floor_is_not_stuck_and_is_told(broker: Any, site: Any) -> None:
    learner, controller, driver = site("learner:l1"), site("controller"), site("driver:d")
    broker.options = LIMIT
    broker.start()

    async def first() -> Batch:
        async with driver.client() as late:
            return await soon(late.records("f/").__anext__())

    async def story() -> None:
        async with learner.client() as publisher, controller.client() as reader:
            feed = reader.records("f/")
            await publish(learner, publisher, 100)
            await read(feed, 100)
            assert (await first()).trimmed_to == 0, "nothing was trimmed yet"
            advance(controller, "f/", 100)
            await publish(learner, publisher, 500)
            status = await told(reader, lambda status: status.floor > 0)
            assert status.floor <= 100, "no further than the controller has read"
            batch = await first()
            assert batch.trimmed_to == status.floor
            sequences = [record.sequence for record in batch.records]
            assert sequences == list(range(status.floor + 1, batch.through + 1))

    run(story())
    advance(driver, "f/", 150)

    async def again() -> None:
        batch = await first()
        assert batch.trimmed_to == 0, "it had read what is gone"
        assert batch.records[0].sequence == 151

    run(again())


def test_a_federation_that_is_given_up_makes_room(broker: Any, site: Any) -> None:
    learner, driver = site("learner:l1"), site("driver:d")
    broker.options = LIMIT
    broker.start()

    async def fill() -> None:
        async with learner.client() as publisher, driver.client() as asking:
            publishing = asyncio.ensure_future(publish(learner, publisher, 2000))
            status = await told(asking, lambda status: status.full_since_unix_ns > 0)
            assert "`metisfl-broker --give-up f`" in status.full_reason
            publishing.cancel()
            await asyncio.wait([publishing])

    run(fill())
    assert broker.end(signal.SIGTERM) == 0
    gave_up = subprocess.run([*broker.command(), "--give-up", "f"], capture_output=True, text=True)
    assert gave_up.returncode == 0, gave_up.stderr
    assert "for the controller of f any more" in gave_up.stdout
    broker.start()

    async def drain() -> None:
        async with learner.client() as publisher:
            await publisher.drained(PATIENCE_S)

    run(drain())


def test_a_full_disk_is_counted_and_told_with_its_beginning(broker: Any, site: Any) -> None:
    learner, driver = site("learner:l1"), site("driver:d")
    broker.start()

    async def story() -> None:
        async with learner.client() as publisher, driver.client() as asking:
            await publish(learner, publisher, 1)
            calm = await asking.status(PATIENCE_S)
            assert calm.full_since_unix_ns == sum(calm.events_refused.values()) == 0
            assert (calm.full_reason, calm.events_stored, calm.head) == ("", 1, 1)
            assert calm.connections == {"learner:l1": 1, "driver:d": 1}
            assert calm.disk_free_bytes > 0
            pid = broker.process.pid
            unlimited = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
            publishing = asyncio.ensure_future(publish(learner, publisher, 200))
            full = await told(asking, lambda status: status.full_since_unix_ns > 0)
            assert full.full_since_unix_ns > calm.incarnation
            assert "make room on that disk" in full.full_reason
            assert full.events_refused["full_disk"] > 0
            assert full.events_refused["log_limit"] == 0
            resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
            await publishing
            while (await asking.status(PATIENCE_S)).full_since_unix_ns:
                await publish(learner, publisher, 1)

    run(story())


def test_a_learner_may_not_ask_and_goes_on(shared: Any) -> None:
    learner = shared.learner()

    async def story() -> None:
        async with learner.client() as client:
            with pytest.raises(UserError, match=f"{learner.identity.principal} may not ask"):
                await client.status(PATIENCE_S)
            learner.accept(f"f/done/{learner.name}/")
            await client.drained(PATIENCE_S)

    run(story())


def test_a_question_waits_for_a_broker_that_is_away(broker: Any, site: Any) -> None:
    driver = site("driver:d")

    async def story() -> None:
        async with driver.client() as client:
            with pytest.raises(MachineError, match=r"did not tell its status within 0\.1 s"):
                await client.status(0.1)
            asking = asyncio.ensure_future(client.status(PATIENCE_S))
            await asyncio.to_thread(broker.start)
            assert (await asking).head == 0
            asking = asyncio.ensure_future(client.status(PATIENCE_S))
            await until(lambda: asking.done())
            broker.end()
            unanswered = asyncio.ensure_future(client.status(PATIENCE_S))
            await asyncio.sleep(0)
        with pytest.raises(ValueError, match="the client is closed"):
            await unanswered

    run(story())


@pytest.mark.parametrize("limit", ["1", "1023KiB", "-5MiB", "much", "5 parsecs", "9" * 30 + "MiB"])
def test_a_limit_that_is_none_is_the_users_mistake(broker: Any, limit: str) -> None:
    refused = subprocess.run(
        [*broker.command(), f"--log-limit={limit}"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "cannot be; say at least 1MiB" in refused.stderr
