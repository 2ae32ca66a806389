"""What can happen to a learner's tasks, and what there is to do about it.

Rule: an event says that something is so, an effect asks for something; neither does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb

__all__ = [
    "Answer",
    "Assigned",
    "Cancelled",
    "Discard",
    "Done",
    "Effect",
    "Event",
    "Exceeded",
    "Failed",
    "Fetch",
    "Fetched",
    "Lost",
    "Opened",
    "Outcome",
    "Report",
    "RoundOver",
    "RunOver",
    "Stop",
    "Upload",
    "Uploaded",
    "Work",
    "told_by",
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the work gave. `update_digest` is empty for an evaluation, and where there is no update
    yet; `trained_digest` is that of the plain model behind an encrypted update."""

    update_digest: bytes
    examples: int
    batches: int
    metrics: Mapping[str, float]
    training_s: float
    exponents: tuple[int, ...] = ()
    """That the update needed, one for each float tensor; none in plain mode."""
    trained_digest: bytes = b""


# ---- Events: what happened ---------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assigned:
    task: pb.TaskAssigned


@dataclass(frozen=True, slots=True)
class Cancelled:
    task_id: str


@dataclass(frozen=True, slots=True)
class RoundOver:
    run_id: str
    round: int


@dataclass(frozen=True, slots=True)
class Opened:
    """All sites have given their partials of this round's model."""

    run_id: str
    round: int


@dataclass(frozen=True, slots=True)
class RunOver:
    run_id: str


@dataclass(frozen=True, slots=True)
class Fetched:
    task_id: str


@dataclass(frozen=True, slots=True)
class Done:
    task_id: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Exceeded:
    """The work is done, and a tensor of the update does not fit into the round's exponents."""

    task_id: str
    outcome: Outcome
    tensor: str


@dataclass(frozen=True, slots=True)
class Uploaded:
    task_id: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Fetching, work or upload failed for good; `reason` is for the round's record."""

    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """What was made is not on disk any more, as after a power cut: it is made again."""

    task_id: str


Event = (
    Assigned
    | Cancelled
    | RoundOver
    | Opened
    | RunOver
    | Fetched
    | Done
    | Exceeded
    | Uploaded
    | Failed
    | Lost
)


# ---- Effects: what to do about it ------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    task: pb.TaskAssigned


@dataclass(frozen=True, slots=True)
class Work:
    """Do the task; with an outcome it is trained, and only to be sealed."""

    task: pb.TaskAssigned
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Upload:
    task: pb.TaskAssigned
    digest: bytes


Answer = pb.TaskCompleted | pb.TaskFailed | pb.ScaleExceeded


@dataclass(frozen=True, slots=True)
class Report:
    message: Answer


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop whatever is being done for this task."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Discard:
    """What was made for this task is no longer needed, unless a later attempt goes on with it."""

    task_id: str


Effect = Fetch | Work | Upload | Report | Stop | Discard


def told_by(message: Message) -> Event | None:
    """The event that a message of the controller is; None for what is not for a learner."""
    if isinstance(message, pb.TaskAssigned):
        return Assigned(message)
    if isinstance(message, pb.TaskCancelled):
        return Cancelled(message.task_id)
    if isinstance(message, pb.RoundClosed):
        return RoundOver(message.run_id, message.round)
    if isinstance(message, pb.ModelOpened):
        return Opened(message.run_id, message.round)
    if isinstance(message, pb.RunFinished):
        return RunOver(message.run_id)
    return None
