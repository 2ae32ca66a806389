"""Attacks of who has no key, most of them in bare TCP."""

from __future__ import annotations

import os
import random
import selectors
import socket as sockets
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import zmq

from attacks.target import Attack, End, Socket, Tally, Target, address, dealer, knock
from metisfl.broker.credentials import Claim, ClientKeys
from metisfl.proto import events_pb2 as pb
from metisfl.proto import frames, topics
from metisfl.proto.envelope import build_envelope
from metisfl.proto.events import encode

FLOOD: Final = 1000  # connections to each port
DRIPPING: Final = 100
BURST_BYTES: Final = 64 * 1024
GIB: Final = 1 << 30
LONG, COMMAND = 2, 4
SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"


def greeting(mechanism: bytes) -> bytes:
    """ZMTP 3.1's, of a client."""
    return SIGNATURE + b"\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def half_open(target: Target, end: End, tell: Tally) -> None:
    """A thousand connections to each port that say nothing; who is cut off comes back."""
    _hold(target, end, tell, FLOOD, b"", drip=False)


def half_greeting(target: Target, end: End, tell: Tally) -> None:
    """A hundred to each port that begin to greet, a byte a second."""
    _hold(target, end, tell, DRIPPING, greeting(b"CURVE"), drip=True)


def _hold(target: Target, end: End, tell: Tally, count: int, data: bytes, *, drip: bool) -> None:
    selector, said = selectors.DefaultSelector(), 10 if drip else 0

    def open_one(endpoint: str) -> None:
        one = sockets.socket()
        one.setblocking(False)
        one.connect_ex(address(endpoint))
        selector.register(one, selectors.EVENT_READ, endpoint)
        tell("opened")
        if drip:
            with suppress(OSError):
                one.send(data[:said])

    for endpoint, _, _ in target.doors:
        for _ in range(count):
            open_one(endpoint)
    next_drip = time.monotonic() + 1
    while not end.wait(0):
        for key, _ in selector.select(0.2):
            one = key.fileobj
            assert isinstance(one, sockets.socket)
            try:
                more = one.recv(4096)
            except OSError:
                more = b""
            if more:
                tell("greeted")
                continue
            tell("cut off")
            selector.unregister(one)
            one.close()
            open_one(key.data)
        if drip and time.monotonic() >= next_drip:
            next_drip, said = time.monotonic() + 1, said + 1
            for key in list(selector.get_map().values()):
                with suppress(OSError):
                    key.fileobj.send(data[said % len(data) :][:1])  # type: ignore[union-attr]
        end.wait(0.05)
    for key in list(selector.get_map().values()):
        key.fileobj.close()  # type: ignore[union-attr]
    selector.close()


def _pour(target: Target, end: End, tell: Tally, make: Callable[[], list[bytes]]) -> None:
    """Connect, send what `make` gives and then noise, until cut off; and again."""
    while not end.come:
        for endpoint, _, _ in target.doors:
            with suppress(OSError), sockets.create_connection(address(endpoint), 2) as one:
                tell("opened")
                try:
                    for data in make():
                        one.sendall(data)
                    until = time.monotonic() + 1
                    while time.monotonic() < until and not end.come:
                        one.sendall(os.urandom(BURST_BYTES))
                        tell("bytes", BURST_BYTES)
                except ConnectionError:
                    tell("cut off")
        end.wait(0.01)


def garbage(target: Target, end: End, tell: Tally) -> None:
    """Random bytes."""
    _pour(target, end, tell, lambda: [os.urandom(random.randrange(1, 200))])


def announced_frame(target: Target, end: End, tell: Tally) -> None:
    """A frame of 1 GiB is announced: instead of a greeting, after one, and as a command."""
    head = struct.pack(">BQ", LONG, GIB)
    command = struct.pack(">BQ", LONG | COMMAND, GIB)
    ways = [[head]]
    ways += [[greeting(name), one] for name in (b"NULL", b"CURVE") for one in (head, command)]
    hello = struct.pack(">BB", COMMAND, 200) + b"\x05HELLO\x01\x00" + os.urandom(192)
    ways.append([greeting(b"CURVE"), hello, command])
    _pour(target, end, tell, lambda: random.choice(ways))


def wrong_key(target: Target, end: End, tell: Tally) -> None:
    """Handshakes with a key that nobody knows: a new one each time, or the same again."""
    pairs = [zmq.curve_keypair() for _ in range(4)]
    nobody, _ = zmq.curve_keypair()
    while not end.come:
        for endpoint, kind, whose in target.doors:
            pair = random.choice([*pairs, zmq.curve_keypair()])
            server = nobody if target.home is None else target.server(whose)
            tell(knock(kind, endpoint, ClientKeys(*pair, server).put_on))


def wrong_mechanism(target: Target, end: End, tell: Tally) -> None:
    """ZeroMQ without any security, or with a name and a password."""

    def put_on(socket: Socket, password: bytes) -> None:
        if password:
            socket.plain_username, socket.plain_password = target.principal.encode(), password

    while not end.come:
        for endpoint, kind, _ in target.doors:
            for password in (b"", b"secret"):
                tell(knock(kind, endpoint, partial(put_on, password=password)))
        end.wait(0.01)


def join(target: Target, end: End, tell: Tally) -> None:
    """Claim to be a learner, without a key, and join the federation by that name."""
    bare = Target(
        target.ingress, target.live, target.bulk, target.federation, target.principal, None, True
    )
    while not end.come:
        for endpoint, kind, _ in target.doors:
            tell(knock(kind, endpoint, Claim(target.principal).put_on))
        with dealer(bare, bare.ingress, "broker") as socket:
            if _joined(socket, bare, tell):
                return
        end.wait(0.05)


def _joined(socket: Socket, target: Target, tell: Tally) -> bool:
    epoch = time.time_ns()
    socket.send_multipart(frames.pack_hello(pb.Hello(protocol=frames.PROTOCOL, epoch=epoch)))
    kind, payload = encode(pb.LearnerJoined(learner=target.name, examples=1))
    envelope = build_envelope(
        event_id=os.urandom(16),
        topic=topics.member_topic(target.federation, target.name),
        publisher=target.principal,
        epoch=epoch,
        sequence=1,
        created_unix_ns=epoch,
        type=kind,
        correlation_id="",
        payload=payload,
    )
    until = time.monotonic() + 1
    while time.monotonic() < until:
        if not socket.poll(200):
            continue
        reply = frames.parse_reply(socket.recv_multipart())
        if isinstance(reply, pb.Welcome):
            tell("welcomed")
            tell.said["welcomed as"] = reply.principal
            socket.send_multipart([frames.PUBLISH, frames.pack_crc(envelope), envelope])
        elif isinstance(reply, frames.Ack) and reply.epoch == epoch:
            tell("joined")
            return True
    return False


ATTACKS: Final[dict[str, Attack]] = {
    "half-open": half_open,
    "half-greeting": half_greeting,
    "garbage": garbage,
    "announced-frame": announced_frame,
    "wrong-key": wrong_key,
    "wrong-mechanism": wrong_mechanism,
    "join": join,
}
