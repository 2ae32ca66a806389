"""A real broker and peers without measure: they cost it little, and others do not notice."""

from __future__ import annotations

import asyncio
from typing import Any

import zmq
from client_stories import PATIENCE_S, run, until
from raw_ingress import answer, envelope, publish, still_serves
from resident import resident_bytes

from metisfl.broker.client import BrokerStatus
from metisfl.broker.session import OUTSTANDING_BYTES_MAX, PUBLISHES_BURST
from metisfl.proto import frames
from metisfl.proto.events_pb2 import Hello
from metisfl.proto.frames import Ack, Busy, Fetch, FetchedBatch

EVENTS, EVENT_BYTES = 300, 190 * 1024
SLACK_BYTES = 24 * 1024 * 1024
"""What the allocator holds, and an answer that is being made."""


class Stubborn:
    """Sockets that take one message and leave the rest where it is."""

    def __init__(self, sockets: Any) -> None:
        self._sockets = sockets

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._sockets.socket(kind)
        made.rcvhwm = 1
        made.setsockopt(zmq.RCVBUF, 64 * 1024)
        return made


def fill(controller: Any, sockets: Any) -> None:
    """Some 56 MB for learner l1, from a controller."""
    dealer = controller.greeted(sockets)
    for sequence in range(1, EVENTS + 1):
        data = envelope("controller", sequence, "f/task/l1/", payload=bytes(EVENT_BYTES))
        dealer.send_multipart(publish(data))
        while sequence % 20 == 0 and answer(dealer) != Ack(1, sequence):
            pass


def read_all(reader: Any, sockets: Any) -> None:
    """Read everything as one should, so that the broker has done all of it once."""
    dealer, after, receipt = reader.greeted(sockets), 0, 0
    while after < EVENTS:
        dealer.send_multipart(frames.pack_fetch(Fetch(1, after, 256, "f/", receipt)))
        batch = answer(dealer)
        assert isinstance(batch, FetchedBatch), f"an honest reader was put off: {batch}"
        after, receipt = batch.through, batch.receipt
    dealer.close()


async def told(site: Any, holds: Any) -> BrokerStatus:
    """Ask the broker how it is until it says so."""
    async with site.client() as client:
        for _ in range(200):
            status = await client.status(PATIENCE_S)
            if holds(status):
                return status
            await asyncio.sleep(0.1)
    raise AssertionError(f"it stays like this: {status}")


def test_who_fetches_and_never_reads_costs_eight_mebibytes_a_connection(
    broker: Any, site: Any, sockets: Any
) -> None:
    controller, hostile, watcher = site("controller"), site("driver:h"), site("driver:w")
    others = [site(f"learner:l{number}") for number in range(2)]
    broker.start()
    fill(controller, sockets)
    read_all(watcher, sockets)
    before = resident_bytes(broker.process.pid)
    connections, fetches = 3, 500
    dealers = [hostile.greeted(Stubborn(sockets)) for _ in range(connections)]
    for number in range(fetches):
        for dealer in dealers:
            dealer.send_multipart(frames.pack_fetch(Fetch(number, 0, 256, "f/", number)))
        if number == fetches // 2:
            still_serves(others[0], "f/done/l0/", sockets)
    # An answer for which the socket has no room is not owed, and another fetch takes its place.
    asked = connections * (fetches - 2 * frames.FETCHES_MAX)
    bound = connections * OUTSTANDING_BYTES_MAX + SLACK_BYTES

    def over(status: BrokerStatus) -> bool:
        grown.append(resident_bytes(broker.process.pid) - before)
        return grown[-1] > bound or status.requests_refused["fetch_held"] >= asked

    grown: list[int] = []
    status = run(told(watcher, over))
    assert grown[-1] < bound, (
        f"{grown[-1] >> 20} MiB for {connections} connections; at most {bound >> 20}"
    )
    assert status.offenders["driver:h"] >= asked
    assert "driver:w" not in status.offenders
    still_serves(others[1], "f/done/l1/", sockets)

    dealer = dealers[0]
    batches = [reply for reply in map(frames.parse_reply, drained(dealer)) if is_batch(reply)]
    assert 1 <= len(batches) <= frames.FETCHES_MAX
    dealer.send_multipart(frames.pack_fetch(Fetch(7, 0, 256, "f/", batches[-1].receipt)))
    assert isinstance(answer(dealer), FetchedBatch), "whoever reads on is served on"


def drained(dealer: zmq.Socket[bytes]) -> list[list[bytes]]:
    """All that came: it ends with a word on the last fetch."""
    messages = [dealer.recv_multipart()]
    while dealer.poll(1000):
        messages.append(dealer.recv_multipart())
    return messages


def is_batch(reply: frames.Reply) -> bool:
    assert isinstance(reply, FetchedBatch | Busy), reply
    return isinstance(reply, FetchedBatch)


def test_who_publishes_too_fast_waits_and_loses_nothing_while_others_go_on(
    broker: Any, site: Any
) -> None:
    eager, calm, watcher = site("learner:eager"), site("learner:calm"), site("driver:w")
    broker.start()
    total = int(PUBLISHES_BURST) + 400

    async def story() -> BrokerStatus:
        async with eager.client() as client, calm.client() as other:
            eager.accept(*["f/done/eager/"] * total)
            client.flush()
            await until(lambda: eager.outbox.acked >= total - 400)
            calm.accept("f/done/calm/")
            await other.drained(PATIENCE_S)
            assert eager.outbox.acked < total, "it was held to no rate"
            await client.drained(PATIENCE_S)
        return await told(watcher, lambda status: True)

    status = run(story())
    eagers = [number for name, number in broker.log("f") if name == "learner:eager"]
    assert eagers == list(range(1, total + 1))
    assert status.events_refused["rate_limited"] > 0
    assert set(status.offenders) == {"learner:eager"}
    assert "learner:eager publishes over 200 events a second" in broker.said()


def test_a_flood_of_connections_of_one_principal_is_cut_short(
    broker: Any, site: Any, sockets: Any
) -> None:
    hostile, other, watcher = site("learner:h"), site("learner:other"), site("driver:w")
    broker.start()
    hello = frames.pack_hello(Hello(protocol=frames.PROTOCOL, software="raw", epoch=1))
    for _ in range(60):
        dealer = hostile.raw(sockets, zmq.DEALER)
        for _ in range(20):
            dealer.send_multipart(hello)
    still_serves(other, "f/done/other/", sockets)
    status = run(told(watcher, lambda status: status.requests_refused["connection"] > 500))
    assert status.connections["learner:h"] <= 8
    assert status.connections["learner:other"] == 1


def test_a_forger_is_told_to_the_operator_with_both_names(
    broker: Any, site: Any, sockets: Any
) -> None:
    forger, watcher = site("learner:forger"), site("driver:w")
    broker.start()
    dealer = forger.greeted(sockets)
    dealer.send_multipart(publish(envelope("learner:victim", 1, "f/done/victim/")))
    assert isinstance(answer(dealer), frames.Reject)
    said = "an event of 'learner:victim' came from learner:forger"
    status = run(told(watcher, lambda status: said in broker.said()))
    (line,) = [line for line in broker.said().splitlines() if said in line]
    assert '"who": "learner:forger"' in line
    assert status.events_refused["forged"] == 1
    assert status.offenders == {"learner:forger": 1}
