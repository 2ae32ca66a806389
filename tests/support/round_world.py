"""A controller's log in a test: what it decides comes back through it, as through a broker."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from metisfl.controller.conductor import Conductor
from metisfl.controller.effects import Fold, Publish
from metisfl.controller.state import Logged, Run
from metisfl.proto import events_pb2 as pb

LEARNERS = ("ada", "bob", "cyd")
DIGEST = bytes(range(32))


def plan(
    rounds: int = 2, quorum: int = 2, run_id: str = "r1", *, waits_for_quorum: bool = False
) -> pb.RunStarted:
    return pb.RunStarted(
        run_id=run_id,
        rounds=rounds,
        learners=LEARNERS,
        quorum=quorum,
        lease_s=5.0,
        seed=7,
        privacy="plain",
        hyperparameters=pb.Hyperparameters(epochs=1, batch_size=8),
        waits_for_quorum=waits_for_quorum,
    )


class World:
    """A log, the conductor that follows it, and its effects that are under way."""

    def __init__(self, run: Run | None = None) -> None:
        self.conductor = Conductor(run or Run("f"))
        self.log: list[Logged] = []
        self.under_way: dict[str, Publish | Fold] = {}

    @property
    def run(self) -> Run:
        return self.conductor.run

    def log_event(self, message: Message, publisher: str) -> str:
        event = Logged(message, publisher, len(self.log))
        self.log.append(event)
        dropped = self.conductor.take(event)
        self.run.validate()
        for effect in self.conductor.due():
            assert effect.key not in self.under_way, f"{effect.key} is begun twice"
            self.under_way[effect.key] = effect
        return dropped

    def perform(self, key: str) -> None:
        effect = self.under_way.pop(key)
        if isinstance(effect, Fold):
            effect = self.conductor.folded(effect, DIGEST)
        self.log_event(effect.message, "controller")

    def perform_all(self) -> None:
        while self.under_way:
            self.perform(next(iter(self.under_way)))

    def start(self, the_plan: pb.RunStarted) -> None:
        self.log_event(the_plan, "driver:d")
        for name in LEARNERS:
            self.log_event(pb.LearnerJoined(learner=name), f"learner:{name}")
        self.perform_all()

    def complete(
        self,
        task_id: str,
        examples: int = 10,
        digest: bytes = DIGEST,
        exponents: Sequence[int] = (),
    ) -> str:
        name = task_id.rsplit(".", 1)[1]
        kind = self.run.tasks[task_id].kind if task_id in self.run.tasks else pb.TRAIN
        if kind != pb.EVALUATE:
            self.log_event(
                pb.UpdateStored(task_id=task_id, learner=name, digest=DIGEST), "controller"
            )
        return self.log_event(
            pb.TaskCompleted(
                task_id=task_id,
                learner=name,
                update_digest=digest,
                examples=examples,
                exponents=exponents,
            ),
            f"learner:{name}",
        )


def counted(log: list[Logged]) -> list[pb.RoundClosed]:
    return [e.message for e in log if isinstance(e.message, pb.RoundClosed)]
