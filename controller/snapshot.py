"""The controller's state as bytes, so that a restart need not read the whole log.

Rule: a snapshot is what the log gave up to the place that is kept beside it, every field of it; a
test compares the table below with the state's fields. The key's terms are not in it: they are the
key's, which may be a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import msgpack
from google.protobuf.message import DecodeError

from metisfl.controller.state import Phase, Run, Status, Task, Terms
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError
from metisfl.proto.records import Missing

__all__ = ["pack", "unpack"]

VERSION: Final = 3

Way = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _message(kind: type[pb.RunStarted | pb.TaskCompleted | pb.RoundClosed | pb.RunFinished]) -> Way:
    return (
        lambda message: None if message is None else message.SerializeToString(deterministic=True),
        lambda data: None if data is None else kind.FromString(data),
    )


def _mapping(to: Callable[[Any], Any], back: Callable[[Any], Any]) -> Way:
    return (
        lambda mapping: [[key, to(value)] for key, value in mapping.items()],
        lambda pairs: MappingProxyType({key: back(value) for key, value in pairs}),
    )


def _same(value: Any) -> Any:
    return value


AS_IS: Final[Way] = (_same, _same)
LIST: Final[Way] = (list, tuple)
SET: Final[Way] = (sorted, frozenset)
TEXTS: Final = _mapping(_same, _same)
TASK: Final[Mapping[str, Way]] = {
    "task_id": AS_IS,
    "learner": AS_IS,
    "kind": AS_IS,
    "status": (lambda status: status.value, Status),
    "assigned_ns": AS_IS,
    "settled_ns": AS_IS,
    "completion": _message(pb.TaskCompleted),
    "stored_digest": AS_IS,
    "exponents": LIST,
    "reason": AS_IS,
    "cancelled": AS_IS,
}
TASKS: Final = _mapping(
    lambda task: [to(getattr(task, name)) for name, (to, _) in TASK.items()],
    lambda row: Task(
        **{name: back(v) for (name, (_, back)), v in zip(TASK.items(), row, strict=True)}
    ),
)
RUN: Final[Mapping[str, Way]] = {
    "federation": AS_IS,
    "phase": (lambda phase: phase.value, Phase),
    "plan": _message(pb.RunStarted),
    "asking": SET,
    "members": SET,
    "absent": TEXTS,
    "gone": SET,
    "declared": TEXTS,
    "round": AS_IS,
    "attempt": AS_IS,
    "rescaled": AS_IS,
    "reference_weight": AS_IS,
    "exponents": LIST,
    "model_digest": AS_IS,
    "partials_digest": AS_IS,
    "opened_digest": AS_IS,
    "initialiser": AS_IS,
    "tasks": TASKS,
    "left_out": _mapping(
        lambda one: [one.learner, one.kind, one.reason], lambda row: Missing(*row)
    ),
    "trained": TASKS,
    "tried": SET,
    "opened_ns": AS_IS,
    "closed_ns": AS_IS,
    "closed": _message(pb.RoundClosed),
    "recent_models": LIST,
    "record": AS_IS,
    "previous_record": AS_IS,
    "recorded": AS_IS,
    "stopped": AS_IS,
    "finished": _message(pb.RunFinished),
    "refused": TEXTS,
}


def pack(run: Run) -> bytes:
    """Return the state without the key's terms. The same state gives the same bytes."""
    rows = [to(getattr(run, name)) for name, (to, _) in RUN.items()]
    packed: bytes = msgpack.packb([VERSION, rows])
    return packed


def unpack(data: bytes, terms: Terms | None) -> Run:
    """Return the state, under the terms of the key in use. Raises MachineError."""
    try:
        version, rows = msgpack.unpackb(data)
        if version != VERSION:
            raise ValueError(f"it has version {version}, this release knows {VERSION}")
        values = zip(RUN.items(), rows, strict=True)
        return Run(terms=terms, **{name: back(value) for (name, (_, back)), value in values})
    except (msgpack.UnpackException, DecodeError, ValueError, TypeError) as error:
        raise MachineError(
            f"the controller's snapshot cannot be read: {error}; delete controller.db's table "
            "`snapshot` while the broker's log is whole, or restore a copy"
        ) from error
