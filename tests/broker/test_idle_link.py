"""A client whose broker is away waits for it, and does nothing else meanwhile."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest
from client_stories import PATIENCE_S, run, soon, until

from metisfl.broker.outbox import Outbox


def test_while_the_broker_is_away_the_outbox_is_read_with_the_ticks_and_no_more_often(
    site: Any, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = site("learner:l1")
    broker.start()
    reads = 0
    rows = Outbox.rows

    def counted(outbox: Outbox, after: int, count: int) -> list[tuple[int, bytes, bytes]]:
        nonlocal reads
        reads += 1
        return rows(outbox, after, count)

    async def story() -> int:
        async with learner.client() as client:
            learner.accept("f/done/l1/")
            client.flush()
            await client.drained(PATIENCE_S)
            broker.end(signal.SIGKILL)
            monkeypatch.setattr(Outbox, "rows", counted)
            learner.accept("f/done/l1/")
            client.flush()
            await soon(until(lambda: not client.connected))  # it has found out; about a second
            seen = reads
            await asyncio.to_thread(broker.start)
            await client.drained(PATIENCE_S)
            return seen

    seen = run(story())
    assert seen < 100, f"{seen} reads of the outbox while nothing could be sent"
