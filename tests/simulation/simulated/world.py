"""One federation from one seed, from its first start to its last quiet moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from metisfl.controller.state import Phase
from metisfl.learner.task import Stage
from simulated.broker_node import BrokerNode
from simulated.controller_node import ControllerNode
from simulated.driver_node import DriverNode
from simulated.faults import Faults
from simulated.invariants import Invariants
from simulated.learner_node import LearnerNode
from simulated.ledger import RunLedger
from simulated.network import Network
from simulated.scenario import Scenario
from simulated.scheduler import Broken, Node, Scheduler
from simulated.spool import hashing_is_simulated

__all__ = ["History", "World", "compare_with_twin", "simulate"]

CALM_S_MAX: Final = 400.0  # after which a run that has not ended never will
LOOK_S: Final = 0.25


@dataclass(frozen=True)
class History:
    """What is left of a world."""

    seed: int
    rounds: int
    virtual_s: float
    runs: dict[str, RunLedger]

    def counted(self) -> dict[str, dict[int, tuple[str, ...]]]:
        """Who counted, by run and round."""
        return {run_id: run.counted for run_id, run in self.runs.items()}

    def models(self, run_id: str) -> dict[int, bytes]:
        return self.runs[run_id].models


class World:
    """All nodes, between their clocks, network and disks."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.scheduler = Scheduler(scenario.seed)
        self.network = Network(self.scheduler)
        self.invariants = Invariants(self.scheduler, scenario)
        shared = (self.scheduler, self.network, self.invariants)
        self.broker = BrokerNode(*shared)
        self.broker.fetch_events, self.broker.keep_s = scenario.fetch_events, scenario.keep_s
        self.controller = ControllerNode(*shared, scenario)
        self.driver = DriverNode(*shared, scenario)
        self.learners = [LearnerNode(*shared, scenario, name) for name in scenario.learners]
        self.nodes: list[Node] = [self.broker, self.controller, self.driver, *self.learners]
        for node in self.nodes:
            node.on_death.append(self.network.died)
        self.invariants.disks = {
            "controller": self.controller.disk,
            "driver:d": self.driver.disk,
            **{f"learner:{one.name}": one.disk for one in self.learners},
        }
        self._calm_at: float | None = None
        self._quiet = False
        self._faults = Faults(self.scheduler, self.network, scenario, self.nodes)

    def run(self) -> History:
        """Let it happen. Raises Broken, and whatever a core raises that must not."""
        with hashing_is_simulated():
            for node in self.nodes:
                delay_s = self.scheduler.random.uniform(0.0, 1.0)
                self.scheduler.at(delay_s, node, node.start)
            self._faults.begin()
            self.scheduler.at(LOOK_S, None, self._look)
            self.scheduler.run(lambda: self._quiet)
            self._finish()
        ledger = self.invariants.ledger
        return History(
            seed=self.scenario.seed,
            rounds=ledger.rounds,
            virtual_s=self.scheduler.now,
            runs=ledger.runs,
        )

    def _look(self) -> None:
        scheduler = self.scheduler
        if self.driver.ended:
            self._faults.end()  # whatever goes wrong now has nobody left to hurt
        if scheduler.calm:
            if self._calm_at is None:
                self._calm_at = scheduler.now
            self._quiet = self._all_quiet()
            if scheduler.now - self._calm_at > CALM_S_MAX:
                raise Broken("I4", f"{CALM_S_MAX} s after the last fault: {self._unrest()}")
        scheduler.at(scheduler.now + LOOK_S, None, self._look)

    def _all_quiet(self) -> bool:
        return not self._unrest()

    def _unrest(self) -> str:
        """What is still under way; "" if nothing is."""
        down = [node.name for node in self.nodes if not node.up]
        if down:
            return f"{down} are down"
        state = self.invariants.states[-1]
        if not self.driver.ended or state.phase is not Phase.FINISHED or state.refused:
            return f"the driver waits; the log's state is {state.phase.value}, round {state.round}"
        head = len(self.invariants.messages)
        for node in (self.controller, self.driver, *self.learners):
            client = node.client
            if client is None or not client.drained:
                return f"{node.name} has events that are not acknowledged"
            for name, (lane, _) in client.lanes.items():
                if not lane.caught_up or lane.news or lane.cursor < self.broker_head(name):
                    return f"{node.name} is behind in {name}: {lane.cursor} of {head}"
            if not client.lanes:
                return f"{node.name} reads nothing"
        for learner in self.learners:
            # Who has missed the end of its last task learns of it with the next.
            jobs = {} if learner.has_missed else learner.tasks.jobs
            for task_id, job in jobs.items():
                if job.stage is not Stage.REPORTED:
                    return f"{learner.name} has {task_id}, which is {job.stage.value}"
        return ""

    def broker_head(self, lane: str) -> int:
        """The newest record of a lane on the broker's disk."""
        sequences = self.invariants.lanes[lane]
        return sequences[-1] if sequences else 0

    def _finish(self) -> None:
        cursors = {
            (node.name, name): lane.cursor
            for node in (self.controller, self.driver, *self.learners)
            if node.client is not None
            for name, (lane, _) in node.client.lanes.items()
        }
        self.invariants.finish(cursors)
        self.invariants.ledger.check_records(self.controller.disk.files)


def simulate(seed: int, *, faults: bool = True) -> History:
    """One seed's history. Raises Broken."""
    return World(Scenario.of(seed, faults=faults)).run()


def compare_with_twin(history: History) -> bool:
    """Compare a history with that of the same federation without faults; return whether it can be.

    Whose rounds counted the same learners must end with the same models. Raises Broken.
    """
    twin = simulate(history.seed, faults=False)
    mine, theirs = history.counted(), twin.counted()
    alike = [run_id for run_id in mine if mine[run_id] == theirs.get(run_id)]
    for run_id in alike:
        for number in mine[run_id]:
            if history.models(run_id)[number] != twin.models(run_id)[number]:
                raise Broken("I6", f"{run_id}: the same learners give another model without faults")
    return bool(alike)
