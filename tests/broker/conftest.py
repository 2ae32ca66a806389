"""Messaging on loopback: a home with keys, a real broker process, real clients, raw sockets."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zmq

from metisfl.broker.client import BrokerClient, ClientKeys, Outbox, Rejected
from metisfl.broker.dispatch import Dispatch, Reply
from metisfl.broker.sequencer import Append, Batch, Recovered
from metisfl.deploy.curve import secure_client
from metisfl.deploy.keys import Identity, create_identity
from metisfl.deploy.registry import Peer, admit
from metisfl.proto import frames
from metisfl.proto.envelope import parse_envelope
from metisfl.proto.events_pb2 import Envelope, Hello, TaskFailed

PATIENCE_S = 20.0  # never waited for in a test that passes


class BrokerProcess:
    """A broker in a process of its own, which can be ended and started again on its ports."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.keys = home / "keys"
        self.identity = create_identity(self.keys, "broker")
        (self.keys / "peers").touch()
        self.ingress, self.live = free_endpoint(), free_endpoint()
        self.options: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._said = home / "said"

    def start(self) -> BrokerProcess:
        """Start it and wait until it says that it is ready."""
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as ready:
            name = "metisfl-test-" + os.urandom(8).hex()
            ready.bind(f"\0{name}")
            ready.settimeout(PATIENCE_S)
            environment = {**os.environ, "NOTIFY_SOCKET": f"@{name}"}
            with self._said.open("ab") as said:
                self.process = subprocess.Popen(self.command(), stderr=said, env=environment)
            assert ready.recv(64) == b"READY=1", self.said()
        return self

    def command(self) -> list[str]:
        service = [sys.executable, "-I", "-m", "metisfl.broker.service"]
        ends = ["--ingress", self.ingress, "--live", self.live]
        return [*service, "--home", str(self.home), *ends, *self.options]

    def end(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal, wait, and return its exit code."""
        assert self.process is not None, "it does not run"
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.process = None
        return code

    def said(self) -> str:
        return self._said.read_text()

    def log(self, federation: str) -> list[tuple[str, int]]:
        """(publisher, its sequence) of what others have on disk in a federation, in order."""
        events = self.events(federation)
        return [(one.publisher, one.sequence) for one in events if one.publisher != "broker"]

    def events(self, federation: str) -> list[Envelope]:
        """All that is on disk in a federation, in order."""
        with closing(sqlite3.connect(self.home / "log" / "events.db")) as database:
            rows = database.execute(
                "select envelope from event join federation on federation.id = event.federation"
                " where federation.name = ? order by sequence",
                (f"{federation}/",),
            ).fetchall()
        return [parse_envelope(row[0]) for row in rows]


class Site:
    """One principal: its key, its database, its clients."""

    def __init__(self, folder: Path, identity: Identity, broker: BrokerProcess) -> None:
        self.folder, self.identity, self.broker = folder, identity, broker
        self.rejected: list[Rejected] = []
        self.open(folder / "state.db")

    def open(self, path: Path) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute("pragma journal_mode = wal")
        self.outbox = Outbox(self.database, self.identity.principal)

    @property
    def name(self) -> str:
        return self.identity.principal.partition(":")[2]

    def client(self) -> BrokerClient:
        return BrokerClient(
            ingress=self.broker.ingress,
            live=self.broker.live,
            keys=ClientKeys(
                self.identity.public, self.identity.secret, self.broker.identity.public
            ),
            principal=self.identity.principal,
            outbox=self.outbox,
            software="test",
            on_reject=self.rejected.append,
        )

    def accept(self, *topics: str, reason: str = "r") -> None:
        """Commit one event for each topic to the outbox."""
        with self.database:
            self.database.execute("begin")
            for topic in topics:
                event = TaskFailed(task_id="t", learner="l1", reason=reason)
                self.outbox.append(topic, event)

    def raw(self, sockets: Sockets, kind: int) -> zmq.Socket[bytes]:
        """A bare socket with this site's key, connected."""
        made = sockets.socket(kind)
        secure_client(
            made,
            public=self.identity.public,
            secret=self.identity.secret,
            server_public=self.broker.identity.public,
        )
        made.rcvtimeo = int(PATIENCE_S * 1000)
        made.connect(self.broker.live if kind == zmq.SUB else self.broker.ingress)
        return made

    def greeted(self, sockets: Sockets) -> zmq.Socket[bytes]:
        """A bare DEALER that the broker has welcomed."""
        dealer = self.raw(sockets, zmq.DEALER)
        hello = Hello(protocol=frames.PROTOCOL, software="raw", epoch=self.outbox.epoch)
        dealer.send_multipart(frames.pack_hello(hello))
        assert dealer.recv_multipart()[0] == frames.WELCOME
        return dealer


class Sites:
    """Makes sites whose keys a broker knows."""

    def __init__(self, folder: Path, broker: BrokerProcess) -> None:
        self._folder, self._broker = folder, broker
        self._made: list[Site] = []

    def __call__(self, principal: str, *, known: bool = True) -> Site:
        folder = self._folder / principal.replace(":", "-")
        identity = create_identity(folder, principal)
        if known:
            admit(self._broker.keys, Peer(principal, identity.public))
        self._made.append(Site(folder, identity, self._broker))
        return self._made[-1]

    def close(self) -> None:
        for site in self._made:
            site.database.close()


def free_endpoint() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker of this test's own, not started yet: first make the sites."""
    (tmp_path / "broker").mkdir()
    broker = BrokerProcess(tmp_path / "broker")
    yield broker
    if broker.process is not None:
        broker.end()


@pytest.fixture
def site(tmp_path: Path, broker: BrokerProcess) -> Iterator[Sites]:
    """Makes sites of `broker`."""
    sites = Sites(tmp_path, broker)
    yield sites
    sites.close()


class Shared:
    """A running broker for all tests of a file; each takes sites and a federation of its own."""

    def __init__(self, broker: BrokerProcess, learners: list[Site], controller: Site) -> None:
        self.broker, self.controller = broker, controller
        self._learners = learners
        self._federations = 0

    def learner(self) -> Site:
        return self._learners.pop()

    def federation(self) -> str:
        self._federations += 1
        return f"f{self._federations}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("shared")
    (folder / "broker").mkdir()
    broker = BrokerProcess(folder / "broker")
    sites = Sites(folder, broker)
    learners = [sites(f"learner:l{number}") for number in range(24)]
    controller = sites("controller")
    broker.start()
    yield Shared(broker, learners, controller)
    sites.close()
    if broker.process is not None:
        broker.end()


class Sockets:
    """Makes bare sockets and closes them all at the end."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._made: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        self._made.append(self._context.socket(kind))
        self._made[-1].linger = 0
        return self._made[-1]

    def close(self) -> None:
        for made in self._made:
            made.close()
        self._context.term()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


class Desk:
    """A dispatch with its disk: batches are committed on demand, answers come by principal."""

    def __init__(self, recovered: Recovered | None = None) -> None:
        self.dispatch = Dispatch(recovered or Recovered(), incarnation=9, software="broker")
        self.log: list[Append] = []
        self.now = 100.0
        self.receipts = 0
        self.ended: set[bytes] = set()  # connections that are not there any more

    @staticmethod
    def envelope(publisher: str, epoch: int, sequence: int, **fields: object) -> bytes:
        """An event as its publisher would send it, but for `fields`."""
        name = publisher.partition(":")[2]
        good: dict[str, object] = {
            "version": 1,
            "event_id": bytes(16),
            "topic": f"f/done/{name}/" if name else "f/task/l1/",
            "publisher": publisher,
            "epoch": epoch,
            "sequence": sequence,
            "type": "TaskFailed",
            "payload": f"{publisher} {epoch} {sequence}".encode(),
        }
        return Envelope(**{**good, **fields}).SerializeToString()  # type: ignore[arg-type]

    @staticmethod
    def message(envelope: bytes) -> list[bytes]:
        return [frames.PUBLISH, frames.pack_crc(envelope), envelope]

    def hello(self, principal: str, epoch: int = 1, peer: bytes = b"") -> list[frames.Reply]:
        peer = peer or principal.encode()
        if not self.dispatch.knows(peer):
            assert self.connect(peer, principal)
        hello = Hello(protocol=frames.PROTOCOL, software="test", epoch=epoch)
        return self.send(peer, frames.pack_hello(hello))

    def connect(self, peer: bytes, principal: str) -> bool:
        return self.dispatch.connect(peer, principal, self.now, lambda one: one not in self.ended)

    def send(self, peer: str | bytes, parts: list[bytes]) -> list[frames.Reply]:
        """What `peer` is told. An answer to a fetch comes as it is, and gets the next receipt."""
        peer = peer.encode() if isinstance(peer, str) else peer
        effects = self.dispatch.handle(peer, parts, self.now)
        assert all(isinstance(e, Reply) and e.peer == peer for e in effects), effects
        for effect in effects:
            if isinstance(effect, Reply) and isinstance(effect.message, frames.FetchedBatch):
                self.receipts += 1
                self.dispatch.answered(peer, self.receipts, 100)
        return [effect.message for effect in effects if isinstance(effect, Reply)]

    def publish(self, principal: str, *sequences: int, epoch: int = 1) -> list[frames.Reply]:
        return [
            reply
            for sequence in sequences
            for reply in self.send(
                principal, self.message(self.envelope(principal, epoch, sequence))
            )
        ]

    def commit(self) -> list[frames.Reply]:
        """Seal, store, and return what the publishers are told. Refused events are due."""
        self.dispatch.sequencer.leftovers_due()
        batch = self.dispatch.sequencer.seal(1)
        return self.committed(batch) if batch else []

    def committed(self, batch: Batch) -> list[frames.Reply]:
        self.log.extend(batch.appends)
        return [e.message for e in self.dispatch.committed(batch) if isinstance(e, Reply)]

    @property
    def stored(self) -> list[bytes]:
        return [Envelope.FromString(place.envelope).payload for place in self.log]


@pytest.fixture
def desks() -> type[Desk]:
    return Desk


@pytest.fixture
def desk() -> Desk:
    """One that two learners and the controller have greeted."""
    desk = Desk()
    for principal in ("learner:l1", "learner:l2", "controller"):
        desk.hello(principal)
    return desk
