"""service.py and loop.py: a real broker process, its wire byte by byte, its beginning and end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import zmq
from raw_ingress import answer, envelope, publish, still_serves

from metisfl.broker import service
from metisfl.broker.doors import Context, Doors
from metisfl.deploy.curve import secure_server
from metisfl.deploy.keys import Identity
from metisfl.proto import frames
from metisfl.proto.frames import (
    Ack,
    CursorReport,
    Fetch,
    FetchedBatch,
    Head,
    SayHello,
)

PATIENCE_S = 20.0  # never waited for in a test that passes


# ---- The wire, byte by byte ---------------------------------------------------------------


def test_a_record_is_the_same_live_and_fetched(shared: Any, sockets: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"
    live = shared.controller.raw(sockets, zmq.SUB)
    live.subscribe(b"hb/")
    link = frames.parse_live(live.recv_multipart())
    assert isinstance(link, Head)
    assert link.link_up, "the first message tells that the link is up"
    live.subscribe(f"{f}/".encode())
    assert isinstance(frames.parse_live(live.recv_multipart()), Head), "and a head follows"
    live.unsubscribe(b"hb/")

    data = envelope(learner.identity.principal, 1, topic, payload=b"what it is about")
    dealer = learner.greeted(sockets)
    dealer.send_multipart(publish(data))
    assert answer(dealer) == Ack(1, 1)
    message = live.recv_multipart()
    while message[0].startswith(b"hb/"):
        message = live.recv_multipart()
    record = frames.parse_live(message)
    assert isinstance(record, frames.RawRecord)
    assert (record.topic, record.envelope) == (topic.encode(), data), "byte for byte"
    assert record.header.previous_in_topic == record.header.previous_in_federation == 0
    assert record.header.incarnation == link.incarnation
    assert abs(record.header.logged_unix_ns - time.time_ns()) < 60e9

    reader = shared.controller.greeted(sockets)
    reader.send_multipart(frames.pack_fetch(Fetch(5, 0, 256, f"{f}/")))
    sequence = record.header.sequence
    fetched = answer(reader)
    assert isinstance(fetched, FetchedBatch)
    assert fetched.receipt
    assert fetched == FetchedBatch(5, sequence, sequence, 0, (record,), fetched.receipt)


def test_a_new_connection_is_asked_to_say_hello(shared: Any, sockets: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    dealer = learner.raw(sockets, zmq.DEALER)
    topic = f"{f}/done/{learner.name}/"
    dealer.send_multipart(publish(envelope(learner.identity.principal, 1, topic)))
    assert answer(dealer) == SayHello()
    still_serves(learner, topic, sockets)


def test_cursors_are_stored_for_the_operator(shared: Any, sockets: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    topic = f"{f}/done/{learner.name}/"
    dealer = learner.greeted(sockets)
    dealer.send_multipart(publish(envelope(learner.identity.principal, 1, topic)))
    assert answer(dealer) == Ack(1, 1)
    dealer.send_multipart(frames.pack_cursor(CursorReport(1, topic)))
    with closing(sqlite3.connect(shared.broker.home / "log" / "events.db")) as database:
        deadline = time.monotonic() + PATIENCE_S
        rows: list[Any] = []
        receipt = 0
        while not rows:
            assert time.monotonic() < deadline, "the cursor never came to the disk"
            dealer.send_multipart(frames.pack_fetch(Fetch(1, 0, 1, topic, receipt)))
            fetched = answer(dealer)  # a turn of the broker's loop
            receipt = fetched.receipt if isinstance(fetched, FetchedBatch) else receipt
            rows = database.execute(
                "select reader, sequence from cursor where lane = ?", (topic,)
            ).fetchall()
    assert rows == [(learner.identity.principal, 1)]


# ---- The process -------------------------------------------------------------------------------


def refused(broker: Any, *more: str) -> tuple[int, str]:
    ended = subprocess.run(
        [*broker.command(), *more], capture_output=True, text=True, timeout=PATIENCE_S
    )
    return ended.returncode, ended.stderr.strip()


def test_a_second_broker_on_the_same_folder_is_refused(broker: Any) -> None:
    broker.start()
    code, said = refused(broker)
    assert code == 3
    assert f"is in use by another broker, process {broker.process.pid}" in said
    assert said.count("\n") == 0, "one line, no traceback"


@pytest.mark.parametrize("option", ["ingress", "live"])
def test_a_port_in_use_is_named_with_a_remedy(broker: Any, option: str) -> None:
    endpoint = getattr(broker, option)
    with socket.create_server(("127.0.0.1", int(endpoint.rpartition(":")[2]))):
        code, said = refused(broker)
    assert code == 3
    assert f"{endpoint} cannot be bound: Address already in use" in said
    assert f"choose another endpoint with --{option}" in said


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1", "udp://127.0.0.1:1"])
def test_an_endpoint_that_is_none_is_the_users_mistake(broker: Any, endpoint: str) -> None:
    broker.ingress = endpoint
    code, said = refused(broker)
    assert code == 2
    assert f"--ingress {endpoint!r} cannot be bound" in said


def test_a_home_with_another_ones_key_is_refused(site: Any, broker: Any) -> None:
    learner = site("learner:l1")
    (broker.keys / "identity.key").unlink()
    (learner.folder / "identity.key").rename(broker.keys / "identity.key")
    code, said = refused(broker)
    assert code == 2
    assert "holds the key of 'learner:l1'" in said


def test_asked_to_end_it_ends_with_everything_in_its_place(
    broker: Any, site: Any, sockets: Any
) -> None:
    learner = site("learner:l1")
    broker.start()
    dealer = learner.greeted(sockets)
    for number in range(1, 101):
        dealer.send_multipart(publish(envelope("learner:l1", number, "f/done/l1/")))
    while answer(dealer) != Ack(1, 100):
        pass
    assert broker.end(signal.SIGTERM) == 0
    assert len(broker.log("f")) == 100
    left = {file.name for file in (broker.home / "log").iterdir()}
    assert left == {"events.db", "lock"}, "the write-ahead log is in the database"
    assert refused(broker, "--check") == (0, "")


def test_check_finds_damage(broker: Any, site: Any, sockets: Any) -> None:
    learner = site("learner:l1")
    broker.start()
    still_serves(learner, "f/done/l1/", sockets)
    assert broker.end(signal.SIGTERM) == 0
    with closing(sqlite3.connect(broker.home / "log" / "events.db")) as database, database:
        database.execute("update event set envelope = x'00'")
    for options in (["--check"], []):
        code, said = refused(broker, *options)
        assert code == 3
        assert "record 1 does not match its checksum" in said


def test_damage_while_it_runs_is_told_to_the_reader_and_stops_nobody_else(
    broker: Any, site: Any, sockets: Any
) -> None:
    learner, controller = site("learner:l1"), site("controller")
    broker.start()
    still_serves(learner, "f/done/l1/", sockets)
    with closing(sqlite3.connect(broker.home / "log" / "events.db")) as database, database:
        database.execute("update event set envelope = x'00'")
    reader = controller.greeted(sockets)
    reader.send_multipart(frames.pack_fetch(Fetch(7, 0, 1, "f/")))
    busy = answer(reader)
    assert isinstance(busy, frames.Busy)
    assert busy.request == 7
    assert "record 1 does not match its checksum" in busy.reason
    still_serves(controller, "f/task/l1/", sockets)
    assert "does not match its checksum" in broker.said()


def test_a_peer_that_is_added_is_let_in_without_a_restart(broker: Any, site: Any) -> None:
    broker.start()

    async def publish(newcomer: Any) -> None:
        async with newcomer.client() as client:
            newcomer.accept(f"f/done/{newcomer.name}/")
            await client.drained(PATIENCE_S)

    asyncio.run(publish(site("learner:new")))
    peers = broker.keys / "peers"
    good = peers.read_text()
    peers.write_text("not a list of peers\n")
    deadline = time.monotonic() + PATIENCE_S
    while "the list of peers stays as it was" not in broker.said():
        assert time.monotonic() < deadline, "a broken list is not told"
    peers.write_text(good)
    asyncio.run(publish(site("learner:newer")))
    assert broker.log("f") == [("learner:new", 1), ("learner:newer", 1)]


def test_nobody_is_let_in_when_the_authenticator_is_dead(
    tmp_path: Path, broker: Any, monkeypatch: pytest.MonkeyPatch, stop: Any
) -> None:
    monkeypatch.setattr(service, "Authenticator", Absent)
    monkeypatch.setattr(service, "SELF_TEST_S", 0.2)
    with pytest.raises(Exception, match="did not refuse an unknown key"):
        service.serve(broker.home, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0", stop)


class Absent:
    """An authenticator that was never there."""

    def __init__(self, *_: object, insecure: bool) -> None:
        assert not insecure

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def take_refusals(self) -> list[object]:
        return []


@pytest.fixture
def stop() -> Iterator[Any]:
    from metisfl.deploy.run import PollableStop

    stop = PollableStop()
    yield stop
    stop.close()


def test_no_socket_of_the_broker_has_heartbeats_and_all_have_bounds() -> None:
    identity = Identity("broker", *zmq.curve_keypair())
    context: Context = zmq.Context()
    anywhere = "tcp://127.0.0.1:0"
    doors = Doors(
        context,
        lambda socket: secure_server(socket, identity),
        ingress=anywhere,
        live=anywhere,
        head=Head(1, 0),
    )
    doors.reopen(Head(1, 0))
    for socket_ in (doors.ingress, doors.live):
        assert socket_.getsockopt(zmq.HEARTBEAT_IVL) == 0
        assert socket_.getsockopt(zmq.HEARTBEAT_TTL) == 0
        assert socket_.linger == 0
        assert 0 < int(socket_.getsockopt(zmq.MAXMSGSIZE)) <= 257 * 1024
        assert 0 < socket_.sndhwm <= 4096
        assert 0 < socket_.rcvhwm <= 4096
        assert socket_.getsockopt(zmq.TCP_KEEPALIVE) == 1
        assert socket_.getsockopt(zmq.HANDSHAKE_IVL) == 5000
        assert socket_.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1
        assert socket_.getsockopt(zmq.CURVE_SERVER) == 1
    context.destroy(linger=0)


def test_no_source_of_the_broker_names_heartbeats() -> None:
    folder = Path(service.__file__).parent
    for source in [*folder.rglob("*.py"), *(folder.parent / "proto").glob("*.py")]:
        assert "heartbeat_" not in source.read_text().lower(), f"{source} sets ZMTP heartbeats"
