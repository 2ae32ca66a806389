"""Let go of a bound socket's address, so that another socket can have it at once.

Rule: libzmq closes in its own time, in another thread; who binds anew waits for its word, not for a
while.
"""

from __future__ import annotations

from typing import Final

import zmq

from metisfl.proto.errors import MachineError

__all__ = ["close_bound"]

CLOSED_MS: Final = 5000


def close_bound(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Close `socket` and cut its connections; returns when `endpoint` is free.

    Raises MachineError if that takes over 5 s.
    """
    monitor = socket.get_monitor_socket(zmq.EVENT_CLOSED)
    try:
        socket.unbind(endpoint)
        if not monitor.poll(CLOSED_MS):
            raise MachineError(f"{endpoint} was not let go within {CLOSED_MS} ms; start again")
    finally:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close(linger=0)
