"""A driver: it asks for runs, one after the other, stops some, and reads everything.

Law: that a run was asked for is committed with the place in the log at which it was.
"""

from __future__ import annotations

from typing import Final

from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from simulated.client import Client, Records
from simulated.disk import Changes, Disk, Outbox
from simulated.invariants import Invariants
from simulated.network import Network
from simulated.scenario import FEDERATION, Scenario
from simulated.scheduler import Node, Scheduler

__all__ = ["DriverNode"]

LANE: Final = topics.federation_lane(FEDERATION)


class DriverNode(Node):
    """One driver."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        invariants: Invariants,
        scenario: Scenario,
    ) -> None:
        super().__init__(scheduler, "driver")
        self.disk = Disk(self)
        self._network, self._invariants, self._scenario = network, invariants, scenario
        self.client: Client | None = None

    @property
    def ended(self) -> bool:
        """Whether the last run that it asks for has ended, as far as it has read."""
        return bool(self.disk.get("ended", 0) == len(self._scenario.runs))

    def boot(self) -> None:
        self._outbox = Outbox(self.disk, "driver:d")
        self.client = Client(self, self._network, self._outbox, self._invariants)
        self.client.read(LANE, self._on_batch)

    def died(self, *, power_cut: bool) -> None:
        if power_cut:
            self.disk.power_cut()
        self.client = None

    def _stop(self, run_id: str) -> None:
        """What it reads again after a crash it may stop again."""
        assert self.client is not None
        self.say("stops", run_id)
        changes: Changes = {}
        stopped = pb.RunStopped(run_id=run_id, reason="enough")
        self._outbox.append(changes, topics.run_topic(FEDERATION), stopped, run_id)
        self.disk.commit(changes)
        self.client.flush()

    def _on_batch(self, records: Records, through: int, caught_up: bool, trimmed_to: int) -> None:
        assert self.client is not None
        changes: Changes = {}
        ended = self.disk.get("ended", 0)
        for _, _, message in records:
            current = self._scenario.runs[ended].run_id if ended < len(self._scenario.runs) else ""
            if (
                isinstance(message, pb.RunStarted | pb.RoundOpened)
                and message.run_id == current
                and self._scenario.stops(current, getattr(message, "round", -1))
            ):
                self.later(2.0 * self.scheduler.random.random(), self._stop, current)
            if isinstance(message, pb.RunFinished) and message.run_id == current:
                ended += 1
                changes["ended"] = ended
        if trimmed_to:  # somebody has to tell it what it missed; then as if it had read it
            ended = self._invariants.runs_finished(through)
            changes["ended"] = ended
        if self.disk.get("asked", 0) <= ended < len(self._scenario.runs):
            plan = self._scenario.runs[ended]
            self.say("asks for", plan.run_id)
            self._outbox.append(changes, topics.run_topic(FEDERATION), plan, plan.run_id)
            if self._scenario.asks_in_vain:
                vain = pb.RunStarted.FromString(plan.SerializeToString())
                vain.run_id = f"{plan.run_id}-vain"
                self._outbox.append(changes, topics.run_topic(FEDERATION), vain, vain.run_id)
            changes["asked"] = ended + 1
        self._outbox.advance(changes, LANE, through)
        self.disk.commit(changes)
        self.client.flush()
