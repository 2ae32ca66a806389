"""A real broker and peers that mean no good: each is refused or cut off, and hurts nobody else."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import suppress
from typing import Any

import pytest
import zmq
from raw_curve import RawCurve
from raw_ingress import answer, envelope, publish, still_serves
from zmq.utils.monitor import parse_monitor_message

from metisfl.broker import status
from metisfl.deploy.curve import secure_client
from metisfl.deploy.keys import Identity
from metisfl.proto import frames
from metisfl.proto.frames import POISON, REFUSED, Ack, Beat, Fetch, FetchedBatch, Head, Reject

PATIENCE_S = 20.0  # never waited for in a test that passes


PROTOCOL_ERROR = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
AUTH_FAILED = zmq.EVENT_HANDSHAKE_FAILED_AUTH


class watched:
    """A monitor socket for `events`, closed again at the end."""

    def __init__(self, socket: zmq.Socket[bytes], events: int) -> None:
        self._socket, self._events = socket, events

    def __enter__(self) -> zmq.Socket[bytes]:
        self._monitor = self._socket.get_monitor_socket(self._events)
        return self._monitor

    def __exit__(self, *_: object) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)


def next_event(monitor: zmq.Socket[bytes]) -> int:
    assert monitor.poll(int(PATIENCE_S * 1000)), "no event"
    return int(parse_monitor_message(monitor.recv_multipart())["event"])


def test_a_forged_publisher_is_refused(shared: Any, sockets: Any) -> None:
    forger, victim, f = shared.learner(), shared.learner(), shared.federation()
    topic = f"{f}/done/{victim.name}/"
    dealer = forger.greeted(sockets)
    dealer.send_multipart(publish(envelope(victim.identity.principal, 1, topic)))
    reject = answer(dealer)
    assert isinstance(reject, Reject)
    assert reject.code == REFUSED
    assert f"came from {forger.identity.principal}" in reject.reason
    still_serves(victim, topic, sockets)
    assert shared.broker.log(f) == [(victim.identity.principal, 1)]


def test_the_audit_log_names_who_forged_and_whom(broker: Any, site: Any, sockets: Any) -> None:
    forger, victim = site("learner:forger"), site("learner:victim")
    broker.start()
    dealer = forger.greeted(sockets)
    dealer.send_multipart(publish(envelope("learner:victim", 1, "f/done/victim/")))
    assert isinstance(answer(dealer), Reject)
    broker.end(signal.SIGTERM)
    (line,) = [one for one in audited(broker) if one["what"] == "forged refused"]
    assert line["facts"]["who"] == "learner:forger"
    assert "learner:victim" in line["facts"]["reason"]
    assert victim.identity.principal == "learner:victim"


def audited(broker: Any) -> list[Any]:
    return [json.loads(line) for line in (broker.home / "audit.jsonl").read_text().splitlines()]


def test_a_topic_of_another_is_refused(shared: Any, sockets: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    dealer = learner.greeted(sockets)
    data = envelope(learner.identity.principal, 1, f"{f}/task/{learner.name}/")
    dealer.send_multipart(publish(data))
    reject, ack = answer(dealer), answer(dealer)
    assert isinstance(reject, Reject)
    assert (reject.code, reject.sequence, ack) == (POISON, 1, Ack(1, 1))
    assert shared.broker.log(f) == []


@pytest.mark.parametrize(
    "parts",
    [
        [b"P"],
        [b"P", bytes(4), b"no protobuf \xff\xff"],
        publish(b"no protobuf \xff\xff"),
        [b"F", bytes(23), b"f/"],
        [b"F", bytes(24), b"\xff" * 200],
        [b"Z", b"unknown"],
        [b"B", b"f/done/other/", b"Progress", b""],
        [os.urandom(20) for _ in range(40)],
        [b"H", b"\xff" * 100],
    ],
    ids=lambda parts: f"{parts[0][:1]!r}-{len(parts)}",
)
def test_garbage_is_answered_and_hurts_nobody(
    shared: Any, sockets: Any, parts: list[bytes]
) -> None:
    learner, f = shared.controller, shared.federation()
    dealer = learner.greeted(sockets)
    dealer.send_multipart(parts)
    reply = answer(dealer)
    if isinstance(reply, frames.Nack):
        return  # a crc that does not match: sent again, not refused
    assert isinstance(reply, Reject), f"{parts!r} was answered with {reply!r}"
    assert reply.reason
    dealer.send_multipart(frames.pack_fetch(Fetch(1, 0, 1, f"{f}/")))
    assert isinstance(answer(dealer), FetchedBatch), "the same connection goes on"


def test_an_oversized_frame_cuts_its_sender_off(shared: Any, sockets: Any) -> None:
    learner, other, f = shared.learner(), shared.learner(), shared.federation()
    dealer = learner.greeted(sockets)
    with watched(dealer, zmq.EVENT_DISCONNECTED) as monitor:
        dealer.send_multipart([b"P", bytes(4), bytes(frames.MESSAGE_BYTES_MAX + 1)])
        assert next_event(monitor) == zmq.EVENT_DISCONNECTED
    still_serves(other, f"{f}/done/{other.name}/", sockets)


def test_bytes_that_are_no_zeromq_are_cut_off(shared: Any, sockets: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    for endpoint in (shared.broker.ingress, shared.broker.live):
        host, port = endpoint.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port)), PATIENCE_S) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(500))
            with suppress(ConnectionResetError):
                while plain.recv(4096):
                    pass  # its greeting; then it hangs up
    still_serves(learner, f"{f}/done/{learner.name}/", sockets)


def test_who_says_nothing_is_counted_and_named_by_address(
    broker: Any, site: Any, sockets: Any
) -> None:
    driver = site("driver:d")
    broker.start()
    silent = []
    for endpoint in (broker.ingress, broker.live):
        host, port = endpoint.removeprefix("tcp://").split(":")
        silent.append(socket.create_connection((host, int(port)), PATIENCE_S))
    dealer = driver.greeted(sockets)
    deadline = time.monotonic() + PATIENCE_S
    while "handshake refused" not in broker.said():
        assert time.monotonic() < deadline, "the operator is not told of who shows no key"
    for one in silent:
        one.close()
    stranger = Identity("learner:stranger", *zmq.curve_keypair())
    with pytest.raises(AssertionError, match=r"not let in|hung up"):
        RawCurve(broker.ingress, stranger, broker.identity.public)
    while (refused := asked(dealer).requests_refused["handshake"]) < 3:
        assert time.monotonic() < deadline, f"{refused} of 3 are counted: 2 silent, 1 unknown key"
    broker.end(signal.SIGTERM)
    assert refused == 3, "who is refused, or gets in, is counted twice"
    lines = [one for one in audited(broker) if one["what"] == "handshake refused"]
    assert {one["facts"]["who"] for one in lines} == {"127.0.0.1"}


def asked(dealer: Any) -> status.BrokerStatus:
    """What the broker tells of itself; too many questions a second have no answer."""
    while True:
        dealer.send_multipart([frames.STATUS])
        if dealer.poll(300):
            reply = answer(dealer)
            assert isinstance(reply, frames.StatusAnswer), reply
            return status.parse_status(reply.body)


def test_a_plain_zeromq_peer_is_not_let_in(shared: Any, sockets: Any) -> None:
    for kind, endpoint in ((zmq.DEALER, shared.broker.ingress), (zmq.SUB, shared.broker.live)):
        plain = sockets.socket(kind)
        with watched(plain, zmq.EVENT_HANDSHAKE_SUCCEEDED | PROTOCOL_ERROR) as monitor:
            plain.connect(endpoint)
            assert next_event(monitor) == PROTOCOL_ERROR


def test_an_unknown_key_is_refused_at_both_sockets(shared: Any, sockets: Any) -> None:
    stranger = Identity("learner:stranger", *zmq.curve_keypair())
    for kind, endpoint in ((zmq.DEALER, shared.broker.ingress), (zmq.SUB, shared.broker.live)):
        knocking = sockets.socket(kind)
        secure_client(
            knocking,
            public=stranger.public,
            secret=stranger.secret,
            server_public=shared.broker.identity.public,
        )
        with watched(knocking, zmq.EVENT_HANDSHAKE_SUCCEEDED | AUTH_FAILED) as monitor:
            knocking.connect(endpoint)
            assert next_event(monitor) == AUTH_FAILED
    line = f'"public": "{stranger.public.decode()}"'
    deadline = time.monotonic() + PATIENCE_S
    while line not in shared.broker.said():
        assert time.monotonic() < deadline, "the operator is not told of the unknown key"


def test_a_learner_hears_nothing_that_is_not_its_own(shared: Any, sockets: Any) -> None:
    learner, other, f = shared.learner(), shared.learner(), shared.federation()
    ears = learner.raw(sockets, zmq.SUB)
    mine = f"{f}/done/{learner.name}/"
    for prefix in ("", f"{f}/", f"{f}/done/", f"{f}/done/{other.name}/", mine, "hb/"):
        ears.subscribe(prefix.encode())
    while not isinstance(frames.parse_live(ears.recv_multipart()), Head):
        pass
    until_heard = time.monotonic() + PATIENCE_S
    theirs = f"{f}/done/{other.name}/"
    dealer, spy = other.greeted(sockets), learner.greeted(sockets)
    for number in range(1, 4):
        dealer.send_multipart(publish(envelope(other.identity.principal, number, theirs)))
        assert answer(dealer) == Ack(1, number)
    spy.send_multipart(publish(envelope(learner.identity.principal, 1, mine)))
    assert answer(spy) == Ack(1, 1)
    heard: set[bytes] = set()
    while mine.encode() not in heard and time.monotonic() < until_heard:
        heard.add(ears.recv_multipart()[0])
    assert {topic for topic in heard if not topic.startswith(b"hb/")} == {mine.encode()}


def test_a_flood_of_subscriptions_ends_at_sixteen(shared: Any, sockets: Any) -> None:
    f = shared.federation()
    ears = shared.controller.raw(sockets, zmq.SUB)
    ears.subscribe(b"hb/")
    for number in range(100):
        ears.subscribe(f"{f}x{number}/".encode())
    dealer = shared.controller.greeted(sockets)
    heads = 0
    while heads < 3:  # the second comes after the flood, since a head follows what was accepted
        heads += isinstance(frames.parse_live(ears.recv_multipart()), Head)
    for sequence, number in enumerate((0, 99), start=1):
        topic = f"{f}x{number}/run/all/"
        data = envelope("controller", sequence, topic, epoch=2**62)
        dealer.send_multipart(publish(data))
        assert isinstance(answer(dealer), Ack)
    heard = set()
    while (topic := ears.recv_multipart()[0]).startswith(b"hb/") or not heard:
        heard.add(topic)
        if f"{f}x0/run/all/".encode() in heard and len(heard) > 1:
            break
    assert f"{f}x99/run/all/".encode() not in heard


def test_a_flood_of_beats_is_thinned_out(shared: Any, sockets: Any) -> None:
    learner, f = shared.learner(), shared.federation()
    dealer = learner.greeted(sockets)
    beat = frames.pack_beat(Beat(f"{f}/beat/{learner.name}/", "Progress", b""))
    for _ in range(5000):
        dealer.send_multipart(beat)
    still_serves(learner, f"{f}/done/{learner.name}/", sockets)
