"""Connections between nodes, and what becomes of what is sent over them.

Law 1: a message arrives late, twice, out of order or not at all; a connection that is cut takes all
with it that is on its way, and the next one has another routing id.
Law 2: `in_order` messages may be lost, but neither overtake each other nor come twice. The broker's
words to a publisher are such: TCP keeps their order, and the window relies on it (an old "I expect
7" after a newer "I have 9" reads as a lost log). Everything else is treated worse than TCP would.
Law 3: a subscription is part of its connection: it comes late, but it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from simulated.scheduler import Node, Scheduler

__all__ = ["Connection", "Network", "Server"]

HANDSHAKE_S: Final = (0.002, 0.05)


class Server(Protocol):
    """What the listening end of connections does with them."""

    def connected(self, connection: Connection) -> None: ...

    def received(self, connection: Connection, message: Any) -> None: ...


class Connection:
    """One life of one connection. `kind` is the server's door: "ingress", "live" or "bulk"."""

    __slots__ = (
        "_last",
        "client",
        "cut",
        "deliver",
        "kind",
        "lost_until",
        "network",
        "on_cut",
        "prefixes",
        "principal",
        "route",
        "server",
    )

    def __init__(
        self, network: Network, kind: str, client: Node, server: Any, principal: str
    ) -> None:
        self.network, self.kind, self.client, self.server = network, kind, client, server
        self.principal = principal
        self.route = b""
        self.cut = False
        self.lost_until = 0.0  # of messages to the client: it reads too slowly
        self.prefixes: set[bytes] = set()
        self.deliver: Callable[[Connection, Any], None] = _nobody
        self.on_cut: Callable[[Connection], None] = _nobody
        self._last = [0.0, 0.0]

    def to_server(self, message: Any, *, in_order: bool = False) -> None:
        self.network.send(self, True, message, in_order)

    def to_client(self, message: Any, *, in_order: bool = False) -> None:
        self.network.send(self, False, message, in_order)

    def close(self) -> None:
        """By the client, on purpose: nobody is told, and nothing more arrives."""
        if not self.cut:
            self.cut = True
            self.network.forget(self)

    def order(self, to_server: bool, time: float) -> float:
        """The time of arrival at which an ordered message overtakes none."""
        self._last[to_server] = time = max(time, self._last[to_server])
        return time


class Network:
    """All connections, and how bad the weather is."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._servers: dict[str, Any] = {}
        self.connections: dict[bytes, Connection] = {}
        self._partitions: list[tuple[frozenset[str], float]] = []
        self._routes = 0
        self.loss = self.duplication = self.long_delays = 0.0
        self.delay_s = 0.01
        self.sent = 0

    def listen(self, door: str, server: Any) -> None:
        self._servers[door] = server

    def connect(
        self,
        kind: str,
        client: Node,
        principal: str,
        deliver: Callable[[Connection, Any], None],
        on_up: Callable[[Connection], None],
        on_cut: Callable[[Connection], None],
    ) -> Connection:
        """Begin to connect; `on_up` follows, or `on_cut` if nobody answers."""
        connection = Connection(self, kind, client, self._servers[kind], principal)
        connection.deliver, connection.on_cut = deliver, on_cut
        delay_s = self._scheduler.random.uniform(*HANDSHAKE_S)
        client.later(delay_s, self._shake_hands, connection, on_up)
        return connection

    def _shake_hands(self, connection: Connection, on_up: Callable[[Connection], None]) -> None:
        server, client = connection.server, connection.client
        if connection.cut:
            return
        frozen = server.frozen_until > self._scheduler.now
        if not server.up or frozen or self.separated(client.name, server.name):
            connection.cut = True
            connection.on_cut(connection)
            return
        self._routes += 1
        connection.route = self._routes.to_bytes(5, "big")
        self.connections[connection.route] = connection
        on_up(connection)
        server.connected(connection)

    def send(self, connection: Connection, to_server: bool, message: Any, in_order: bool) -> None:
        """Put a message on its way, wherever that leads."""
        sender, receiver = connection.client, connection.server
        if not to_server:
            sender, receiver = receiver, sender
        sender.crash_point(power_cut_chance=0.1)
        scheduler = self._scheduler
        now, chance = scheduler.now, scheduler.random.random
        if connection.cut or self.separated(sender.name, receiver.name):
            return
        if not to_server and now < connection.lost_until:
            return
        self.sent += 1
        copies = 1
        if self.loss and chance() < self.loss:
            return
        if self.duplication and not in_order and chance() < self.duplication:
            copies = 2
        for _ in range(copies):
            arrival = now + self.delay_s * (0.1 + chance())
            if self.long_delays and chance() < self.long_delays:
                arrival += 1.5 * chance()
            if in_order:
                arrival = connection.order(to_server, arrival)
            scheduler.at(arrival, receiver, self._arrive, connection, to_server, message)

    def _arrive(self, connection: Connection, to_server: bool, message: Any) -> None:
        if connection.cut:
            return
        if to_server:
            connection.server.received(connection, message)
        else:
            connection.deliver(connection, message)

    def probe(self, connection: Connection) -> None:
        """The empty message of PROBE_ROUTER: the connection's first, or it never comes."""
        if self._scheduler.random.random() >= self.loss:
            server = connection.server
            self._scheduler.at(self._scheduler.now, server, server.received, connection, [b""])

    def subscribe(self, connection: Connection, prefix: bytes) -> None:
        """Tell the publisher of a live connection what is wanted; it is never lost."""
        delay_s = self.delay_s * (0.1 + self._scheduler.random.random())
        arrival = connection.order(True, self._scheduler.now + delay_s)
        server = connection.server
        self._scheduler.at(arrival, server, server.subscribed, connection, prefix)

    # ---- Bad weather -----------------------------------------------------------------

    def cut(self, connection: Connection, noticed_s: float) -> None:
        """Lose a connection and all that is on its way; its client notices after a while."""
        if connection.cut:
            return
        connection.cut = True
        self.forget(connection)
        connection.client.later(noticed_s, connection.on_cut, connection)

    def partition(self, names: frozenset[str], duration_s: float) -> None:
        """Let nothing through between these nodes and all others."""
        self._partitions.append((names, self._scheduler.now + duration_s))

    def separated(self, one: str, other: str) -> bool:
        if not self._partitions:
            return False
        now = self._scheduler.now
        self._partitions = [entry for entry in self._partitions if entry[1] > now]
        return any((one in names) != (other in names) for names, _ in self._partitions)

    def calm(self) -> None:
        """No more loss, repetition, long delays or partitions."""
        self.loss = self.duplication = self.long_delays = 0.0
        self._partitions.clear()
        for connection in self.connections.values():
            connection.lost_until = 0.0

    def forget(self, connection: Connection) -> None:
        self.connections.pop(connection.route, None)

    def died(self, node: Node) -> None:
        """A node's connections end with it; most of its peers notice at once."""
        random = self._scheduler.random
        for connection in list(self.connections.values()):
            if connection.server is node:
                noticed_s = 0.001 if random.random() < 0.7 else random.uniform(0.1, 3.0)
                self.cut(connection, noticed_s)
            elif connection.client is node:
                connection.close()


def _nobody(connection: Connection, message: Any = None) -> None:
    raise AssertionError(f"nobody reads {connection.kind}")
