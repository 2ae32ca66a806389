"""More connections than there can be, and all of them back at once."""

from __future__ import annotations

import os
import random
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq
from client_stories import PATIENCE_S, run, until

from metisfl.deploy.curve import secure_client
from metisfl.deploy.keys import Identity
from metisfl.proto import frames
from metisfl.proto.events_pb2 import Hello

DESCRIPTORS = 64
IDLE = 200
CLIENTS = 1000
EACH = 8  # descriptors of one client and its connection, at the most


@contextmanager
def idle_connections(endpoint: str, count: int) -> Iterator[None]:
    """Connections on which nothing is ever said; the last ones only the kernel knows of."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    connections = [socket.socket() for _ in range(count)]
    try:
        for one in connections:
            one.setblocking(False)
            one.connect_ex((host, int(port)))
        yield
    finally:
        for one in connections:
            one.close()


def test_a_broker_without_a_free_descriptor_serves_who_is_there_and_later_everybody(
    broker: Any, site: Any
) -> None:
    there, later = site("learner:l1"), site("learner:l2")
    broker.start()
    descriptors = Path(f"/proc/{broker.process.pid}/fd")

    async def story() -> None:
        async with there.client() as client:
            there.accept("f/done/l1/")
            await client.drained(PATIENCE_S)
            resource.prlimit(broker.process.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
            with idle_connections(broker.ingress, IDLE):
                await until(lambda: len(os.listdir(descriptors)) == DESCRIPTORS)
                there.accept("f/done/l1/")
                await client.drained(PATIENCE_S)
            async with later.client() as newcomer:
                later.accept("f/done/l2/")
                await newcomer.drained(PATIENCE_S)
            there.accept("f/done/l1/")
            await client.drained(PATIENCE_S)

    run(story())
    wanted = [("learner:l1", 1), ("learner:l1", 2), ("learner:l2", 1), ("learner:l1", 3)]
    assert broker.log("f") == wanted
    assert broker.end(signal.SIGTERM) == 0, broker.said()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as a crowd needs, here and in the broker that is started from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CLIENTS * EACH
    assert hard == resource.RLIM_INFINITY or hard >= wanted, (
        f"{wanted} open files are needed, {hard} allowed: ulimit -Hn {wanted}"
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Crowd:
    """Bare clients with keys of their own; one loop greets the broker for all of them."""

    def __init__(self, broker: Any, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._poller = zmq.Poller()
        lines = []
        for number in range(CLIENTS):
            public, secret = zmq.curve_keypair()
            identity = Identity(f"learner:l{number}", public, secret)
            lines.append(f"{identity.principal} {public.decode()}\n")
            self._connect(broker, context, identity)
        (broker.keys / "peers").write_text("".join(lines))

    def _connect(
        self, broker: Any, context: zmq.Context[zmq.Socket[bytes]], identity: Identity
    ) -> None:
        dealer = context.socket(zmq.DEALER)
        dealer.linger = 0
        secure_client(
            dealer,
            public=identity.public,
            secret=identity.secret,
            server_public=broker.identity.public,
        )
        dealer.setsockopt(zmq.IMMEDIATE, 1)  # each connection begins anew
        dealer.setsockopt(zmq.PROBE_ROUTER, 1)  # the broker answers it with "say hello"
        dealer.setsockopt(zmq.RECONNECT_IVL, random.randint(50, 150))
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 300)
        dealer.connect(broker.ingress)
        self._poller.register(dealer, zmq.POLLIN)

    def greet(self) -> int:
        """Say hello whenever asked to; return how many are welcomed, once it is all of them.

        Or fewer, when nothing has come for a long time.
        """
        welcomed: set[object] = set()
        while len(welcomed) < CLIENTS:
            ready = self._poller.poll(PATIENCE_S * 1000)
            if not ready:
                break
            for dealer, _ in ready:
                assert isinstance(dealer, zmq.Socket)
                message = dealer.recv_multipart()
                if message[0] == frames.WELCOME:
                    welcomed.add(dealer)
                else:
                    hello = Hello(protocol=frames.PROTOCOL, software="raw", epoch=1)
                    dealer.send_multipart(frames.pack_hello(hello))
        return len(welcomed)


@pytest.mark.chaos
def test_a_crowd_is_back_when_the_broker_is(broker: Any, many_descriptors: None) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, CLIENTS + 10)
    try:
        crowd = Crowd(broker, context)
        broker.start()
        assert crowd.greet() == CLIENTS, broker.said()
        broker.end(signal.SIGKILL)
        broker.start()
        assert crowd.greet() == CLIENTS, broker.said()
    finally:
        context.destroy(linger=0)
    with closing(socket.socket()) as probe:
        host, _, port = broker.ingress.removeprefix("tcp://").rpartition(":")
        probe.connect((host, int(port)))  # it still listens
    assert broker.end(signal.SIGTERM) == 0, broker.said()
