"""Round records: what a round was, kept on disk as msgpack for people and tools to read.

Rule 1: a record says who was asked, who counted with which weight, and who did not and why. Nothing
in it is guessed: times are the log's, metrics are the sites' own.
Rule 2: a record names the one before it by its digest, and the log names the newest (RoundClosed,
RunFinished): whoever changes one later has to change the log of the broker and of every site, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import msgpack

from metisfl.proto.errors import MachineError
from metisfl.proto.events import LEARNERS_MAX, METRICS_MAX

__all__ = [
    "Counted",
    "Missing",
    "RoundRecord",
    "pack_record",
    "pool_metrics",
    "record_digest",
    "unpack_record",
]

VERSION: Final = 2
RECORD_BYTES_MAX: Final = 64 * 1024 * 1024
_NUMBER: Final = (int, float)
_COUNTED: Final = {
    "learner": str,
    "weight": _NUMBER,
    "update_digest": bytes,
    "examples": int,
    "training_s": _NUMBER,
    "metrics": dict,
}
_MISSING: Final = {"learner": str, "kind": str, "reason": str}
_RECORD: Final = {
    "run_id": str,
    "round": int,
    "previous": bytes,
    "model_digest": bytes,
    "opened_ns": int,
    "closed_ns": int,
    "evaluated_ns": int,
    "invited": list,
    "counted": list,
    "missing": list,
    "evaluation": dict,
    "unevaluated": list,
    "metrics": dict,
}


@dataclass(frozen=True, slots=True)
class Counted:
    """One update that is part of the community model."""

    learner: str
    weight: float
    update_digest: bytes
    examples: int
    training_s: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Missing:
    """One learner that was asked and is not part of it.

    `kind`: "late" (its lease ended), "failed" (it said so, or its update was of no use), "left",
    "stopped" (the run was, before the round was over).
    """

    learner: str
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round that is over. Times are Unix ns, as the broker stored the events."""

    run_id: str
    round: int
    previous: bytes  # digest of the record before it; empty for the first
    model_digest: bytes  # empty if the round failed or was stopped
    opened_ns: int
    closed_ns: int
    evaluated_ns: int
    invited: tuple[str, ...]
    counted: tuple[Counted, ...]
    missing: tuple[Missing, ...]
    evaluation: Mapping[str, Mapping[str, float]]  # by learner
    unevaluated: tuple[Missing, ...]
    metrics: Mapping[str, float]  # pooled over the learners in `evaluation`


def pool_metrics(evaluations: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Pool metrics such as "test.accuracy" over sites, weighted by the site's "test.examples".

    The counts add up; a metric that a site did not report is pooled over the others, and one whose
    sum is beyond float64 is left out. The sums are exact (fsum), so the order of the sites does not
    matter.
    """
    terms: dict[str, list[tuple[float, float]]] = {}
    for metrics in evaluations:
        for name, value in metrics.items():
            split = name.partition(".")[0]
            examples = metrics.get(f"{split}.examples", 0.0)
            if examples > 0:
                terms.setdefault(name, []).append((value, examples))
    pooled = {}
    for name, pairs in sorted(terms.items()):
        total = _sum(examples for _, examples in pairs)
        if name.endswith(".examples"):
            pooled[name] = total
        else:
            pooled[name] = _sum(value * examples for value, examples in pairs) / total
    return {name: value for name, value in pooled.items() if math.isfinite(value)}


def _sum(values: Iterable[float]) -> float:
    """The exact sum; NaN if no float64 holds it, for the values are whatever a site has sent."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.nan


def pack_record(record: RoundRecord) -> bytes:
    """Return the record as msgpack: a map of its fields and a version."""
    packed: bytes = msgpack.packb({"version": VERSION, **asdict(record)})
    return packed


def record_digest(data: bytes) -> bytes:
    """What the next record names this one by: SHA-256 of its bytes."""
    return hashlib.sha256(data).digest()


def unpack_record(data: bytes) -> RoundRecord:
    """Read a record. Raises MachineError for bytes that `pack_record` did not write."""
    if len(data) > RECORD_BYTES_MAX:
        raise MachineError(f"round record of {len(data)} bytes; at most {RECORD_BYTES_MAX}")
    try:
        # Else a byte of the file could ask for 64 of memory, or for a list without end.
        fields: dict[str, Any] = msgpack.unpackb(
            data, max_array_len=LEARNERS_MAX, max_map_len=LEARNERS_MAX * METRICS_MAX, max_ext_len=0
        )
        if fields.pop("version") != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        _check(fields, _RECORD)
        _check_all(fields["invited"], str)
        _check_metrics(fields["metrics"], *fields["evaluation"].values())
        return RoundRecord(
            **{
                **fields,
                "invited": tuple(fields["invited"]),
                "counted": tuple(_counted(one) for one in fields["counted"]),
                "missing": tuple(_missing(one) for one in fields["missing"]),
                "unevaluated": tuple(_missing(one) for one in fields["unevaluated"]),
            }
        )
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, AttributeError) as error:
        raise MachineError(f"this is no round record of version {VERSION}: {error}") from error


def _counted(fields: dict[str, Any]) -> Counted:
    _check(fields, _COUNTED)
    _check_metrics(fields["metrics"])
    return Counted(**fields)


def _missing(fields: dict[str, Any]) -> Missing:
    _check(fields, _MISSING)
    return Missing(**fields)


def _check(fields: dict[str, Any], kinds: Mapping[str, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise ValueError(f"{name} is of the type {type(fields[name]).__name__}")


def _check_all(values: Iterable[Any], kind: Any) -> None:
    for value in values:
        if not isinstance(value, kind):
            raise ValueError(f"{value!r:.40} is of the type {type(value).__name__}")


def _check_metrics(*by_learner: dict[str, Any]) -> None:
    for metrics in by_learner:
        _check_all(metrics.keys(), str)
        _check_all(metrics.values(), _NUMBER)
