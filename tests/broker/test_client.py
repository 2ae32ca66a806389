"""client.py against a real broker: publishing and reading, as it should be."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import zmq
from client_stories import PATIENCE_S, read, run, soon, until

from metisfl.broker.client import BrokerClient
from metisfl.proto.events import decode
from metisfl.proto.events_pb2 import Heartbeat, Progress, TaskFailed
from metisfl.proto.frames import Beat


def test_what_is_published_is_acknowledged_and_read(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"

    async def story() -> None:
        async with learner.client() as publisher, shared.controller.client() as reader:
            feed = reader.records(f"{f}/")
            first = await soon(feed.__anext__())
            assert (first.records, first.caught_up) == ((), True), "an empty lane says so"
            learner.accept(topic, reason="because")
            publisher.flush()
            (record,) = await read(feed, 1)
            assert (record.topic, record.publisher) == (topic, learner.identity.principal)
            assert decode(record.type, record.payload) == TaskFailed(
                task_id="t", learner="l1", reason="because"
            )
            await publisher.drained(PATIENCE_S)
            assert learner.outbox.acked == 1

    run(story())
    assert learner.outbox.rows(0, 9) == [], "tidied at the end"
    assert shared.broker.log(f) == [(learner.identity.principal, 1)]


def test_a_late_reader_gets_everything_from_the_beginning(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"

    async def story() -> None:
        async with learner.client() as publisher:
            learner.accept(*[topic] * 600)
            learner.accept(*[topic] * 10, reason="x" * 1900)
            publisher.flush()
            await publisher.drained(PATIENCE_S)
        async with shared.controller.client() as reader:
            feed = reader.records(f"{f}/")
            records = []
            while len(records) < 610:
                batch = await soon(feed.__anext__())
                records += batch.records
                assert batch.caught_up == (len(records) == 610)
            sequences = [record.sequence for record in records]
            assert sequences == sorted(set(sequences))
            assert batch.through >= sequences[-1]

    run(story())


def test_a_reader_goes_on_at_its_cursor(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    lane = f"{f}/"
    topic = f"{f}/done/{learner.name}/"

    async def story(expected: int) -> None:
        async with learner.client() as publisher, shared.controller.client() as reader:
            learner.accept(topic)
            publisher.flush()
            feed = reader.records(lane)
            (record,) = await read(feed, 1)
            assert expected in (0, record.sequence - 1) or record.sequence > expected
            with shared.controller.database as database:
                database.execute("begin")
                shared.controller.outbox.advance(lane, record.sequence)

    run(story(0))
    run(story(shared.controller.outbox.cursor(lane)))


def test_one_client_reads_several_lanes(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    mine, all_ = f"{f}/task/{learner.name}/", f"{f}/run/all/"

    async def story() -> None:
        async with learner.client() as reader, shared.controller.client() as publisher:
            tasks, rounds = reader.records(mine), reader.records(all_)
            shared.controller.accept(mine, all_, f"{f}/task/other/", mine)
            publisher.flush()
            assert [r.topic for r in await read(tasks, 2)] == [mine, mine]
            assert [r.topic for r in await read(rounds, 1)] == [all_]
            with pytest.raises(ValueError, match="has a reader already"):
                reader.records(mine)
            with pytest.raises(ValueError, match="federation/kind/subject/"):
                reader.records("f/task/l1")

    run(story())


def test_beats_are_heard_and_not_stored(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/beat/{learner.name}/"

    async def story() -> None:
        async with learner.client() as sender, shared.controller.client() as listener:
            beats = listener.beats(f"{f}/beat/")
            records = listener.records(f"{f}/")
            await soon(records.__anext__())
            await until(lambda: sender.connected)
            heartbeat = Heartbeat(learner=learner.name, state="idle")
            hearing = asyncio.ensure_future(beats.__anext__())
            while not hearing.done():  # until the subscription is up, beats are lost
                sender.beat(topic, heartbeat)
                await asyncio.wait([hearing], timeout=0.05)
            beat = hearing.result()
            assert beat == Beat(topic, "Heartbeat", heartbeat.SerializeToString())
            assert decode(beat.type, beat.payload) == heartbeat
            with pytest.raises(ValueError, match="fraction is 2"):
                sender.beat(topic, Progress(task_id="t", learner="a", state="s", fraction=2))

    run(story())
    assert shared.broker.log(f) == []


def test_an_open_transaction_is_never_sent(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"

    async def story() -> None:
        async with learner.client() as publisher:
            learner.accept(topic)
            await publisher.drained(PATIENCE_S)
            learner.database.execute("begin")
            learner.outbox.append(topic, TaskFailed(task_id="t", learner="l1"))
            with pytest.raises(ValueError, match="flush comes after the commit"):
                publisher.flush()
            learner.database.execute("rollback")
            await publisher.drained(PATIENCE_S)

    run(story())
    assert len(shared.broker.log(f)) == 1


def test_room_tells_how_much_the_window_takes(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"

    async def story() -> None:
        async with learner.client() as publisher:
            assert await publisher.room() == 256
            learner.accept(*[topic] * 300)
            publisher.flush()
            assert 0 < await soon(publisher.room()) <= 256
            await publisher.drained(PATIENCE_S)
            assert await publisher.room() == 256

    run(story())


def test_a_refused_event_is_told_and_the_next_ones_go_on(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    good, bad = f"{f}/done/{learner.name}/", f"{f}/done/somebody-else/"

    async def story() -> None:
        async with learner.client() as publisher:
            learner.accept(good, bad, good)
            await publisher.drained(PATIENCE_S)

    run(story())
    (rejected,) = learner.rejected
    assert (rejected.sequence, rejected.topic, rejected.type) == (2, bad, "TaskFailed")
    assert rejected.reason == f"{learner.identity.principal} may not publish under {bad!r}"
    assert [sequence for _, sequence in shared.broker.log(f)] == [1, 3]


def test_lost_live_messages_are_fetched(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"

    async def story() -> None:
        async with learner.client() as publisher, shared.controller.client() as reader:
            dropped = drop_records(reader, every=3)
            feed = reader.records(f"{f}/")
            await soon(feed.__anext__())
            for _ in range(20):
                learner.accept(*[topic] * 10)
                publisher.flush()
                await publisher.drained(PATIENCE_S)
            records = await read(feed, 200)
            assert dropped, "nothing was dropped: this test shows nothing"
            sequences = [record.sequence for record in records]
            assert sequences == sorted(set(sequences))

    run(story())


def test_a_lost_last_message_is_fetched_when_the_head_tells(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()

    async def story() -> None:
        async with learner.client() as publisher, shared.controller.client() as reader:
            feed = reader.records(f"{f}/")
            await soon(feed.__anext__())
            dropped = drop_records(reader, every=1)
            learner.accept(f"{f}/done/{learner.name}/")
            publisher.flush()
            await read(feed, 1)
            assert dropped

    run(story())


def drop_records(client: BrokerClient, every: int) -> list[list[bytes]]:
    """Lose every n-th record of the live socket, as a full queue would."""
    seen: list[list[bytes]] = []
    dropped: list[list[bytes]] = []
    handle = client._link._on_live

    def lossy(parts: list[bytes]) -> None:
        if len(parts) == 3:
            seen.append(parts)
            if len(seen) % every == 0:
                dropped.append(parts)
                return
        handle(parts)

    client._link._on_live = lossy
    return dropped


def test_a_reader_that_dawdles_gets_all_and_stops_nobody(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"

    async def story() -> None:
        async with learner.client() as publisher, shared.controller.client() as reader:
            feed = reader.records(f"{f}/")
            await soon(feed.__anext__())
            for _ in range(6):
                learner.accept(*[topic] * 500)
                await publisher.drained(PATIENCE_S)
            (lane, _) = reader._readers._lanes[f"{f}/"]
            assert len(lane.ready) <= 1024 + 256
            records = await read(feed, 3000)
            sequences = [record.sequence for record in records]
            assert sequences == sorted(set(sequences))

    run(story())


def test_a_closed_client_ends_its_feeds(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()

    async def story() -> None:
        async with learner.client() as client:
            feed = client.records(f"{f}/run/all/")
            await soon(feed.__anext__())
            reading = asyncio.ensure_future(feed.__anext__())
            await asyncio.sleep(0)
        with pytest.raises(StopAsyncIteration):
            await soon(reading)
        async for _ in feed:
            raise AssertionError("a closed feed gave something")

    run(story())


def test_a_feed_has_one_reader(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()

    async def story() -> None:
        async with learner.client() as client:
            feed = client.records(f"{f}/run/all/")
            await soon(feed.__anext__())
            reading = asyncio.ensure_future(feed.__anext__())
            await asyncio.sleep(0)
            with pytest.raises(ValueError, match="one reader"):
                await feed.__anext__()
            reading.cancel()

    run(story())


def test_an_error_while_reading_ends_the_client_with_it(shared: Any) -> None:
    learner, f = shared.learner(), shared.federation()

    async def story() -> None:
        async with learner.client() as client:
            feed = client.records(f"{f}/done/other/")
            for attempt in (feed.__anext__, client.room):
                with pytest.raises(Exception, match=f"may not read '{f}/done/other/'"):
                    await soon(attempt())
            with pytest.raises(Exception, match="may not read"):
                client.flush()
            assert not client.connected

    run(story())


def test_no_socket_of_a_client_has_heartbeats(shared: Any) -> None:
    async def story() -> None:
        async with shared.learner().client() as client:
            for socket in (client._link._dealer, client._link._sub):
                assert socket is not None
                assert socket.getsockopt(zmq.HEARTBEAT_IVL) == 0
                assert socket.getsockopt(zmq.HEARTBEAT_TTL) == 0
                assert socket.linger == 0
                assert 0 < int(socket.getsockopt(zmq.MAXMSGSIZE)) <= 257 * 1024
                assert socket.getsockopt(zmq.TCP_KEEPALIVE) == 1

    run(story())
