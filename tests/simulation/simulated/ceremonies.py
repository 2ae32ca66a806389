"""Sites that make a joint key under every kind of trouble, from one seed.

Laws: C1 all sites come to one key, and nobody is blamed; C2 no site ever says two things in a step;
C3 it is over within CALM_S_MAX after the last fault.
"""

from __future__ import annotations

from typing import Final

from ceremony_world import manifest_of

from metisfl.proto import events_pb2 as pb
from simulated.broker_node import BrokerNode
from simulated.ceremony_site import CeremonySite
from simulated.faults import Faults
from simulated.invariants import Invariants
from simulated.network import Network
from simulated.scenario import Scenario
from simulated.scheduler import Broken, Node, Scheduler

__all__ = ["CeremonyWorld", "hold_ceremony"]

CALM_S_MAX: Final = 400.0
LOOK_S: Final = 0.25
NAMES: Final = ("ada", "bob", "cyd", "dan")


class CeremonyWorld:
    """A broker and the sites of one key."""

    def __init__(self, seed: int) -> None:
        scenario = Scenario.of(seed)
        self.scheduler = Scheduler(seed)
        network = Network(self.scheduler)
        self.invariants = Invariants(self.scheduler, scenario)
        shared = (self.scheduler, network, self.invariants)
        manifest = manifest_of(NAMES[: 2 + seed % 3])
        self.broker = BrokerNode(*shared)
        self.broker.fetch_events = scenario.fetch_events
        self.sites = [CeremonySite(*shared, manifest, name) for name in manifest.names]
        self.nodes: list[Node] = [self.broker, *self.sites]
        for node in self.nodes:
            node.on_death.append(network.died)
        self.invariants.disks = {f"learner:{site.name}": site.disk for site in self.sites}
        self._faults = Faults(self.scheduler, network, scenario, self.nodes)
        self._calm_at: float | None = None
        self._over = False

    def run(self) -> None:
        """Let it happen. Raises Broken."""
        for node in self.nodes:
            self.scheduler.at(self.scheduler.random.uniform(0.0, 1.0), node, node.start)
        self._faults.begin()
        self.scheduler.at(LOOK_S, None, self._look)
        self.scheduler.run(lambda: self._over)
        keys = {site.part.key for site in self.sites if site.part is not None}
        if len(keys) != 1:
            raise Broken("C1", f"{len(keys)} keys")

    def _look(self) -> None:
        self._check_steps()
        scheduler = self.scheduler
        done = [site for site in self.sites if site.part is not None and site.part.key]
        self._over = len(done) == len(self.sites)
        if scheduler.calm:
            self._calm_at = scheduler.now if self._calm_at is None else self._calm_at
            if scheduler.now - self._calm_at > CALM_S_MAX:
                left = [site.name for site in self.sites if site not in done]
                raise Broken("C3", f"{left} have no key")
        scheduler.at(scheduler.now + LOOK_S, None, self._look)

    def _check_steps(self) -> None:
        said: dict[tuple[str, int], bytes] = {}
        for message in self.invariants.messages:
            assert isinstance(message, pb.CeremonyStep)
            if said.setdefault((message.learner, message.step), message.body) != message.body:
                raise Broken("C2", f"{message.learner} has said two things in {message.step}")
        for site in self.sites:
            if site.part is not None and site.part.stopped is not None:
                raise Broken("C1", f"{site.name} blames {site.part.stopped}")


def hold_ceremony(seed: int) -> str:
    """One seed: what went wrong, with the end of its history; "" if nothing did."""
    world = CeremonyWorld(seed)
    try:
        world.run()
    except Broken as broken:
        return "\n".join([*world.scheduler.lines(40), "", f"ceremony {seed} breaks {broken}"])
    return ""
