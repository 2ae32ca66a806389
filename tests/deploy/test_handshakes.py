"""Who does not get in is counted and named; who does is neither, whatever else goes on."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import zmq

from metisfl.deploy import handshakes
from metisfl.deploy.curve import Authenticator, secure_client, secure_server
from metisfl.deploy.handshakes import OTHERS, UNKNOWN, Handshakes, Monitors
from metisfl.deploy.keys import Identity

ACCEPTED, DISCONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_DISCONNECTED)
SUCCEEDED = int(zmq.EVENT_HANDSHAKE_SUCCEEDED), 0
FAILED = int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL), 11
PROTOCOL = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL), 1
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH), 400
PATIENCE_S = 20.0  # never waited for in a test that passes


def told(*turns: list[tuple[int, int]], gap_s: float = 0.1) -> dict[str, int]:
    """What is told of these events, which come in so many turns, of connections from 10.0.0.FD."""
    seen = Handshakes()
    for number, events in enumerate(turns):
        seen.take(events, lambda fd: f"10.0.0.{fd}", number * gap_s)
    found = dict(seen.told())
    assert sum(found.values()) == seen.failed
    assert seen.told() == [], "nothing is told twice"
    return found


@pytest.mark.parametrize("failure", [[FAILED], [PROTOCOL], []], ids=["silence", "no key", "noise"])
def test_who_ends_before_it_is_let_in_is_named(failure: list[tuple[int, int]]) -> None:
    assert told([(ACCEPTED, 7)], [*failure, (DISCONNECTED, 7)]) == {"10.0.0.7": 1}


def test_who_is_let_in_may_go_at_once_and_is_not_named() -> None:
    assert told([(ACCEPTED, 7), SUCCEEDED], [(DISCONNECTED, 7)]) == {}


def test_who_is_let_in_among_strangers_is_not_named_and_those_that_fail_are() -> None:
    strangers = [(ACCEPTED, 8), (ACCEPTED, 9)]
    ends = [(DISCONNECTED, 7), FAILED, (DISCONNECTED, 8), FAILED, (DISCONNECTED, 9)]
    found = told([(ACCEPTED, 7), *strangers], [SUCCEEDED], ends)
    assert found == {"10.0.0.8": 1, "10.0.0.9": 1}


def test_a_connection_that_was_there_for_long_is_not_named_for_the_failure_of_another() -> None:
    failing = [FAILED, (DISCONNECTED, 7)]
    assert "10.0.0.7" not in told([(ACCEPTED, 7)], [SUCCEEDED], [], failing, gap_s=10)
    assert told([(ACCEPTED, 7)], [], [(DISCONNECTED, 7)], gap_s=10) == {}


def test_a_refused_key_is_left_to_the_authenticator() -> None:
    assert told([(ACCEPTED, 7), REFUSED, (DISCONNECTED, 7)]) == {}


def test_nobody_is_named_for_a_number_that_was_another_s() -> None:
    gone = [(ACCEPTED, 7), (DISCONNECTED, 7)]
    assert told([*gone, (ACCEPTED, 7), SUCCEEDED]) == {UNKNOWN: 1}


def test_a_crowd_of_strangers_costs_a_few_lines() -> None:
    seen = Handshakes()
    for number in range(20_000):
        seen.take(
            [(ACCEPTED, number), (DISCONNECTED, number)],
            lambda fd: str(fd),
            0.0,
        )
    lines = seen.told()
    assert len(lines) <= handshakes.ADDRESSES_TOLD_MAX + 1
    assert dict(lines)[OTHERS] > 19_000
    assert sum(times for _, times in lines) == 20_000


class Door:
    """A guarded socket whose monitor is polled as in a server's loop."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.server = Identity("broker", *zmq.curve_keypair())
        self.ada = Identity("learner:ada", *zmq.curve_keypair())
        self.authenticator = Authenticator(self.context, {self.ada.public: "learner:ada"})
        self.authenticator.start()
        self.socket = self.context.socket(zmq.ROUTER)
        secure_server(self.socket, self.server)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, 300)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.monitors = Monitors(self.poller)
        self.monitors.open(self.socket)
        self.said: dict[str, int] = {}
        self.messages = 0

    def until(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, f"{what}: {self.said}"
            ready = dict(self.poller.poll(20))
            self.monitors.drain(ready, time.monotonic())
            if self.socket in ready:
                self.socket.recv_multipart()
                self.messages += 1
            for address, times in self.monitors.told():
                self.said[address] = self.said.get(address, 0) + times

    def total(self) -> int:
        return sum(self.said.values())

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)

    def greet(self) -> None:
        """One message by who has a key."""
        before = self.messages
        with self.context.socket(zmq.DEALER) as dealer:
            secure_client(
                dealer,
                public=self.ada.public,
                secret=self.ada.secret,
                server_public=self.server.public,
            )
            dealer.connect(f"tcp://127.0.0.1:{self.port}")
            dealer.send(b"x")
            self.until(lambda: self.messages > before, "no message came")

    def close(self) -> None:
        self.monitors.close()
        self.authenticator.stop()
        self.context.destroy(linger=0)


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door()
    yield door
    door.close()


def test_who_connects_and_says_nothing_is_named_when_its_time_is_over(door: Door) -> None:
    with door.connect():
        door.until(lambda: door.said == {"127.0.0.1": 1}, "silence is not named")


def test_noise_is_counted_and_named_if_it_lasts_for_a_moment(door: Door) -> None:
    with door.connect() as noise:
        door.monitors.drain(dict(door.poller.poll(1000 * PATIENCE_S)), time.monotonic())
        noise.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(500))
        door.until(lambda: door.said == {"127.0.0.1": 1}, "noise is not named")


def test_who_has_a_key_is_let_in_and_goes_without_being_counted(door: Door) -> None:
    for _ in range(3):
        door.greet()
    with door.connect():
        door.until(lambda: door.total() > 0, "the last one is not told")
    assert door.total() == 1
    assert door.authenticator.let_in() == {"learner:ada": 3}
    assert door.authenticator.let_in(with_invited=True) == {}


def test_a_flood_that_nobody_reads_of_stops_neither_the_socket_nor_fills_the_monitor(
    door: Door,
) -> None:
    for _ in range(3 * handshakes.EVENTS_PER_TURN):
        with suppress(ConnectionResetError):
            door.connect().close()
    door.until(lambda: not door.poller.poll(200), "the flood does not end")
    door.until(lambda: door.total() > 0, "the flood is not told")
    assert door.total() < handshakes.EVENTS_PER_TURN, "what it is behind with is dropped"
    door.greet()
    with door.connect():
        before = door.said.get("127.0.0.1", 0)
        door.until(lambda: door.said.get("127.0.0.1", 0) > before, "it is deaf since the flood")


def test_a_closed_monitor_lets_another_listen(door: Door) -> None:
    door.monitors.close()
    other = door.socket.get_monitor_socket(zmq.EVENT_ACCEPTED)
    with door.connect():
        assert other.poll(int(PATIENCE_S * 1000)), "the socket tells nothing any more"
    door.socket.disable_monitor()
    other.close(linger=0)
    door.monitors.open(door.socket)
    with door.connect():
        door.until(lambda: door.total() > 0, "it is not heard after being opened again")
