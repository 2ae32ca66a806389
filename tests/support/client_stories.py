"""How a test tells a story of clients: with a deadline for whatever it waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from metisfl.broker.client import Feed, Record

PATIENCE_S = 20.0  # never waited for in a test that passes
T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 60))


async def soon(work: Awaitable[T]) -> T:
    return await asyncio.wait_for(work, PATIENCE_S)


async def read(feed: Feed[Any], count: int) -> list[Record]:
    """The next `count` records; fails if more come with them."""
    records: list[Record] = []
    while len(records) < count:
        records += (await soon(feed.__anext__())).records
    assert len(records) == count, f"{len(records)} records instead of {count}"
    return records


async def until(holds: Callable[[], bool]) -> None:
    """Turn the loop until something that others do has happened."""
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while not holds():
        assert asyncio.get_running_loop().time() < deadline, "it never happened"
        await asyncio.sleep(0.005)
