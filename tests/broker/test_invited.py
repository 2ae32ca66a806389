"""A real broker, and who has nothing but an invitation: it can ask for admission, no more."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import zmq
from raw_ingress import envelope, publish
from zmq.utils.monitor import parse_monitor_message

from metisfl.deploy.admit_asked import admit_asked
from metisfl.deploy.curve import secure_client
from metisfl.deploy.invitation_code import Code
from metisfl.deploy.invitations import change, load
from metisfl.deploy.knock import Knock, Sign
from metisfl.proto import frames
from metisfl.proto.enrolment import (
    ADMITTED,
    REFUSED,
    WAITING,
    Answer,
    Ask,
    Invitation,
    fingerprint,
    pack_ask,
    parse_answer,
)
from metisfl.proto.events_pb2 import Hello
from metisfl.proto.frames import Beat, CursorReport, Fetch

PATIENCE_S = 20.0  # never waited for in a test that passes
ADA = "learner:ada"


class Invited:
    """A code for `learner:ada` at a running broker, and connections by its key."""

    def __init__(self, broker: Any, doors: ExitStack) -> None:
        self.broker, self._doors = broker, doors
        self.controller = zmq.curve_keypair()[0]
        self.code = self.invite(bytes(16))

    def invite(self, token: bytes, *, expires_unix_s: int = 1 << 39) -> Code:
        """Make a code, and the only invitation of it."""
        ends = self.broker.ingress, self.broker.live, "tcp://127.0.0.1:1"
        servers = self.broker.identity.public, self.controller
        code = Code(ADA, "f", *ends, *servers, expires_unix_s, token)
        invitation = Invitation(ADA, code.key_pair()[0], "f", expires_unix_s)
        change(self.broker.keys, lambda _: {ADA: invitation}, now_unix_s=0)
        return code

    def knock(self, code: Code | None = None) -> tuple[Knock, Sign | list[bytes] | None]:
        """A connection by a code's key, and how the door behaved; closed if it is not open."""
        public, secret = (code or self.code).key_pair()
        server = self.broker.identity.public
        knock = Knock(self.broker.ingress, public=public, secret=secret, server_public=server)
        sign = knock.wait(PATIENCE_S)
        if sign is Sign.OPEN:
            self._doors.push(knock)
        else:
            knock.close()
        return knock, sign

    def ask(self, site: bytes, *, door: Knock | None = None, code: Code | None = None) -> Answer:
        """Send `J` with the key `site` and return the answer."""
        door = door or self.open(code)
        door.send(pack_ask(Ask((code or self.code).key_pair()[0], site)))
        return parse_answer(message(door))

    def open(self, code: Code | None = None) -> Knock:
        """An open door; the broker may need a moment to read of a new invitation."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            door, sign = self.knock(code)
            if sign is Sign.OPEN:
                return door
            assert time.monotonic() < deadline, "the invitation never opened the door"

    def until_refused(self) -> None:
        """Return when the broker has read that there is no such invitation (any more)."""
        deadline = time.monotonic() + PATIENCE_S
        while self.knock()[1] is not Sign.REFUSED:
            assert time.monotonic() < deadline, "the invitation still opens the door"

    def shown(self, site: bytes) -> str:
        broker = self.broker.identity.public
        return fingerprint(ADA, site=site, broker=broker, controller=self.controller)

    def audited(self, what: str) -> list[dict[str, str]]:
        lines = (self.broker.home / "audit.jsonl").read_text().splitlines()
        return [fact["facts"] for fact in map(json.loads, lines) if fact["what"] == what]


def message(door: Knock) -> list[bytes]:
    heard = door.wait(PATIENCE_S)
    assert isinstance(heard, list), heard
    return heard


@pytest.fixture
def invited(site: Any, broker: Any) -> Iterator[Invited]:
    with ExitStack() as doors:
        invited = Invited(broker, doors)
        (broker.keys / "peers").write_text(f"controller {invited.controller.decode()}\n")
        broker.start()
        yield invited


ATTEMPTS = {
    "hello": frames.pack_hello(Hello(protocol=frames.PROTOCOL, software="x", epoch=1)),
    "publish": publish(envelope(ADA, 1, "f/done/ada/")),
    "publish as invited": publish(envelope(f"invited:{ADA}", 1, "f/done/ada/")),
    "fetch": frames.pack_fetch(Fetch(1, 0, 1, "f/task/ada/")),
    "beat": frames.pack_beat(Beat("f/beat/ada/", "Progress", b"")),
    "cursor": frames.pack_cursor(CursorReport(1, "f/task/ada/")),
    "status": [frames.STATUS],
    "nothing": [b""],
    "half a wish": [b"J", bytes(32)],
    "a wish too many": [b"J", bytes(32), bytes(32), *[b"x" * 1000] * 20],
}


def test_by_an_invitations_key_nothing_can_be_sent_but_a_wish(invited: Invited) -> None:
    doors = {name: invited.open() for name in ATTEMPTS}
    for name, door in doors.items():
        door.send(ATTEMPTS[name])
    for name, door in doors.items():
        assert parse_answer(message(door)).state == REFUSED, name
    assert invited.broker.log("f") == []
    assert load(invited.broker.keys)[ADA].asked is None
    assert invited.audited("invitation misused")
    assert invited.ask(zmq.curve_keypair()[0], door=door) == Answer(WAITING), "it may still ask"


def test_by_an_invitations_key_the_live_feed_stays_shut(invited: Invited, sockets: Any) -> None:
    """It would say at once how many events the log holds."""
    invited.open()
    public, secret = invited.code.key_pair()
    live = sockets.socket(zmq.SUB)
    server = invited.broker.identity.public
    secure_client(live, public=public, secret=secret, server_public=server)
    monitor = live.get_monitor_socket(
        zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    )
    try:
        live.subscribe(b"")
        live.connect(invited.broker.live)
        assert monitor.poll(PATIENCE_S * 1000)
        event = parse_monitor_message(monitor.recv_multipart())["event"]
        assert event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
    finally:
        live.disable_monitor()
        monitor.close(linger=0)


def test_a_code_is_bound_to_the_first_key_also_by_a_broker_that_is_killed(
    invited: Invited,
) -> None:
    site, thief = (zmq.curve_keypair()[0] for _ in range(2))
    assert invited.shown(site) != invited.shown(thief), "before, the operator sees the thief's"
    assert invited.ask(site) == Answer(WAITING)
    invited.broker.end()
    invited.broker.start()
    answer = invited.ask(thief)
    assert answer.state == REFUSED
    assert "another key has asked with this code before" in answer.reason
    assert invited.ask(site) == Answer(WAITING)
    assert load(invited.broker.keys)[ADA].asked == site
    asked = invited.audited("asked for admission")
    assert asked == [{"principal": ADA, "fingerprint": invited.shown(site)}]
    (refused,) = invited.audited("admission refused")
    assert refused["fingerprint"] == invited.shown(thief)


def test_who_is_admitted_is_told_so_and_its_own_key_opens_the_door(invited: Invited) -> None:
    public, secret = zmq.curve_keypair()
    door = invited.open()
    assert invited.ask(public, door=door) == Answer(WAITING)
    shown = invited.shown(public)
    assert (
        admit_asked([invited.broker.home], ADA, frozenset(), shown.lower().replace("-", " ")) == 0
    )
    while (answer := invited.ask(public, door=door)) == Answer(WAITING):
        pass  # it reads its files once a second
    assert answer == Answer(ADMITTED)
    server = invited.broker.identity.public
    with Knock(invited.broker.ingress, public=public, secret=secret, server_public=server) as own:
        assert own.wait(PATIENCE_S) is Sign.OPEN
    invited.until_refused()  # a code works once


def test_a_new_code_makes_the_old_one_worthless_also_on_an_open_connection(
    invited: Invited,
) -> None:
    site = zmq.curve_keypair()[0]
    door = invited.open()
    newer = invited.invite(bytes([1] * 16))
    invited.until_refused()
    answer = invited.ask(site, door=door)
    assert answer.state == REFUSED
    assert "a newer code" in answer.reason
    assert invited.ask(site, code=newer) == Answer(WAITING)


def test_a_code_that_has_expired_opens_nothing(invited: Invited) -> None:
    door = invited.open()
    invited.invite(bytes(16), expires_unix_s=1)
    invited.until_refused()
    answer = invited.ask(zmq.curve_keypair()[0], door=door)
    assert answer.state == REFUSED, "an open connection outlives nothing"
    assert "has expired" in answer.reason


def test_what_cannot_be_written_down_is_not_promised(invited: Invited) -> None:
    door, site = invited.open(), zmq.curve_keypair()[0]
    path: Path = invited.broker.keys / "invitations"
    whole = path.read_text()
    path.write_text("damaged\n")
    answer = invited.ask(site, door=door)
    assert answer.state == REFUSED
    assert "cannot write down that you have asked" in answer.reason
    assert "1 words; allowed are principal, key" in invited.broker.said()
    path.write_text(whole)
    while invited.ask(site, door=door) != Answer(WAITING):
        pass  # it reads its files once a second
