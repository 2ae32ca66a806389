"""What a client says of the trouble with its broker: each once, until it is over.

Rule: trouble is told and waited out. Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Final

import structlog

__all__ = ["Rejected", "Trouble"]

UNANSWERED_S: Final = 5.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Rejected:
    """An event of ours that the broker will never take; those behind it go on."""

    sequence: int
    topic: str
    type: str
    correlation_id: str
    reason: str


class Trouble:
    """The trouble of one client with the broker at `endpoint`. Times are monotonic seconds."""

    def __init__(self, endpoint: str, principal: str, now: float) -> None:
        self._endpoint, self._principal = endpoint, principal
        self._unanswered_since: float | None = now
        self._told = False
        self._busy_reason = ""
        self.refusal = ""
        """Why the broker refused the latest connection; empty when it did not, or answers now."""

    def rejected(self, rejected: Rejected) -> None:
        log.error("event refused for good", **asdict(rejected))

    def busy(self, reason: str) -> None:
        if reason != self._busy_reason:
            self._busy_reason = reason
            log.warning("the broker is busy, trying again", reason=reason)

    def not_busy(self) -> None:
        self._busy_reason = ""

    def refused(self, why: str) -> None:
        """`why` it refused the connection; "" when it did not."""
        if why and why != self.refusal:
            self.refusal, self._told = why, True
            log.error("the broker refuses the connection", reason=why, **self._who())

    def silent(self, now: float) -> None:
        """It does not answer, or not yet."""
        if self._unanswered_since is None:
            self._unanswered_since = now
        elif not self._told and now - self._unanswered_since >= UNANSWERED_S:
            self._told = True
            log.warning(
                "the broker does not answer; is it running, and does it know this key?",
                **self._who(),
            )

    def welcomed(self, software: str) -> None:
        if self._told:
            log.info("the broker answers", endpoint=self._endpoint, software=software)
        self._unanswered_since, self._told, self.refusal = None, False, ""

    def _who(self) -> dict[str, str]:
        return {"endpoint": self._endpoint, "principal": self._principal}
