"""How long a killed daemon was missed: from SIGKILL to the first sign of its next life.

Rule: a sign is what the former life cannot have caused.
    broker      a record with a time of storing after its death: the broker itself sets that time
    controller  an event of its own, stored more than IN_FLIGHT_S after its death: what the former
                life had sent is in the log by then, and the next one still loads its modules
    learner     progress with a task, or an answer to one, after it has joined again; it joins once
                in a life, after its application was loaded
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import may_send

__all__ = ["Outage", "kill"]

IN_FLIGHT_S: Final = 0.05


@dataclass(slots=True)
class Outage:
    """One daemon that was killed. Times are the machine's clock, as the broker's are."""

    victim: str
    killed_ns: int
    dead_ns: int
    over_ns: int = 0  # 0: no sign of life so far
    joined: bool = False

    @property
    def over(self) -> bool:
        return self.over_ns > 0

    @property
    def seconds(self) -> float:
        """From SIGKILL to the first sign; only once it is over."""
        return (self.over_ns - self.killed_ns) / 1e9

    def saw(self, message: Message, logged_unix_ns: int) -> bool:
        """Take an event in the order of the log, or a beat, whose time is 0; True for the sign."""
        if self.over or not self._is_sign(message, logged_unix_ns):
            return False
        self.over_ns = logged_unix_ns or time.time_ns()
        return True

    def __str__(self) -> str:
        return f"{self.victim} was missed for {self.seconds:.2f} s"

    def _is_sign(self, message: Message, logged_unix_ns: int) -> bool:
        if self.victim == "broker":
            return logged_unix_ns > self.dead_ns
        if self.victim == "controller":
            later = logged_unix_ns > self.dead_ns + IN_FLIGHT_S * 1e9
            return later and may_send("controller", message)
        if not may_send(f"learner:{self.victim}", message):
            return False
        if isinstance(message, pb.LearnerJoined):
            self.joined = self.joined or logged_unix_ns > self.dead_ns
            return False
        return self.joined and not isinstance(message, pb.Heartbeat)


def kill(victim: str, pids: Mapping[str, int]) -> Outage | None:
    """SIGKILL a daemon and see it dead; None if it is not there at the moment."""
    try:
        process = os.pidfd_open(pids[victim])
    except (KeyError, ProcessLookupError):
        return None
    try:
        killed_ns = time.time_ns()
        signal.pidfd_send_signal(process, signal.SIGKILL)
        select.select([process], [], [])  # milliseconds, unless its disk holds it
    finally:
        os.close(process)
    return Outage(victim, killed_ns, time.time_ns())
