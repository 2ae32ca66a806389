"""What the controller does about its log: take an event, say what is due.

Rule 1: an effect that is under way is not begun again until the log has answered it. What is under
way is not part of the state: after a restart the shell first sees to it that all that was decided
before is in the log, and then asks what is due.
Rule 2: nothing is due before the log has been read to its end.
Rule 3: a stopped run ends after the fold that was under way: the fold uses its files, and what may
be next is another run's.

Pure: the shell publishes, folds, and comes back with what happened.
"""

from __future__ import annotations

from collections.abc import Iterable

from metisfl.controller.effects import Effect, Fold, Publish, key_of, publish
from metisfl.controller.lease import Ended
from metisfl.controller.messages import model_opened, round_closed, unusable
from metisfl.controller.round import apply
from metisfl.controller.scheduling import decide
from metisfl.controller.state import Logged, Phase, Run
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics

__all__ = ["Conductor"]


class Conductor:
    """The state that the log gives, and the effects that are under way."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._under_way: set[str] = set()
        self._folding = ""  # the key of the fold that was let out last

    def take(self, event: Logged) -> str:
        """Apply the log's next event; return why it changed nothing, or ""."""
        self.run, dropped = apply(self.run, event)
        if event.publisher == "controller":
            self._under_way.discard(key_of(event.message))
            over = not dropped or self.run.phase is Phase.STOPPING
            if isinstance(event.message, pb.UpdateUnusable) and over:
                self._under_way.discard(self._folding)  # the round's fold begins anew
        return dropped

    def due(self) -> tuple[Effect, ...]:
        """What the state calls for and is not under way yet. It is from now on."""
        due = tuple(
            effect
            for effect in decide(self.run)
            if effect.key not in self._under_way and not self._must_wait(effect)
        )
        self._under_way.update(effect.key for effect in due)
        for effect in due:
            if isinstance(effect, Fold):
                self._folding = effect.key
        return due

    def _must_wait(self, effect: Effect) -> bool:
        return (
            self._folding in self._under_way
            and isinstance(effect, Publish)
            and isinstance(effect.message, pb.RunFinished)
            and effect.message.outcome == pb.RunFinished.STOPPED
        )

    def given_up(self, fold: Fold) -> None:
        """The run was stopped, and this fold has ended without a model."""
        self._under_way.discard(fold.key)

    def folded(self, fold: Fold, digest: bytes) -> Publish:
        """The community model, or what opens it, is in the store: close the round, or open it."""
        make = model_opened if fold.opens else round_closed
        return make(self.run, fold, digest)

    def unusable(self, fold: Fold, position: int, reason: str) -> Publish:
        """An update cannot be folded: the log is told, and then the others are folded."""
        one = fold.contributions[position]
        return unusable(self.run, one.learner, one.task_id, reason)

    def stored(self, task_id: str, digest: bytes, update_bytes: int) -> tuple[Publish, ...]:
        """An update is checked and durable. Nothing if its round was closed in the meantime."""
        if (task := self.run.tasks.get(task_id)) is None:
            return ()
        stored = pb.UpdateStored(
            task_id=task_id, learner=task.learner, digest=digest, update_bytes=update_bytes
        )
        return (self._ledger(task.learner, stored, task_id),)

    def lapsed(self, ended: Iterable[Ended]) -> tuple[Publish, ...]:
        """Leases have ended."""
        return tuple(
            self._ledger(
                one.wait.learner,
                pb.LeaseEnded(
                    task_id=one.wait.task_id, learner=one.wait.learner, silent_s=one.silent_s
                ),
                one.wait.task_id,
            )
            for one in ended
        )

    def _ledger(
        self,
        learner: str,
        message: pb.UpdateStored | pb.LeaseEnded,
        task_id: str,
    ) -> Publish:
        return publish(topics.ledger_topic(self.run.federation, learner), message, task_id)
