"""A federation's messaging on loopback: a home with keys, a real broker process, real clients."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from metisfl.broker.client import BrokerClient, ClientKeys, Outbox, Rejected
from metisfl.deploy.keys import Identity, add_peer, create_identity

PATIENCE_S = 15.0  # never waited for in a test that passes


class Site:
    """One principal: its key, its database, its client."""

    def __init__(self, home: Path, identity: Identity, broker: BrokerProcess) -> None:
        self.identity = identity
        self.principal = identity.principal
        self._broker = broker
        self.path = home / f"{identity.principal.replace(':', '-')}.db"
        self.connection = sqlite3.connect(self.path, isolation_level=None)
        self.connection.execute("pragma journal_mode = wal")
        self.connection.execute("pragma synchronous = off")
        self.outbox = Outbox(self.connection, identity.principal)
        self.rejected: list[Rejected] = []

    def client(self) -> BrokerClient:
        return BrokerClient(
            ingress=self._broker.ingress,
            live=self._broker.live,
            keys=self.keys(),
            principal=self.principal,
            outbox=self.outbox,
            software="test",
            on_reject=self.rejected.append,
        )

    def keys(self) -> ClientKeys:
        server = self._broker.identity.public
        return ClientKeys(self.identity.public, self.identity.secret, server)


class BrokerProcess:
    """A broker in a process of its own, which can be killed and started again on its ports."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.keys = home / "keys"
        self.identity = create_identity(self.keys, "broker")
        (self.keys / "peers").touch()
        self.ingress, self.live = free_endpoint(), free_endpoint()
        self.process: subprocess.Popen[bytes] | None = None
        self._log = home / "broker.log"

    def start(self, **options: object) -> BrokerProcess:
        """Start it and wait until it says that it is ready."""
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as notified:
            address = "\0metisfl-test-" + os.urandom(8).hex()
            notified.bind(address)
            notified.settimeout(PATIENCE_S)
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command(),
                    stderr=log,
                    env={**os.environ, "NOTIFY_SOCKET": "@" + address[1:]},
                    **options,  # type: ignore[call-overload]
                )
            assert notified.recv(64) == b"READY=1", self.said()
        return self

    def command(self) -> list[str]:
        service = [sys.executable, "-I", "-m", "metisfl.broker.service"]
        return [*service, "--home", str(self.home), "--ingress", self.ingress, "--live", self.live]

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(PATIENCE_S)
        self.process = None
        return code

    def said(self) -> str:
        return self._log.read_text()

    def log(self) -> list[tuple[int, bytes]]:
        """(sequence, envelope) of everything that is on disk."""
        with closing(sqlite3.connect(self.home / "log" / "events.db")) as database:
            return database.execute("select sequence, envelope from event order by 1").fetchall()


def free_endpoint() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def stopped_broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    (tmp_path / "broker").mkdir()
    process = BrokerProcess(tmp_path / "broker")
    yield process
    if process.process is not None:
        process.kill()


@pytest.fixture
def sites(tmp_path: Path, stopped_broker: BrokerProcess) -> Iterator[Callable[[str], Site]]:
    """Make known principals; call it before the broker starts."""
    made: list[Site] = []

    def make(principal: str) -> Site:
        identity = create_identity(tmp_path / principal.replace(":", "-"), principal)
        add_peer(stopped_broker.keys, principal, identity.public)
        made.append(Site(tmp_path, identity, stopped_broker))
        return made[-1]

    yield make
    for site in made:
        site.connection.close()


def within(seconds: float, work: asyncio.Future[object] | object) -> object:
    return asyncio.wait_for(work, seconds)  # type: ignore[arg-type]
