"""Whoever makes the bulk endpoint hold memory, or knocks without a key, is cut off and named."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Queue

import pytest
import zmq
from raw_curve import RawCurve

from metisfl.controller.bulk import BulkEndpoint
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.deploy.curve import secure_client
from metisfl.deploy.keys import Identity
from metisfl.deploy.memory import held_bytes
from metisfl.native_c import crc32c
from metisfl.proto import bulk as frames

CONTROLLER = Identity("controller", *zmq.curve_keypair())
EVE = Identity("learner:eve", *zmq.curve_keypair())
ADA = Identity("learner:ada", *zmq.curve_keypair())
PATIENCE_S = 20.0  # never waited for in a test that passes
Start = Callable[[int], BulkEndpoint]


@pytest.fixture
def told() -> Queue[tuple[str, str, str]]:
    return Queue()


@pytest.fixture
def start(tmp_path: Path, told: Queue[tuple[str, str, str]]) -> Iterator[Start]:
    """An endpoint that may hold so much more than this process does now."""
    started: list[BulkEndpoint] = []

    def begin(spare_bytes: int) -> BulkEndpoint:
        endpoint = BulkEndpoint(
            endpoint="tcp://127.0.0.1:*",
            identity=CONTROLLER,
            peers={one.public: one.principal for one in (ADA, EVE)},
            store=ModelStore(tmp_path / "models"),
            spool=Spool(tmp_path / "spool"),
            on_stored=lambda *_: None,
            on_stranger=lambda *what: told.put(what),
            memory_limit_bytes=held_bytes() + spare_bytes,
        )
        started.append(endpoint)
        endpoint.start()
        return endpoint

    yield begin
    for endpoint in started:
        endpoint.close()
        endpoint.finished.result(timeout=10)


def is_served(endpoint: BulkEndpoint, who: Identity) -> None:
    """It asks for nothing that there is, and is answered."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        secure_client(dealer, public=who.public, secret=who.secret, server_public=CONTROLLER.public)
        dealer.connect(endpoint.endpoint)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            dealer.send_multipart([b"?"])
            if dealer.poll(300):
                break
            assert time.monotonic() < deadline, "no answer"  # one that was cut off asks again
        reply = frames.parse(dealer.recv_multipart(), crc32c)
        assert isinstance(reply, frames.Refused), reply


def test_an_update_without_an_end_is_cut_off_and_its_sender_suspected(
    start: Start, told: Queue[tuple[str, str, str]]
) -> None:
    """libzmq holds the parts of a message until the last has come, without a limit of its own."""
    endpoint = start(100 << 20)
    is_served(endpoint, ADA)
    for _ in range(2):
        sent, wire = 0, back_again(endpoint)
        with suppress(OSError):
            while sent < 1 << 30:
                wire.part(bytes(200_000), more=True)
                sent += 200_000
        wire.close()
        assert sent < 400 << 20, f"{sent} bytes were taken"
        assert told.get(timeout=PATIENCE_S)[:2] == ("memory limit", "learner:eve")
    is_served(endpoint, ADA)
    assert endpoint.counts["memory_cuts"] >= 2


def back_again(endpoint: BulkEndpoint) -> RawCurve:
    """Shake hands by hand, as soon as the endpoint listens again."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(OSError, AssertionError):  # hung up in the middle of the handshake
            return RawCurve(endpoint.endpoint, EVE, CONTROLLER.public)
    raise AssertionError("the endpoint does not listen any more")


def test_an_unknown_key_is_counted_and_named(
    start: Start, told: Queue[tuple[str, str, str]]
) -> None:
    endpoint = start(1 << 40)
    stranger = Identity("learner:mallory", *zmq.curve_keypair())
    with pytest.raises(AssertionError, match=r"not let in|hung up"):
        RawCurve(endpoint.endpoint, stranger, CONTROLLER.public)
    named = told.get(timeout=PATIENCE_S)
    assert named == ("connection refused", stranger.public.decode(), "unknown key")
    assert endpoint.counts["keys_refused"] == 1


def test_who_shows_no_key_is_counted_and_named(
    start: Start, told: Queue[tuple[str, str, str]]
) -> None:
    endpoint = start(1 << 40)
    host, port = endpoint.endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE_S):
        assert told.get(timeout=PATIENCE_S) == ("handshake failed", "127.0.0.1", "1 times")
    assert endpoint.counts["handshakes_failed"] == 1
    endpoint.replace_peers({ADA.public: ADA.principal}, cut=True)
    is_served(endpoint, ADA)
    assert endpoint.counts["handshakes_failed"] == 1, "who is cut off has not failed to get in"
    with socket.create_connection((host, int(port)), PATIENCE_S):
        assert told.get(timeout=PATIENCE_S)[1] == "127.0.0.1", "also after the endpoint's reopening"
