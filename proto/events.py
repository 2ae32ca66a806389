"""Events between bytes and messages, with a limit on every field.

Rule 1: `LIMITS` names every field of every event; a field without a limit does not exist (a test
compares the table with the descriptors).
Rule 2: what a peer sent wrong is a PeerError; what we would send wrong is a ValueError, a defect.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from google.protobuf.message import DecodeError, Message

from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import EXPONENT_MAX
from metisfl.proto.errors import PeerError
from metisfl.proto.limits import (
    CEREMONY_BODY_BYTES_MAX,
    CEREMONY_BYTES,
    CEREMONY_STEPS,
    NAME_CHARACTERS_MAX,
    TENSORS_MAX,
)
from metisfl.proto.topics import NAME

__all__ = [
    "ABSENCE_KINDS",
    "AWAITED_MAX",
    "COUNT_MAX",
    "EVENT_TYPES",
    "LEARNERS_MAX",
    "LIMITS",
    "METRICS_MAX",
    "METRIC_NAME_CHARACTERS_MAX",
    "PAYLOAD_BYTES_MAX",
    "REASON_CHARACTERS_MAX",
    "decode",
    "encode",
    "may_send",
]

PAYLOAD_BYTES_MAX: Final = 192 * 1024
LEARNERS_MAX: Final = 1000
ABSENCE_KINDS: Final = frozenset({"late", "failed", "left", "stopped"})
AWAITED_MAX: Final = 200
METRICS_MAX: Final = 256
METRIC_NAME_CHARACTERS_MAX: Final = 128
COUNT_MAX: Final = 2**53  # of examples or batches: every float64 up to here is exact
REASON_CHARACTERS_MAX: Final = 2_000

# Runs and tasks name files and folders, at the controller and at every site.
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Check = Callable[[Any], str | None]
"""Returns what is wrong with a value, or None."""


def _text(most: int, *, least: int = 0) -> Check:
    def check(value: str) -> str | None:
        if least <= len(value) <= most:
            return None
        return f"has {len(value)} characters; allowed are {least} to {most}"

    return check


def _identifier(most: int, *, least: int = 1) -> Check:
    length = _text(most, least=least)

    def check(value: str) -> str | None:
        if wrong := length(value):
            return wrong
        if not value or _IDENTIFIER.fullmatch(value):
            return None
        return f"is {value[:80]!r}; allowed are letters, digits, '.', '_' and '-'"

    return check


def _name(value: str) -> str | None:
    return None if NAME.fullmatch(value) else f"{value[:80]!r} is not a name"


def _number(least: float, most: float) -> Check:
    def check(value: float) -> str | None:
        if least <= value <= most:  # false for NaN
            return None
        return f"is {value}; allowed are {least} to {most}"

    return check


def _digest(value: bytes) -> str | None:
    return None if len(value) == 32 else f"has {len(value)} bytes; a SHA-256 digest has 32"


def _digest_or_none(value: bytes) -> str | None:
    return _digest(value) if value else None


def _exactly(count: int) -> Check:
    return lambda value: None if len(value) == count else f"has {len(value)} bytes; it has {count}"


def _up_to(most: int) -> Check:
    return lambda value: None if len(value) <= most else f"has {len(value)} bytes; at most {most}"


def _each(check: Check, *, most: int, least: int = 0) -> Check:
    def check_all(values: Any) -> str | None:
        if not least <= len(values) <= most:
            return f"has {len(values)} entries; allowed are {least} to {most}"
        return next((f"[{i}] {wrong}" for i, v in enumerate(values) if (wrong := check(v))), None)

    return check_all


def _metrics(values: Mapping[str, float]) -> str | None:
    if len(values) > METRICS_MAX:
        return f"has {len(values)} entries; at most {METRICS_MAX}"
    for key, value in values.items():
        if not 1 <= len(key) <= METRIC_NAME_CHARACTERS_MAX:
            return (
                f"has a key of {len(key)} characters; allowed are 1 to {METRIC_NAME_CHARACTERS_MAX}"
            )
        if not math.isfinite(value):
            return f"[{key!r}] is {value}; it must be finite"
    return None


def _absence(value: str) -> str | None:
    if value in ABSENCE_KINDS:
        return None
    return f"is {value[:80]!r}; known are {', '.join(sorted(ABSENCE_KINDS))}"


def _nested(message: Message) -> str | None:
    return _first_wrong(message)


_task_id = _identifier(200)
_run_id = _identifier(64)
_round = _number(0, 100_000)
_lease_s = _number(0.1, 86_400)
_reason = _text(REASON_CHARACTERS_MAX)
_seconds = _number(0, 1e9)
_weight = _number(0, 1e18)
_exponents = _each(_number(0, EXPONENT_MAX), most=TENSORS_MAX)
_attempt = _number(0, 2**32 - 1)
_state = _text(32, least=1)

LIMITS: Final[Mapping[str, Mapping[str, Check]]] = MappingProxyType(
    {
        "Absence": {"learner": _name, "reason": _reason, "kind": _absence},
        "Awaited": {
            "learner": _name,
            "task_id": _identifier(200, least=0),
            "since_unix_ns": _number(0, 2**63 - 1),
            "lease_left_s": _number(0, 86_400),
        },
        "CeremonyStep": {
            "ceremony": _exactly(CEREMONY_BYTES),
            "learner": _name,
            "step": _number(1, CEREMONY_STEPS),
            "body": _up_to(CEREMONY_BODY_BYTES_MAX),
            "signature": _exactly(64),
        },
        "Contribution": {
            "learner": _name,
            "task_id": _task_id,
            "weight": _weight,
            "update_digest": _digest,
        },
        "ControllerStatus": {
            "run_id": _identifier(64, least=0),
            "phase": _state,
            "round": _round,
            "rounds": _round,
            "quorum": _number(0, LEARNERS_MAX),
            "counted": _number(0, LEARNERS_MAX),
            "invited": _number(0, LEARNERS_MAX),
            "waits_for": _reason,
            "awaited": _each(_nested, most=AWAITED_MAX),
            "awaited_total": _number(0, LEARNERS_MAX),
        },
        "Heartbeat": {"learner": _name, "state": _state},
        "Hyperparameters": {
            "epochs": _number(1, 1_000),
            "batch_size": _number(1, 1_000_000),
            "learning_rate": _number(0, 1e6),
        },
        "Invitation": {"learner": _name, "task_id": _task_id},
        "LearnerJoined": {
            "learner": _name,
            "software": _text(64),
            "privacy_modes": _each(_text(32, least=1), most=8),
            "examples": _number(0, COUNT_MAX),
        },
        "LearnerLeft": {"learner": _name, "reason": _reason},
        "LeaseEnded": {
            "task_id": _identifier(200, least=0),
            "learner": _name,
            "silent_s": _seconds,
        },
        "MemberAdmitted": {"learner": _name},
        "ModelOpened": {
            "run_id": _run_id,
            "round": _round,
            "model_digest": _digest,
            "partials_digest": _digest,
        },
        "PeerAdmitted": {"principal": _text(80, least=1), "public": _text(40, least=40)},
        "PeerExpelled": {"principal": _text(80, least=1), "public": _text(40, least=40)},
        "Progress": {
            "task_id": _task_id,
            "learner": _name,
            "state": _state,
            "fraction": _number(0, 1),
            "metrics": _metrics,
        },
        "RoundClosed": {
            "run_id": _run_id,
            "round": _round,
            "model_digest": _digest,
            "counted": _each(_nested, least=1, most=LEARNERS_MAX),
            "missing": _each(_nested, most=LEARNERS_MAX),
            "reference_weight": _weight,
            "previous_record": _digest_or_none,
        },
        "RoundOpened": {
            "run_id": _run_id,
            "round": _round,
            "model_digest": _digest_or_none,
            "invited": _each(_nested, least=1, most=LEARNERS_MAX),
            "attempt": _attempt,
            "reference_weight": _weight,
            "exponents": _exponents,
            "keeps_updates": _number(0, 1),
        },
        "RunFinished": {
            "run_id": _run_id,
            "outcome": _number(1, 3),
            "reason": _reason,
            "model_digest": _digest_or_none,
            "rounds": _round,
            "record": _digest_or_none,
        },
        "RunStarted": {
            "run_id": _run_id,
            "rounds": _number(1, 100_000),
            "learners": _each(_name, least=1, most=LEARNERS_MAX),
            "quorum": _number(1, LEARNERS_MAX),
            "lease_s": _lease_s,
            "seed": _number(0, 2**63 - 1),
            "privacy": _text(32, least=1),
            "hyperparameters": _nested,
            "waits_for_quorum": _number(0, 1),
            "max_examples": _number(0, COUNT_MAX),
            "continues": _identifier(64, least=0),
        },
        "RunStopped": {"run_id": _run_id, "reason": _reason},
        "ScaleExceeded": {
            "task_id": _task_id,
            "learner": _name,
            "tensor": _text(NAME_CHARACTERS_MAX, least=1),
            "exponents": _each(_number(0, EXPONENT_MAX), least=1, most=TENSORS_MAX),
        },
        "TaskAssigned": {
            "task_id": _task_id,
            "run_id": _run_id,
            "round": _round,
            "kind": _number(1, 4),
            "learner": _name,
            "model_digest": _digest_or_none,
            "seed": _number(0, 2**63 - 1),
            "lease_s": _lease_s,
            "hyperparameters": _nested,
            "keep_model": _number(0, 1),
            "attempt": _attempt,
            "reference_weight": _weight,
            "exponents": _exponents,
            "privacy": _text(32),
            "initial_seed": _number(0, 2**63 - 1),
            "partials_digest": _digest_or_none,
            "continues": _identifier(64, least=0),
        },
        "TaskCancelled": {"task_id": _task_id, "reason": _reason},
        "TaskCompleted": {
            "task_id": _task_id,
            "learner": _name,
            "update_digest": _digest_or_none,
            "examples": _number(0, COUNT_MAX),
            "batches": _number(0, COUNT_MAX),
            "metrics": _metrics,
            "training_s": _seconds,
            "exponents": _exponents,
        },
        "TaskFailed": {"task_id": _task_id, "learner": _name, "reason": _reason},
        "UpdateStored": {
            "task_id": _task_id,
            "learner": _name,
            "digest": _digest,
            "update_bytes": _number(0, 2**50),
        },
        "UpdateUnusable": {"task_id": _task_id, "learner": _name, "reason": _reason},
    }
)

_PARTS = {"Absence", "Awaited", "Contribution", "Hyperparameters", "Invitation"}
EVENT_TYPES: Final[Mapping[str, type[Message]]] = MappingProxyType(
    {name: getattr(pb, name) for name in LIMITS if name not in _PARTS}
)

_BY_LEARNERS = {"Heartbeat", "LearnerJoined", "LearnerLeft", "Progress"}
_BY_LEARNERS |= {"CeremonyStep", "ScaleExceeded", "TaskCompleted", "TaskFailed"}
_BY_DRIVERS = {"RunStarted", "RunStopped"}
_BY_BROKER = {"PeerAdmitted", "PeerExpelled"}


def may_send(principal: str, message: Message) -> bool:
    """Tell whether an event is this principal's to send; a learner speaks for itself alone."""
    name, (role, _, own) = message.DESCRIPTOR.name, principal.partition(":")
    if name in _BY_LEARNERS:
        return role == "learner" and own == message.learner  # type: ignore[attr-defined]
    if name in _BY_BROKER:
        return principal == "broker"
    return role == ("driver" if name in _BY_DRIVERS else "controller")


def _first_wrong(message: Message) -> str | None:
    for field, check in LIMITS[message.DESCRIPTOR.name].items():
        if wrong := check(getattr(message, field)):
            return f"{field} {wrong}"
    return None


def encode(message: Message) -> tuple[str, bytes]:
    """Return the type name and the bytes of an event. Raises ValueError if it breaks a limit."""
    name = message.DESCRIPTOR.name
    if name not in EVENT_TYPES:
        raise ValueError(f"{name} is not an event")
    if wrong := _first_wrong(message):
        raise ValueError(f"{name}: {wrong}")
    payload = message.SerializeToString()
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ValueError(f"{name} has {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX}")
    return name, payload


def decode(name: str, payload: bytes) -> Message:
    """Return the checked message. Raises PeerError for an unknown type, no protobuf or a limit."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PeerError(f"{name[:40]}: {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX}")
    if (kind := EVENT_TYPES.get(name)) is None:
        raise PeerError(f"unknown event type {name[:40]!r}; known: {', '.join(EVENT_TYPES)}")
    message = kind()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise PeerError(f"{name}: {len(payload)} bytes that are not protobuf ({error})") from error
    if wrong := _first_wrong(message):
        raise PeerError(f"{name}: {wrong}")
    return message
