"""Names: federations, learners, principals, topics and lanes, formatted and parsed in one place.

Rule: a topic always ends in `/`. ZeroMQ matches subscriptions by prefix, so `task/l1` would also
receive `task/l10`; `task/l1/` does not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from metisfl.proto.errors import UserError

__all__ = [
    "ALL",
    "HEADS",
    "KINDS",
    "TRANSIENT_KINDS",
    "Topic",
    "access_topic",
    "beat_topic",
    "ceremony_topic",
    "check_name",
    "done_topic",
    "federation_lane",
    "lane_of_federation",
    "ledger_topic",
    "member_topic",
    "parse_topic",
    "run_topic",
    "task_topic",
]

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
ALL = "all"
HEADS = b"hb/"
TRANSIENT_KINDS = frozenset({"beat"})
KINDS = frozenset(
    {"run", "task", "done", "member", "ledger", "access", "ceremony"} | TRANSIENT_KINDS
)
TOPIC_BYTES_MAX = 160


@dataclass(frozen=True, slots=True)
class Topic:
    """`federation/kind/subject/`; the subject is a learner's name or `all`."""

    federation: str
    kind: str
    subject: str

    def __str__(self) -> str:
        return f"{self.federation}/{self.kind}/{self.subject}/"


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be part of a topic. Raises UserError that says what is allowed."""
    if not NAME.fullmatch(name) or name == ALL:
        raise UserError(
            f"{what} {name!r}: use 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit, "
            f"and not {ALL!r}"
        )
    return name


def parse_topic(text: str) -> Topic:
    """Parse a whole topic. Raises ValueError for anything that `str(Topic)` would not produce."""
    if len(text) > TOPIC_BYTES_MAX:
        raise ValueError(f"topic of {len(text)} characters; at most {TOPIC_BYTES_MAX}")
    parts = text.split("/")
    if len(parts) != 4 or parts[3] or not all(NAME.fullmatch(part) for part in parts[:3]):
        raise ValueError(f"topic {text!r} is not federation/kind/subject/")
    if parts[1] not in KINDS:
        raise ValueError(f"topic {text!r} has the kind {parts[1]!r}; known: {sorted(KINDS)}")
    return Topic(*parts[:3])


def lane_of_federation(lane: str) -> bool:
    """Tell a lane over a whole federation (`f/`) from a lane over one topic (`f/task/l1/`).

    Raises ValueError for a text that is neither.
    """
    if lane.count("/") == 1 and lane.endswith("/") and NAME.fullmatch(lane[:-1]):
        return True
    parse_topic(lane)
    return False


def federation_lane(federation: str) -> str:
    return f"{federation}/"


def run_topic(federation: str) -> str:
    return f"{federation}/run/{ALL}/"


def task_topic(federation: str, learner: str) -> str:
    return f"{federation}/task/{learner}/"


def done_topic(federation: str, learner: str) -> str:
    return f"{federation}/done/{learner}/"


def member_topic(federation: str, learner: str) -> str:
    return f"{federation}/member/{learner}/"


def ledger_topic(federation: str, learner: str) -> str:
    return f"{federation}/ledger/{learner}/"


def access_topic(federation: str) -> str:
    return f"{federation}/access/{ALL}/"


def ceremony_topic(federation: str) -> str:
    return f"{federation}/ceremony/{ALL}/"


def beat_topic(federation: str, learner: str) -> str:
    return f"{federation}/beat/{learner}/"
