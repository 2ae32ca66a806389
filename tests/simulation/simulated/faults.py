"""What goes wrong, and when.

Law: until `faults_until`, or the end of the last run, anything may happen to anybody, several
things at once; then nothing more does, every node thaws and comes back, and the federation must
come to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulated.broker_node import BrokerNode
from simulated.controller_node import ControllerNode
from simulated.learner_node import LearnerNode
from simulated.network import Network
from simulated.scenario import Scenario
from simulated.scheduler import Node, Scheduler

__all__ = ["Faults"]


class Faults:
    """Makes trouble for one world."""

    def __init__(
        self,
        scheduler: Scheduler,
        network: Network,
        scenario: Scenario,
        nodes: Sequence[Node],
    ) -> None:
        self._scheduler, self._network, self._scenario = scheduler, network, scenario
        self._nodes = list(nodes)
        (self._broker,) = (node for node in nodes if isinstance(node, BrokerNode))
        controllers = [node for node in nodes if isinstance(node, ControllerNode)]
        self._controller = controllers[0] if controllers else None  # a ceremony has none
        self._random = scheduler.random

    def begin(self) -> None:
        if not self._scenario.faults:
            self.end()
            return
        choose = self._random
        self._scheduler.crash_chance = self._scenario.crash_chance
        for node in self._nodes:
            if isinstance(node, LearnerNode):
                node.hang_chance = choose.choice((0.0, 0.05, 0.25))
        if self._controller is not None:
            self._controller.spoil_chance = choose.choice((0.0, 0.2))
        self._weather()
        self._next()
        self._scheduler.at(self._scenario.faults_until, None, self.end)

    def _next(self) -> None:
        delay_s = self._random.expovariate(1 / self._scenario.fault_every_s)
        self._scheduler.at(self._scheduler.now + delay_s, None, self._one)

    def _one(self) -> None:
        if self._scheduler.calm:
            return
        likely = {
            self._kill: 5,
            self._freeze: 3,
            self._cut: 5,
            self._partition: 2,
            self._weather: 2,
            self._slow_reader: 2,
            self._full_disk: 1,
            self._slow_disk: 1,
            self._clock: 1,
            self._leave: 0.5,
        }
        (fault,) = self._random.choices(list(likely), list(likely.values()))
        fault()
        self._next()

    def end(self) -> None:
        """Nothing more goes wrong."""
        scheduler = self._scheduler
        if scheduler.calm:
            return
        scheduler.say("world", "is calm")
        scheduler.calm = True
        scheduler.crash_chance = 0.0
        self._network.calm()
        self._broker.full_until = self._broker.slow_until = 0.0
        if self._controller is not None:
            self._controller.spool.full_until = 0.0
        for node in self._nodes:
            if isinstance(node, LearnerNode):
                node.hang_chance = 0.0
                node.leaves = False

    # ---- Faults -----------------------------------------------------------------------------

    def _node(self) -> Node:
        """Anybody, and the two that all depend on more often."""
        return self._random.choice([*self._nodes, *self._nodes[:2]])

    def _kill(self) -> None:
        power_cut = self._random.random() < 0.4
        down_s = self._random.choice((0.01, 0.3, 2.0, 8.0)) * (0.5 + self._random.random())
        self._node().crash(power_cut=power_cut, down_s=down_s)

    def _freeze(self) -> None:
        node = self._node()
        if node.up:
            duration_s = self._random.choice((0.2, 1.0, 4.0, 20.0)) * self._random.random()
            node.say("freezes", duration_s)
            node.frozen_until = max(node.frozen_until, self._scheduler.now + duration_s)

    def _cut(self) -> None:
        """One connection, half of the time that of a transfer, if there is one."""
        found = [connection for _, connection in sorted(self._network.connections.items())]
        transfers = [connection for connection in found if connection.kind == "bulk"]
        if found:
            of = transfers if transfers and self._random.random() < 0.5 else found
            connection = self._random.choice(of)
            noticed_s = self._random.choice((0.001, 0.5, 5.0)) * self._random.random()
            connection.client.say("is cut off from", connection.kind, noticed_s)
            self._network.cut(connection, noticed_s)

    def _partition(self) -> None:
        names = [node.name for node in self._nodes]
        some = self._random.sample(names, self._random.randint(1, max(1, len(names) // 2)))
        duration_s = self._random.uniform(0.3, 8.0)
        self._scheduler.say("world", "is divided:", *sorted(some), duration_s)
        self._network.partition(frozenset(some), duration_s)

    def _weather(self) -> None:
        """How bad the network is from now on."""
        choose = self._random.choice
        network = self._network
        network.loss = choose((0.0, 0.0, 0.01, 0.05, 0.2))
        network.duplication = choose((0.0, 0.05, 0.2))
        network.long_delays = choose((0.0, 0.0, 0.02, 0.1))
        network.delay_s = choose((0.002, 0.02, 0.1))

    def _slow_reader(self) -> None:
        live = [c for _, c in sorted(self._network.connections.items()) if c.kind == "live"]
        if live:
            connection = self._random.choice(live)
            connection.client.say("reads too slowly")
            connection.lost_until = self._scheduler.now + self._random.uniform(0.1, 4.0)

    def _full_disk(self) -> None:
        until = self._scheduler.now + self._random.uniform(0.1, 3.0)
        if self._random.random() < 0.5 or self._controller is None:
            self._broker.say("has no room")
            self._broker.full_until = until
        else:
            self._controller.say("has no room")
            self._controller.spool.full_until = until

    def _slow_disk(self) -> None:
        self._broker.slow_until = self._scheduler.now + self._random.uniform(0.5, 5.0)

    def _clock(self) -> None:
        node = self._node()
        node.wall_offset_ns += int(self._random.uniform(-3600, 3600) * 1e9)

    def _leave(self) -> None:
        learners = [n for n in self._nodes if isinstance(n, LearnerNode)]
        if not learners:
            return
        node = self._random.choice(learners)
        node.leaves = True
        node.crash(down_s=self._random.uniform(0.1, 1.0))
