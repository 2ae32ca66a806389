"""A site in a ceremony: what learner/ceremony_shell.py does, around the real learner.ceremony.

Law: what binds a site is on its disk before it is said. What it read is read again from where that
was written, and what it says again is what it has said.
"""

from __future__ import annotations

from collections.abc import Iterable

from ceremony_world import Site

from metisfl.learner import ceremony as core
from metisfl.learner.ceremony_kept import Kept, pack, parse
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.ceremony import Manifest
from simulated.client import Client, Records
from simulated.disk import Changes, Disk, Outbox
from simulated.invariants import Invariants
from simulated.network import Network
from simulated.scenario import FEDERATION
from simulated.scheduler import Node, Scheduler

__all__ = ["CeremonySite"]

STATE = "ceremony.state"
STATE_IS_SYNCED = True
LANE = topics.ceremony_topic(FEDERATION)


class CeremonySite(Node):
    """One process of one site."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        invariants: Invariants,
        manifest: Manifest,
        name: str,
    ) -> None:
        super().__init__(scheduler, name)
        self.disk = Disk(self)
        self.client: Client | None = None
        self._network, self._invariants, self._manifest = network, invariants, manifest
        self.part: _Part | None = None

    def boot(self) -> None:
        self._outbox = Outbox(self.disk, f"learner:{self.name}")
        self.client = Client(self, self._network, self._outbox, self._invariants)
        self.part = _Part(self, self._manifest, self.name)
        self.client.read(LANE, self._on_batch)

    def died(self, *, power_cut: bool) -> None:
        if power_cut:
            self.disk.power_cut()
        self.client = self.part = None

    def say_all(self, records: Iterable[core.Heard]) -> None:
        """Publish what this site says."""
        assert self.client is not None
        changes: Changes = {}
        for record in records:
            self.say("says", record.step.step)
            self._outbox.append(changes, LANE, record.step)
        self.disk.commit(changes)
        self.client.flush()

    def _on_batch(self, records: Records, through: int, caught_up: bool, trimmed_to: int) -> None:
        assert self.part is not None
        for _, envelope, message in records:
            if isinstance(message, pb.CeremonyStep):
                self.part.hear(core.Heard(envelope.publisher, message))
        changes: Changes = {}
        self._outbox.advance(changes, LANE, through)
        self.disk.commit(changes, sync=False)


class _Part(Site):
    """The site's part, on the disk and the log of its node."""

    def __init__(self, node: CeremonySite, manifest: Manifest, name: str) -> None:
        self._node = node
        super().__init__(manifest, name, _Outgoing(node))

    def start(self) -> None:
        """What is on disk holds; only a site without anything begins anew."""
        found = self._node.disk.read(STATE)
        if found is None:
            super().start()
            return
        kept = parse(found, self.manifest, self.name)
        assert isinstance(kept, Kept)
        self._kept, self._made = kept, None
        self._perform(core.resume(kept.state))

    def hear(self, event: core.Heard) -> None:
        self._happen(event)

    def _save(self) -> None:
        self._node.crash_point(likelier=3)
        self._node.disk.files[STATE] = (pack(self._kept), STATE_IS_SYNCED)
        self._node.crash_point(likelier=3)


class _Outgoing(list[core.Heard]):
    """What is put here goes into the log of all."""

    def __init__(self, node: CeremonySite) -> None:
        self._node = node

    def extend(self, records: Iterable[core.Heard]) -> None:
        self._node.say_all(records)
