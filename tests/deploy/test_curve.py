"""curve.py on real sockets: who gets in, who does not, and that doubt is always a no."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from socket import create_server
from typing import Any, NoReturn

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from metisfl.deploy import curve
from metisfl.deploy.keys import Identity
from metisfl.proto.errors import MachineError

PATIENCE_MS = 5000  # never waited for in a test that passes


def identity(principal: str) -> Identity:
    return Identity(principal, *zmq.curve_keypair())


SERVER = identity("broker")
KNOWN = identity("learner:a")
UNKNOWN = identity("learner:b")
PEERS = {KNOWN.public: KNOWN.principal}
SUCCEEDED = zmq.Event.HANDSHAKE_SUCCEEDED
REFUSED = zmq.Event.HANDSHAKE_FAILED_AUTH


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def authenticator(context: zmq.Context[Any]) -> Iterator[curve.Authenticator]:
    authenticator = curve.Authenticator(context, PEERS)
    authenticator.start()
    yield authenticator
    authenticator.stop()


@pytest.fixture
def server(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """A bound ROUTER. Nothing reads it: a handshake needs no reader."""
    return bound(context, zmq.ROUTER)


def bound(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    curve.secure_server(socket, SERVER)
    socket.rcvtimeo = PATIENCE_MS
    socket.bind("tcp://127.0.0.1:0")
    return socket


def endpoint_of(socket: zmq.Socket[Any]) -> str:
    return socket.get(zmq.LAST_ENDPOINT).decode()


def client(
    server: zmq.Socket[bytes],
    who: Identity,
    kind: int = zmq.DEALER,
    server_public: bytes = SERVER.public,
) -> zmq.Socket[bytes]:
    socket = server.context.socket(kind)
    curve.secure_client(socket, public=who.public, secret=who.secret, server_public=server_public)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    return socket


def knock(server: zmq.Socket[bytes], who: Identity, server_public: bytes = SERVER.public) -> int:
    """Connect to the server once and tell how the handshake ended."""
    socket = client(server, who, server_public=server_public)
    monitor = socket.get_monitor_socket(curve.SELF_TEST_EVENTS)
    try:
        socket.connect(endpoint_of(server))
        assert monitor.poll(PATIENCE_MS), "the handshake neither succeeded nor failed"
        return int(parse_monitor_message(monitor.recv_multipart())["event"])
    finally:
        socket.disable_monitor()
        monitor.close()
        socket.close()


@pytest.mark.usefixtures("authenticator")
def test_a_known_key_gets_in(server: zmq.Socket[bytes]) -> None:
    assert knock(server, KNOWN) == SUCCEEDED


def test_an_invitations_key_opens_only_the_socket_that_lets_the_invited_in(
    context: zmq.Context[zmq.Socket[bytes]],
    server: zmq.Socket[bytes],
    authenticator: curve.Authenticator,
) -> None:
    authenticator.replace(PEERS, {UNKNOWN.public: "invited:learner:b"})
    desk = context.socket(zmq.ROUTER)
    curve.secure_server(desk, SERVER)
    curve.let_invited_in(desk)
    desk.rcvtimeo = PATIENCE_MS
    desk.bind("tcp://127.0.0.1:0")
    assert knock(server, UNKNOWN) == REFUSED
    for who, user in ((UNKNOWN, "invited:learner:b"), (KNOWN, KNOWN.principal)):
        socket = client(desk, who)
        socket.connect(endpoint_of(desk))
        socket.send(b"J")
        desk.recv()
        assert desk.recv(copy=False).get("User-Id") == user
        socket.close()
    authenticator.replace(PEERS)
    assert knock(desk, UNKNOWN) == REFUSED, "an invitation ends"
    desk.close()


def test_an_unknown_key_is_refused_and_told_to_the_operator(
    server: zmq.Socket[bytes], authenticator: curve.Authenticator
) -> None:
    assert knock(server, UNKNOWN) == REFUSED
    assert authenticator.refused_total == 1
    assert authenticator.take_refusals() == [
        curve.Refusal(UNKNOWN.public, "127.0.0.1", "unknown key")
    ]
    assert authenticator.take_refusals() == [], "a refusal was told twice"


def test_remembered_refusals_are_few_however_many_there_are(
    context: zmq.Context[Any],
) -> None:
    authenticator = curve.Authenticator(context, PEERS)
    for _ in range(1000):
        authenticator._answer([b"id", b"", b"?"])
    assert authenticator.refused_total == 1000
    assert len(authenticator.take_refusals()) == curve.REFUSALS_KEPT


@pytest.mark.usefixtures("authenticator")
def test_a_client_does_not_talk_to_a_server_with_another_key(server: zmq.Socket[bytes]) -> None:
    assert knock(server, KNOWN, server_public=UNKNOWN.public) not in (SUCCEEDED, REFUSED)


@pytest.mark.usefixtures("authenticator")
def test_plaintext_gets_nowhere(server: zmq.Socket[bytes]) -> None:
    plain = server.context.socket(zmq.DEALER)
    plain.linger = 0
    monitor = plain.get_monitor_socket(curve.SELF_TEST_EVENTS)
    plain.connect(endpoint_of(server))
    assert monitor.poll(PATIENCE_MS)
    event = parse_monitor_message(monitor.recv_multipart())["event"]
    plain.disable_monitor()
    monitor.close()
    plain.close()
    assert event != SUCCEEDED


@pytest.mark.parametrize("who", [KNOWN, UNKNOWN], ids=["known", "unknown"])
def test_without_its_authenticator_a_server_lets_nobody_in(
    server: zmq.Socket[bytes], authenticator: curve.Authenticator, who: Identity
) -> None:
    authenticator.stop()
    assert not authenticator.is_alive()
    assert knock(server, who) not in (SUCCEEDED,), "libzmq fell open: option 93 is not in force"


def test_a_server_that_never_had_an_authenticator_lets_nobody_in(
    server: zmq.Socket[bytes],
) -> None:
    assert knock(server, UNKNOWN) != SUCCEEDED


@pytest.mark.usefixtures("authenticator")
def test_every_frame_of_a_router_names_the_principal(server: zmq.Socket[bytes]) -> None:
    dealer = client(server, KNOWN)
    dealer.connect(endpoint_of(server))
    dealer.send_multipart([b"H", b"hello"])
    frames = server.recv_multipart(copy=False)
    assert len(frames) == 3, "routing id and two frames"
    assert [frame.get("User-Id") for frame in frames] == [KNOWN.principal] * 3
    dealer.close()


@pytest.mark.usefixtures("authenticator")
def test_a_subscription_names_the_principal(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with bound(context, zmq.XPUB) as publisher, client(publisher, KNOWN, zmq.SUB) as subscriber:
        subscriber.connect(endpoint_of(publisher))
        subscriber.subscribe("hearts/task/a/")
        frame = publisher.recv(copy=False)
    assert (frame.bytes[1:], frame.get("User-Id")) == (b"hearts/task/a/", KNOWN.principal)


def test_replaced_peers_hold_from_the_next_handshake_on(
    server: zmq.Socket[bytes], authenticator: curve.Authenticator
) -> None:
    connected = client(server, KNOWN)
    connected.connect(endpoint_of(server))
    connected.send(b"before")
    assert server.recv_multipart()[1] == b"before"

    authenticator.replace({UNKNOWN.public: UNKNOWN.principal})
    assert knock(server, UNKNOWN) == SUCCEEDED
    assert knock(server, KNOWN) == REFUSED
    connected.send(b"after")
    assert server.recv_multipart()[1] == b"after", "an open connection is not cut"
    connected.close()


class BrokenPeers(dict[bytes, str]):
    def items(self) -> NoReturn:  # type: ignore[override]
        raise OSError("database is locked")


def test_peers_that_cannot_be_read_hurt_the_caller_and_not_the_doorkeeper(
    server: zmq.Socket[bytes], authenticator: curve.Authenticator
) -> None:
    broken: Mapping[bytes, str] = BrokenPeers(PEERS)
    with pytest.raises(OSError, match="locked"):
        authenticator.replace(broken)
    assert authenticator.is_alive()
    assert knock(server, KNOWN) == SUCCEEDED
    assert knock(server, UNKNOWN) == REFUSED


@pytest.mark.parametrize(
    "request_frames",
    [
        [b""],
        [b"no delimiter"],
        [b"", b"1.0"],
        [b"", b"1.0", b"7", b"metisfl", b"127.0.0.1", b"", b"NULL"],
        [b"", b"1.0", b"7", b"metisfl", b"127.0.0.1", b"", b"CURVE", b"short"],
        [b"", b"9.9", b"7", b"metisfl", b"\xff\xfe", b"", b"CURVE", b"k" * 32],
    ],
)
def test_a_malformed_request_is_survived(
    server: zmq.Socket[bytes], authenticator: curve.Authenticator, request_frames: list[bytes]
) -> None:
    intruder = server.context.socket(zmq.DEALER)
    intruder.linger = 0
    intruder.rcvtimeo = PATIENCE_MS
    intruder.connect(curve.ZAP_ENDPOINT)
    intruder.send_multipart(request_frames)
    assert intruder.recv_multipart()[3] == b"400"
    intruder.close()
    assert authenticator.is_alive()
    assert knock(server, KNOWN) == SUCCEEDED


KEY = z85.decode(KNOWN.public)
GOOD_REQUEST = [b"id", b"", b"1.0", b"7", b"metisfl", b"127.0.0.1", b"", b"CURVE", KEY]


def unstarted() -> curve.Authenticator:
    with zmq.Context() as context:
        return curve.Authenticator(context, PEERS)


@given(
    st.lists(st.binary(max_size=40), min_size=1, max_size=12)
    | st.tuples(st.integers(0, 8), st.binary(max_size=40)).map(
        lambda change: [*GOOD_REQUEST[: change[0]], change[1], *GOOD_REQUEST[change[0] + 1 :]]
    )
)
def test_only_the_known_key_in_the_right_domain_is_let_in(request_frames: list[bytes]) -> None:
    answer = unstarted()._answer(request_frames)
    deciding = (1, 2, 4, 7, 8)
    is_good = len(request_frames) == len(GOOD_REQUEST) and all(
        request_frames[position] == GOOD_REQUEST[position] for position in deciding
    )
    assert answer[4] == (b"200" if is_good else b"400")
    assert answer[6] == (b"learner:a" if is_good else b"")
    assert answer[0] == request_frames[0], "the answer goes to whoever asked"


def test_a_context_has_one_authenticator(
    context: zmq.Context[Any], authenticator: curve.Authenticator
) -> None:
    second = curve.Authenticator(context, PEERS)
    with pytest.raises(MachineError, match="one authenticator a context"):
        second.start()
    assert authenticator.is_alive()


def test_an_authenticator_can_be_started_again(
    server: zmq.Socket[bytes], authenticator: curve.Authenticator
) -> None:
    authenticator.stop()
    authenticator.stop()
    authenticator.start()
    assert knock(server, KNOWN) == SUCCEEDED


def test_a_context_that_ends_first_takes_the_authenticator_with_it() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = curve.Authenticator(context, PEERS)
    authenticator.start()
    context.term()
    thread = authenticator._thread
    assert thread is not None
    thread.join(PATIENCE_MS / 1000)
    assert not authenticator.is_alive()
    authenticator.stop()


def test_the_socket_options_are_those_of_the_house(server: zmq.Socket[bytes]) -> None:
    dealer = client(server, KNOWN)
    for socket in (server, dealer):
        assert socket.get(zmq.HEARTBEAT_IVL) == 0, "ZMTP heartbeats can abort the process"
        assert socket.get(zmq.HANDSHAKE_IVL) == 5000
        assert socket.get(zmq.LINGER) == 0
        keepalive = (zmq.TCP_KEEPALIVE, zmq.TCP_KEEPALIVE_IDLE)
        assert [socket.get(option) for option in keepalive] == [1, 30]
        assert socket.get(zmq.ROUTING_ID) == b"", "identity is the key, never a routing id"
    assert server.get(zmq.ZAP_ENFORCE_DOMAIN) == 1
    assert server.get(zmq.ZAP_DOMAIN).rstrip(b"\0") == curve.ZAP_DOMAIN
    dealer.close()


def test_security_after_bind_is_a_defect(server: zmq.Socket[bytes]) -> None:
    with pytest.raises(AssertionError, match="after bind"):
        curve.secure_server(server, SERVER)


def test_a_libzmq_that_cannot_be_kept_closed_is_refused() -> None:
    class OldSocket:
        def get(self, _: int) -> bytes:
            return b""

        def setsockopt(self, option: int, _: int) -> None:
            assert option == zmq.ZAP_ENFORCE_DOMAIN
            raise zmq.ZMQError(zmq.EINVAL)

    old: Any = OldSocket()
    with pytest.raises(MachineError, match="would let unknown keys in; install the pyzmq wheel"):
        curve.secure_server(old, SERVER)


def test_self_test_passes_on_a_closed_door_and_leaves_nothing_open(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    authenticator = curve.Authenticator(context, PEERS)
    authenticator.start()
    server = bound(context, zmq.ROUTER)
    any_address = endpoint_of(server).replace("127.0.0.1", "*")
    curve.self_test(context, any_address, SERVER.public, PATIENCE_MS / 1000)
    assert authenticator.refused_total == 1
    server.close()
    authenticator.stop()
    context.term()  # an open monitor or socket would make this hang


def test_self_test_works_in_an_asyncio_daemon() -> None:
    async def daemon() -> int:
        context = zmq.asyncio.Context()
        authenticator = curve.Authenticator(context, PEERS)
        authenticator.start()
        server = context.socket(zmq.ROUTER)
        curve.secure_server(server, SERVER)
        server.bind("tcp://127.0.0.1:0")
        curve.self_test(context, endpoint_of(server), SERVER.public, PATIENCE_MS / 1000)
        server.close()
        authenticator.stop()
        context.term()
        return authenticator.refused_total

    assert asyncio.run(daemon()) == 1


def test_self_test_fails_on_an_open_door(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with context.socket(zmq.ROUTER) as careless:
        careless.curve_server = True
        careless.curve_secretkey = SERVER.secret
        careless.bind("tcp://127.0.0.1:0")
        with pytest.raises(MachineError, match="let an unknown key in"):
            curve.self_test(context, endpoint_of(careless), SERVER.public, PATIENCE_MS / 1000)


def test_self_test_fails_without_an_authenticator(server: zmq.Socket[bytes]) -> None:
    with pytest.raises(MachineError, match=r"did not refuse .* is its authenticator running"):
        curve.self_test(server.context, endpoint_of(server), SERVER.public, PATIENCE_MS / 1000)


def test_self_test_does_not_wait_for_ever(context: zmq.Context[Any]) -> None:
    with create_server(("127.0.0.1", 0)) as mute:  # accepts, and never says a word
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(MachineError, match=r"within 0\.05 s \(no answer\)"):
            curve.self_test(context, endpoint, SERVER.public, 0.05)
