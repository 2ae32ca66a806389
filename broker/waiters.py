"""Who waits for the broker: until events are acknowledged, or for its status.

Rule: whoever waits is woken, by what it waits for or by what ended the client.
"""

from __future__ import annotations

import asyncio
from typing import Any

from metisfl.broker.status import BrokerStatus

__all__ = ["Waiters"]


class Waiters:
    """Futures of the running loop; one that was given up counts no more."""

    def __init__(self) -> None:
        self._acked: list[tuple[int, asyncio.Future[None]]] = []
        self._status: list[asyncio.Future[BrokerStatus]] = []

    def acked(self, sequence: int) -> asyncio.Future[None]:
        """Done when our event `sequence` is acknowledged."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._acked.append((sequence, waiter))
        return waiter

    def status(self) -> asyncio.Future[BrokerStatus]:
        """Done with the broker's next answer."""
        waiter: asyncio.Future[BrokerStatus] = asyncio.get_running_loop().create_future()
        self._status.append(waiter)
        return waiter

    @property
    def want_status(self) -> bool:
        """True if somebody still waits for it."""
        self._status = [waiter for waiter in self._status if not waiter.done()]
        return bool(self._status)

    def told(self, status: BrokerStatus) -> None:
        for waiter in self._status:
            if not waiter.done():
                waiter.set_result(status)
        self._status = []

    def settle(self, acked: int) -> None:
        """Everything up to `acked` is acknowledged."""
        for sequence, waiter in self._acked:
            if acked >= sequence and not waiter.done():
                waiter.set_result(None)
        self._acked = [entry for entry in self._acked if not entry[1].done()]

    def end(self, error: BaseException) -> None:
        waiting: list[asyncio.Future[Any]] = [waiter for _, waiter in self._acked]
        for waiter in (*waiting, *self._status):
            if not waiter.done():
                waiter.set_exception(error)
