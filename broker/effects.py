"""What the broker's pure core asks of the thread that owns the sockets.

Rule: an effect is done once, in the order in which it was asked for, or not at all: a peer that was
not told asks again.
"""

from __future__ import annotations

from dataclasses import dataclass

from metisfl.proto import frames
from metisfl.proto.frames import Beat, Fetch

__all__ = ["Effect", "Forward", "Read", "Reply", "TellStatus"]


@dataclass(frozen=True, slots=True)
class Reply:
    """Effect: send this to `peer`; what cannot be sent at once is dropped, it will ask again.

    A FetchedBatch gets a receipt of its own, and `answered` is called.
    """

    peer: bytes
    message: frames.Reply


@dataclass(frozen=True, slots=True)
class Read:
    """Effect: read the lane from the log, answer, and call `answered`."""

    peer: bytes
    fetch: Fetch
    of_federation: bool
    lane_id: int
    lane_head: int  # the lane's newest record on disk
    head: int  # the log's


@dataclass(frozen=True, slots=True)
class Forward:
    """Effect: publish this on the live socket now; it is not stored."""

    beat: Beat


@dataclass(frozen=True, slots=True)
class TellStatus:
    """Effect: tell `peer` how the broker is."""

    peer: bytes


Effect = Reply | Read | Forward | TellStatus
