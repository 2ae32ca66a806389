"""How much of each peer's messages the bulk endpoint reads that bring no model byte further.

Rule 1: what an open transfer asks for is never counted; its credit bounds it.
Rule 2: whoever has used up the rest is not read for a moment: what it sends costs a look at its
name. The protocol repeats what is lost.

Pure. Time is monotonic seconds.
"""

from __future__ import annotations

from typing import Final

from metisfl.deploy.bucket import Bucket

__all__ = ["FUTILE_PER_S", "PEERS_MAX", "Patience"]

FUTILE_PER_S: Final = 100.0
"""Of one principal: OPENs, GETs, chunks that were not the next, frames that are none."""
PEERS_MAX: Final = 4096  # known by key they are fewer; beyond, all newcomers share one bucket


class Patience:
    """Belongs to the endpoint's thread."""

    def __init__(self) -> None:
        self._buckets: dict[str, Bucket] = {}

    def is_out(self, principal: str, now: float) -> bool:
        """Whether its next message is to be dropped unread."""
        bucket = self._buckets.get(self._key(principal))
        return bucket is not None and bucket.is_empty(now)

    def spend(self, principal: str, now: float) -> None:
        """It has sent something that no open transfer asked for."""
        key = self._key(principal)
        if key not in self._buckets:
            self._buckets[key] = Bucket(FUTILE_PER_S, now)
        self._buckets[key].take(now)

    def _key(self, principal: str) -> str:
        full = len(self._buckets) >= PEERS_MAX and principal not in self._buckets
        return "" if full else principal
