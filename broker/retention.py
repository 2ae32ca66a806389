"""How much of the log goes, and whether it takes more.

Rule: nothing goes that a controller has not read: it starts from its snapshot and the log behind
it. Within that, oldest first, records go that are older than they are kept, and so many that the
log takes half of its limit. A log at its limit takes nothing more until something may go.

Pure: `trimming.py` looks at the disk and does what is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = [
    "GIVE_BACK_PAGES",
    "KEEP_DAYS",
    "LOG_LIMIT_BYTES",
    "SLICE_EVENTS",
    "Aged",
    "Limits",
    "Pin",
    "crowded",
    "full_because",
    "lowest",
    "pages_to_give_back",
    "trim_to",
    "worth_a_look",
]

LOG_LIMIT_BYTES: Final = 4 * 1024**3
KEEP_DAYS: Final = 7
SLICE_EVENTS: Final = 2048  # what goes in one transaction
SLICE_BYTES: Final = 4 * 1024 * 1024
GIVE_BACK_PAGES: Final = 512
_DAY_NS: Final = 86_400 * 10**9


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator lets the log take."""

    log_bytes: int = LOG_LIMIT_BYTES
    keep_ns: int = KEEP_DAYS * _DAY_NS

    @classmethod
    def of(cls, log_bytes: int, keep_days: int) -> Limits:
        return cls(log_bytes, keep_days * _DAY_NS)


class Aged(NamedTuple):
    """One of the log's oldest records."""

    sequence: int
    logged_unix_ns: int
    bytes: int


class Pin(NamedTuple):
    """A federation of which its controller has not read everything."""

    federation: str
    cursor: int  # the controller has read up to here, 0 for nothing
    unread: int  # its first record behind that


def crowded(log_bytes: int, limits: Limits) -> bool:
    """True when the oldest records go whatever their age."""
    return 2 * log_bytes > limits.log_bytes


def worth_a_look(log_bytes: int, oldest: Sequence[Aged], limits: Limits, now_unix_ns: int) -> bool:
    """Tell from the log's size and oldest record whether anything would go if nothing is pinned."""
    if not oldest:
        return False
    return crowded(log_bytes, limits) or _is_old(oldest[0], limits, now_unix_ns)


def lowest(pins: Sequence[Pin]) -> Pin | None:
    """The federation that keeps the most of the log."""
    return min(pins, key=lambda pin: pin.unread, default=None)


def trim_to(
    log_bytes: int,
    oldest: Sequence[Aged],
    pins: Sequence[Pin],
    limits: Limits,
    now_unix_ns: int,
) -> int:
    """Return up to which record the log goes now, in one slice; 0 if nothing of it does.

    `oldest` holds the log's first records in their order. Ask again after each slice.
    """
    pin = lowest(pins)
    to = gone = 0
    for record in oldest[:SLICE_EVENTS]:
        if pin is not None and record.sequence >= pin.unread:
            break
        if gone >= SLICE_BYTES:
            break
        if not (crowded(log_bytes - gone, limits) or _is_old(record, limits, now_unix_ns)):
            break
        to, gone = record.sequence, gone + record.bytes
    return to


def full_because(log_bytes: int, pin: Pin | None, limits: Limits) -> str | None:
    """Return why the log takes no more, or None if it does."""
    if log_bytes < limits.log_bytes:
        return None
    limit = f"the log takes {log_bytes} bytes and may take {limits.log_bytes} (--log-limit)"
    if pin is None:
        return f"{limit}; its oldest records are being trimmed, the broker goes on by itself"
    federation = pin.federation.rstrip("/")
    read = f"has read up to {pin.cursor} only" if pin.cursor else "has read nothing yet"
    return (
        f"{limit}, and nothing of it may go: the controller of federation {federation} {read}. "
        "The broker goes on by itself when that controller has read on; start it, raise the "
        f"limit, or stop the broker and run `metisfl-broker --give-up {federation}`"
    )


def pages_to_give_back(pages: int, free_pages: int) -> int:
    """Return how many pages the file gives back to the disk now: a part of what is far too much."""
    return min(free_pages, GIVE_BACK_PAGES) if 4 * free_pages > pages else 0


def _is_old(record: Aged, limits: Limits, now_unix_ns: int) -> bool:
    return record.logged_unix_ns < now_unix_ns - limits.keep_ns
