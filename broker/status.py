"""How a broker is: what it tells who may ask.

Rule: the answer is bounded, whatever the broker has seen: causes are a fixed set, and of the
connections at most 1000 principals are told. Who reads it checks it like anything else from a peer.

Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final

from metisfl.proto.errors import PeerError
from metisfl.proto.frames import REASON_BYTES_MAX

__all__ = [
    "EVENT_REFUSALS",
    "OFFENDERS_MAX",
    "PRINCIPALS_TOLD_MAX",
    "REFUSALS",
    "REQUEST_REFUSALS",
    "BrokerStatus",
    "pack_status",
    "parse_status",
]

PRINCIPALS_TOLD_MAX: Final = 1000
OFFENDERS_MAX: Final = 64

FULL_DISK: Final = "full_disk"
LOG_LIMIT: Final = "log_limit"
POISON: Final = "poison"
FENCED: Final = "fenced"
DAMAGED: Final = "damaged"
INVALID: Final = "invalid"
FORGED: Final = "forged"
FORBIDDEN_TOPIC: Final = "forbidden_topic"
RATE_LIMITED: Final = "rate_limited"
EVENT_REFUSALS: Final = (
    *(FULL_DISK, LOG_LIMIT, POISON, FENCED, DAMAGED, INVALID),
    *(FORGED, FORBIDDEN_TOPIC, RATE_LIMITED),
)
"""Why an event was not stored: no room on the disk, none in the log, put aside for good, of an
older epoch, damaged on the way, not understood; in another's name, put aside since its publisher
may not write there, too many a second. An event that is sent again and refused again counts
again."""

CONNECTION: Final = "connection"
SUBSCRIPTION: Final = "subscription"
LANE: Final = "lane"
HELD: Final = "fetch_held"
BEAT: Final = "beat"
STATUS: Final = "status"
MALFORMED: Final = "malformed"
HANDSHAKE: Final = "handshake"
REQUEST_REFUSALS: Final = (
    *(CONNECTION, SUBSCRIPTION, LANE, HELD, BEAT, STATUS, MALFORMED),
    HANDSHAKE,
)
"""What else was refused: a connection or hello too many or of another protocol, a subscription, a
lane that is not the reader's, a fetch that was put off, a beat, a question for the status, what
is not understood, and whoever came without a known key."""

REFUSALS: Final = frozenset({*EVENT_REFUSALS, *REQUEST_REFUSALS})


@dataclass(frozen=True, slots=True)
class BrokerStatus:
    """`insecure`: it was started with --insecure, so nothing here is known for sure.

    Counts are since the broker's start; sizes are at most about a second old.

    `connections`: known ones of each principal. One that ended counts until its place is needed.
    `events_refused` and `requests_refused`: by cause, see EVENT_REFUSALS and REQUEST_REFUSALS.
    `offenders`: how often each of those was refused that were refused most, at most 64.
    """

    incarnation: int
    head: int  # the log's newest record
    floor: int  # up to here the log was trimmed
    log_bytes: int
    log_limit_bytes: int
    disk_free_bytes: int
    events_stored: int
    events_refused: Mapping[str, int]
    full_since_unix_ns: int  # 0: events are stored as they come
    full_reason: str
    connections: Mapping[str, int]
    messages_dropped: int  # to peers that were slow or gone; they ask again
    insecure: bool
    requests_refused: Mapping[str, int]
    offenders: Mapping[str, int]


def pack_status(status: BrokerStatus) -> bytes:
    told = asdict(status)
    told["full_reason"] = status.full_reason[: REASON_BYTES_MAX // 4]
    told["connections"] = dict(sorted(status.connections.items())[:PRINCIPALS_TOLD_MAX])
    told["offenders"] = dict(list(status.offenders.items())[:OFFENDERS_MAX])
    return json.dumps(told, separators=(",", ":")).encode()


def parse_status(data: bytes) -> BrokerStatus:
    """Raises PeerError for what is no status."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PeerError(f"status is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise PeerError(f"status is {type(told).__name__}, not an object")
    for field in fields(BrokerStatus):
        value = told.get(field.name)
        if field.type == "int":
            right = _is_count(value)
        elif field.type == "bool":
            right = isinstance(value, bool)
        elif field.type == "str":
            right = isinstance(value, str)
        else:
            right = isinstance(value, dict) and all(map(_is_count, value.values()))
        if not right:
            raise PeerError(f"status has {str(value)[:40]!r} for {field.name}: {field.type} it is")
    return BrokerStatus(**{field.name: told[field.name] for field in fields(BrokerStatus)})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
