"""The bulk endpoint: what controller/bulk.py and downloads.py do, around the real Uploads.

Law: it is a thread beside the controller's: what one tells the other arrives a moment later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Final

from metisfl.controller.bulk import Expected
from metisfl.controller.uploads import Uploads
from metisfl.proto.bulk import Chunk, Code, Credit, Frame, Get, Model, Open, Refused, Stored
from metisfl.proto.credit import WORD_S, Allocator
from simulated.invariants import Invariants
from simulated.network import Connection
from simulated.scenario import Scenario
from simulated.scheduler import Node
from simulated.spool import Spool, Store, Welcome
from simulated.transfer import manifest_of

__all__ = ["BulkDoor"]

MOMENT_S: Final = 0.001  # from one thread to the other


class BulkDoor:
    """Takes updates into the spool and gives models from the store."""

    def __init__(
        self,
        node: Node,
        spool: Spool,
        store: Store,
        scenario: Scenario,
        invariants: Invariants,
        on_stored: Callable[[str, bytes, int], None],
    ) -> None:
        self._node, self._spool, self._store = node, spool, store
        self._scenario, self._invariants = scenario, invariants
        self._on_stored = on_stored
        self.close()

    def open(self) -> None:
        """Serve, in a new life of the controller."""
        self.uploads = Uploads(
            self._spool,  # type: ignore[arg-type]
            Welcome(),
            self._send,
            self._announce,
            lambda *_: None,
            Counter(),
        )
        # A budget that so few and small updates can exhaust.
        budget = self._scenario.budget
        self.uploads._credit = Allocator(budget, max(1, budget // 2))
        self._node.later(WORD_S / 2, self._tick)

    def close(self) -> None:
        """The process has ended: nothing is noted any more."""
        self._routes: dict[bytes, Connection] = {}
        self._gone: set[bytes] = set()
        self._expected: Mapping[str, Expected] | None = None
        self._adopted: Mapping[str, Expected] | None = None
        self._working = False

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """From the controller's thread: these tasks are open."""
        if expected != self._expected:
            self._expected = expected
            self._node.later(MOMENT_S, self._work)

    def connected(self, connection: Connection) -> None:
        self._routes[connection.route] = connection

    def received(self, connection: Connection, frame: Any) -> None:
        route, principal, now = connection.route, connection.principal, self._node.now
        if isinstance(frame, Chunk):
            self.uploads.chunk(frame, principal, route, now)
        elif isinstance(frame, Open):
            self._adopt()
            self.uploads.open(frame, principal, route, now)
        else:
            self._give(frame, route)
        self._work()

    def _give(self, frame: Get, route: bytes) -> None:
        if self._store.contains(frame.digest):
            manifest = manifest_of(self._scenario.chunks)
            self._send(route, Model(frame.digest, manifest.payload_bytes, b""))
        else:
            reason = f"no model {frame.digest.hex()[:8]} here"
            self._send(route, Refused(frame.subject, Code.UNKNOWN_MODEL, reason))

    def _adopt(self) -> None:
        if self._expected is not None and self._expected is not self._adopted:
            self._adopted = self._expected
            self.uploads.expect(self._expected, self._node.now)

    def _work(self) -> None:
        self._adopt()
        more = self.uploads.work(self._node.now)
        self._invariants.credit(self.uploads)
        if self._gone:
            self.uploads.unreachable(self._gone)
            self._gone.clear()
        if more and not self._working:
            self._working = True
            self._node.later(0.0001, self._work_on)

    def _work_on(self) -> None:
        self._working = False
        self._work()

    def _tick(self) -> None:
        self.uploads.tick(self._node.now)
        self._work()
        self._node.later(WORD_S / 2, self._tick)

    def _announce(self, task_id: str, digest: bytes, update_bytes: int) -> None:
        self._node.say("has", task_id, digest)
        self._node.later(MOMENT_S, self._on_stored, task_id, digest, update_bytes)

    def _send(self, route: bytes, frame: Frame) -> bool:
        connection = self._routes.get(route)
        if connection is None or connection.cut:
            self._routes.pop(route, None)
            self._gone.add(route)
            return False
        if isinstance(frame, Stored):
            self._invariants.answered_stored(frame.subject)
        elif isinstance(frame, Credit):
            self._invariants.asked_for(frame)
        elif isinstance(frame, Refused):
            self._node.say("refuses", connection.principal, frame.reason)
        connection.to_client(frame)
        return True
