"""Batches for a log on disk, made by hand, and a lane of it read back."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from metisfl.broker.reading import Stored
from metisfl.broker.sequencer import Append, Batch, Refused
from metisfl.broker.store import Store

TOPICS = {"f/done/l1/": 2, "f/task/l1/": 3}


def batch(
    appends: Sequence[Append],
    *,
    number: int = 1,
    generation: int = 0,
    watermarks: Sequence[tuple[str, int, int]] = (),
    refused: Sequence[Refused] = (),
    cursors: Sequence[tuple[str, str, int]] = (),
) -> Batch:
    return Batch(
        number=number,
        generation=generation,
        logged_unix_ns=1000 + number,
        appends=appends,
        refused=refused,
        watermarks=watermarks,
        federations=[(1, "f/")],
        topics=[(id, name, 1) for name, id in TOPICS.items()],
        cursors=cursors,
    )


def events(count: int, *, size: int = 20, first: int = 1) -> list[Append]:
    """Every third event is a task, the rest are completions."""
    heads = {name: 0 for name in TOPICS}
    made = []
    for sequence in range(1, first + count):
        topic = "f/task/l1/" if sequence % 3 == 0 else "f/done/l1/"
        data = f"event {sequence} ".encode().ljust(size, b".")
        made.append(
            Append(
                sequence,
                TOPICS[topic],
                1,
                heads[topic],
                sequence - 1,
                zlib.crc32(data),
                data,
                topic.encode(),
            )
        )
        heads[topic] = sequence
    return made[first - 1 :]


def read(
    store: Store,
    lane: str = "f/",
    *,
    after: int = 0,
    head: int,
    lane_head: int | None = None,
    max_events: int = 256,
    max_bytes: int = 1 << 22,
) -> tuple[list[Stored], int]:
    records, through, _ = store.reader.read_lane(
        of_federation=lane == "f/",
        lane_id=TOPICS.get(lane, 1),
        lane_head=head if lane_head is None else lane_head,
        after=after,
        head=head,
        max_events=max_events,
        max_bytes=max_bytes,
    )
    return records, through
