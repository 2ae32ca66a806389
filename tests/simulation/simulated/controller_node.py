"""The controller: what shell.py does, around the real Conductor, Leases, snapshots and records.

Law: state comes from the snapshot and the log behind it; what the state calls for is committed to
the outbox before it is sent; nothing is decided before the log was read to its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from metisfl.controller.bulk import Expected
from metisfl.controller.conductor import Conductor
from metisfl.controller.effects import Fold, Publish
from metisfl.controller.lease import Leases
from metisfl.controller.record import record_of
from metisfl.controller.scheduling import waits
from metisfl.controller.snapshot import pack, unpack
from metisfl.controller.state import Logged, Phase, Run, Status
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.chunk import federation_digest
from metisfl.proto.events import decode
from metisfl.proto.frames import Beat
from metisfl.proto.records import pack_record
from simulated.bulk_door import BulkDoor
from simulated.client import Client, Records
from simulated.disk import Changes, Disk, Outbox
from simulated.invariants import Invariants
from simulated.network import Network
from simulated.scenario import FEDERATION, Scenario, folded
from simulated.scheduler import Broken, Node, Scheduler
from simulated.spool import Spool, Store

__all__ = ["ControllerNode"]

LANE: Final = topics.federation_lane(FEDERATION)
DRAINED_S: Final = 0.05  # between two looks at the outbox
STATUS_S: Final = 1.0
STOPPED_S: Final = 3 * STATUS_S
RETURN_S: Final = 6.0


class ControllerNode(Node):
    """The one controller of the federation."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        invariants: Invariants,
        scenario: Scenario,
    ) -> None:
        super().__init__(scheduler, "controller")
        self.disk = Disk(self)
        self.spoil_chance = 0.0  # that an update cannot be folded
        self._network, self._invariants, self._scenario = network, invariants, scenario
        self.client: Client | None = None
        self.spool = Spool(self, self.disk, scenario.chunks)
        self._store = Store(self.disk)
        self.door = BulkDoor(self, self.spool, self._store, scenario, invariants, self._on_stored)
        network.listen("bulk", self)

    # ---- Life ---------------------------------------------------------------------------

    def boot(self) -> None:
        snapshot = self.disk.get("snapshot")
        terms = self._scenario.terms
        run = Run(FEDERATION, terms) if snapshot is None else unpack(snapshot, terms)
        self.conductor = Conductor(run)
        self._since_snapshot = 0
        self._leases = Leases()
        self._lease_timer = 0  # the number of the one that counts
        self._live = False
        self._stored: list[Publish] = []
        self._deaf_at, self._told_at = -math.inf, self.now
        self._outbox = Outbox(self.disk, "controller")
        self.client = Client(self, self._network, self._outbox, self._invariants)
        self.client.beats(f"{FEDERATION}/beat/", self._on_beat)
        self.door.open()
        self._drain()
        self.later(STATUS_S, self._tell)

    def died(self, *, power_cut: bool) -> None:
        if power_cut:
            self.disk.power_cut()
        self.client = None
        self.door.close()

    def connected(self, connection: Any) -> None:
        self.door.connected(connection)

    def received(self, connection: Any, frame: Any) -> None:
        self.door.received(connection, frame)

    def _drain(self) -> None:
        """What a former process decided must be in the log before this one decides anything."""
        assert self.client is not None
        if self.client.drained:
            self.client.read(LANE, self._on_batch)
        else:
            self.later(DRAINED_S, self._drain)

    # ---- The log ------------------------------------------------------------------------

    def _on_batch(self, records: Records, through: int, caught_up: bool, trimmed_to: int) -> None:
        if trimmed_to:
            raise Broken("I7", f"the log was trimmed to {trimmed_to} before the controller read it")
        for logged, envelope, message in records:
            before = self.conductor.run
            dropped = self.conductor.take(Logged(message, envelope.publisher, logged))
            run = self.conductor.run
            if dropped and self._live:
                self.say("drops", envelope.type, envelope.correlation_id, dropped)
            if run.record != before.record and (record := record_of(run)) is not None:
                name = ("record", (record.run_id, record.round))
                self.disk.files.setdefault(name, (pack_record(record), True))
        if caught_up:
            self._act()
        self._invariants.controller_read(self.conductor.run, through)
        self._since_snapshot += len(records)
        if self._since_snapshot >= self._scenario.snapshot_events:
            self._snapshot(through)

    def _snapshot(self, through: int) -> None:
        run = self.conductor.run
        packed = pack(run)
        self._invariants.packed(run, packed)
        changes: Changes = {"snapshot": packed}
        self._outbox.advance(changes, LANE, through)
        self.disk.commit(changes)
        self._since_snapshot = 0

    def _act(self) -> None:
        self._live = True
        self._expect()
        due = self.conductor.due()
        self._publish([effect for effect in due if isinstance(effect, Publish)])
        for effect in due:
            if isinstance(effect, Fold):
                self.say("folds", effect.key, len(effect.contributions))
                takes_s = 0.01 + 0.3 * self.scheduler.random.random()
                self.later(takes_s, self._fold, effect)
        self._leases = self._leases.watch(waits(self.conductor.run), self.now)
        self._set_lease_timer()

    def _publish(self, effects: Sequence[Publish]) -> None:
        if not effects:
            return
        assert self.client is not None
        changes: Changes = {}
        for effect in effects:
            self.say("publishes", effect.key)
            self._outbox.append(changes, effect.topic, effect.message, effect.correlation_id)
        self.disk.commit(changes)
        self.client.flush()

    # ---- Updates ------------------------------------------------------------------------

    def _expect(self) -> None:
        """Tell the bulk endpoint whose updates are welcome now."""
        run = self.conductor.run
        plan = run.plan
        if plan is None or run.phase not in (Phase.TRAINING, Phase.OPENING):
            self.door.expect({})
            return
        self.door.expect(
            {
                task.task_id: Expected(
                    learner=f"learner:{task.learner}",
                    model_digest=run.model_digest or None,
                    federation=federation_digest(FEDERATION, plan.run_id),
                    stored_digest=task.stored_digest,
                    learners=len(plan.learners),
                )
                for task in run.tasks.values()
                if task.status in (Status.INVITED, Status.ASSIGNED, Status.COMPLETED)
            }
        )

    def _on_stored(self, task_id: str, digest: bytes, update_bytes: int) -> None:
        """In the loop's thread; those that come together are one transaction."""
        stored = self.conductor.stored(task_id, digest, update_bytes)
        if stored and not self._stored:
            self.later(0.0, self._publish_stored)
        self._stored += stored

    def _publish_stored(self) -> None:
        stored, self._stored = self._stored, []
        self._publish(stored)

    def _fold(self, fold: Fold) -> None:
        random = self.scheduler.random
        for one in fold.contributions:
            if self.disk.read(("update", one.task_id)) != one.digest:
                raise Broken("I3", f"the stored update of {one.task_id} is not in the spool")
        if not self.scheduler.calm and random.random() < self.spoil_chance:
            position = random.randrange(len(fold.contributions))
            self.say("cannot fold", fold.contributions[position].task_id)
            self._publish([self.conductor.unusable(fold, position, "the disk has spoilt it")])
            return
        digest = folded(
            fold.base_digest, [(one.learner, one.weight, one.digest) for one in fold.contributions]
        )
        self._store.put(digest)
        run = self.conductor.run
        self.crash_point(likelier=20)
        self.later(0.01 * random.random(), self._forget, fold, digest, list(run.tasks), run)

    def _forget(self, fold: Fold, digest: bytes, task_ids: Iterable[str], run: Run) -> None:
        """Delete the updates of closed rounds and models that nobody can ask for any more."""
        self.spool.keep([*task_ids])
        self._store.keep([*run.recent_models, digest])
        self._publish([self.conductor.folded(fold, digest)])

    # ---- Leases -------------------------------------------------------------------------

    def _on_beat(self, beat: Beat) -> None:
        message = decode(beat.type, beat.payload)
        if isinstance(message, pb.Progress):
            self._leases = self._leases.renew(message.learner, message.task_id, self.now)

    def _tell(self) -> None:
        """Hold the leases while nobody can be heard."""
        assert self.client is not None
        if not self.client.window.welcomed or self.now - self._told_at > STOPPED_S:
            self._deaf_at = self.now
        if self.now - self._deaf_at < RETURN_S:
            self._leases = self._leases.afresh(self.now)
            self._set_lease_timer()
        self._told_at = self.now
        self.later(STATUS_S, self._tell)

    def _set_lease_timer(self) -> None:
        self._lease_timer += 1
        end = self._leases.next_end()
        if end is not None:
            delay_s = max(end - self.now, 0.0) + 0.001
            self.later(delay_s, self._end_leases, self._lease_timer)

    def _end_leases(self, timer: int) -> None:
        if timer != self._lease_timer:
            return
        self._leases, ended = self._leases.end(self.now)
        self._publish(self.conductor.lapsed(ended))
        self._set_lease_timer()
