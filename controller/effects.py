"""What the controller may decide: events to publish and folds to run.

Rule: every effect has a key, and the event that answers it has the same one. So an effect that is
under way is known again when the log brings its answer, also after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb

__all__ = ["Contribution", "Effect", "Fold", "Publish", "key_of", "publish"]


@dataclass(frozen=True, slots=True)
class Publish:
    key: str
    topic: str
    message: Message
    correlation_id: str


@dataclass(frozen=True, slots=True)
class Contribution:
    learner: str
    task_id: str
    digest: bytes
    weight: float


@dataclass(frozen=True, slots=True)
class Fold:
    """Make a round's community model, or what opens it, learners in the order of their names."""

    key: str  # that of the RoundClosed or ModelOpened which it becomes
    run_id: str
    round: int
    base_digest: bytes  # empty for round 0
    contributions: tuple[Contribution, ...]
    reference_weight: float
    exponents: tuple[int, ...]  # none in plain mode; none in round 0: all are 0
    opens: bytes = b""  # the model whose partials these are; empty: they are updates


Effect = Publish | Fold


def key_of(message: Message) -> str:
    """Name what an event settles, so that an effect and the event it became can be matched."""
    kind = message.DESCRIPTOR.name
    if isinstance(message, pb.RoundOpened):
        return f"{kind}:{message.run_id}:{message.round}:{message.attempt}"
    if isinstance(message, (pb.RoundClosed, pb.ModelOpened)):
        return f"{kind}:{message.run_id}:{message.round}"
    if isinstance(message, (pb.RunStarted, pb.RunStopped, pb.RunFinished)):
        return f"{kind}:{message.run_id}"
    task_id = getattr(message, "task_id", "")
    return f"{kind}:{task_id}" if task_id else f"{kind}:learner:{message.learner}"  # type: ignore[attr-defined]


def publish(topic: str, message: Message, correlation_id: str = "") -> Publish:
    return Publish(key_of(message), topic, message, correlation_id)
