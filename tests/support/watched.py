"""A run of daemons started by hand that the test itself asks for and watches: it acts at events.

The daemons' driver is this process. What a test does at an event is done when the event has come
out of the log, before the driver looks at the next one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import closing, suppress
from typing import Any

import numpy as np
from daemons import Daemons
from google.protobuf.message import Message

from metisfl.deploy.broker_access import Access
from metisfl.deploy.database import open_database
from metisfl.deploy.run_folder import DRIVER
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.settings import load_federation
from metisfl.deploy.view import View
from metisfl.deploy.watch import new_view, watch
from metisfl.proto import events_pb2 as pb
from metisfl.proto.records import RoundRecord, unpack_record

Act = Callable[[View, Message], None]
"""Gets the view before an event, and the event, of each that the log holds."""

APP = "metisfl.deploy.bench_site:Site"  # a site's behaviour is how long it trains, in seconds
ROUND_EVENTS = (
    pb.RoundOpened,
    pb.TaskAssigned,
    pb.UpdateStored,
    pb.TaskCompleted,
    pb.RoundClosed,
)
"""The kinds of events that each round has, in the order in which they can be seen first."""


class _Acting(LineScreen):
    def __init__(self, act: Act) -> None:
        self._act = act

    def show(self, before: View, after: View, message: Message, logged_unix_ns: int) -> None:
        super().show(before, after, message, logged_unix_ns)
        if logged_unix_ns and before.started:
            self._act(before, message)


def nothing(before: View, message: Message) -> None:
    """Watch, and disturb nobody."""


async def watched(
    daemons: Daemons,
    *,
    rounds: int,
    act: Act = nothing,
    lease_s: float = 60.0,
    continues: str = "",
    meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None,
    deadline_s: float = 100.0,
) -> View:
    """Run to the end. Fails after `deadline_s`. `meanwhile` may end early."""
    quorum = len(daemons.sites)
    federation = load_federation(daemons.write_federation(rounds, quorum, lease_s))
    for left in daemons.homes.driver.glob("driver.db*"):
        left.unlink()

    async def also() -> None:
        if meanwhile is not None:
            await meanwhile()
        await asyncio.Event().wait()

    with closing(open_database(daemons.homes.driver / "driver.db")) as connection:
        run = watch(
            federation,
            access=Access(
                daemons.near["ingress"],
                daemons.near["live"],
                DRIVER,
                daemons.homes.driver_keys,
            ),
            connection=connection,
            view=new_view(federation, continues),
            screen=_Acting(act),
            meanwhile=also,
        )
        return await asyncio.wait_for(run, deadline_s)


def digest_of(daemons: Daemons, view: View) -> str:
    """Of the bytes of the run's final model, which is the same at all sites."""
    digests = {}
    for name in daemons.sites:
        path = daemons.homes.learners[name] / "final" / view.run_id / "model.npz"
        digest = hashlib.sha256()
        with np.load(path) as arrays:
            for array in sorted(arrays.files):
                digest.update(array.encode() + arrays[array].tobytes())
        digests[name] = digest.hexdigest()
    assert len(set(digests.values())) == 1, f"sites hold different models: {digests}"
    return digest.hexdigest()


def records_of(daemons: Daemons, view: View) -> list[RoundRecord]:
    paths = (daemons.homes.controller / "rounds" / view.run_id).rglob("*.msgpack")
    return sorted((unpack_record(p.read_bytes()) for p in paths), key=lambda record: record.round)


def said_by(daemons: Daemons, name: str) -> list[dict[str, Any]]:
    """The daemon's log, all its lives."""
    found = []
    for line in (daemons.homes.logs / f"{name}.log").read_text().splitlines():
        with suppress(ValueError):  # cut by a kill
            found.append(json.loads(line))
    return found


def check(daemons: Daemons, view: View, undisturbed: str) -> None:
    """What must hold after a run, whatever was done to its processes meanwhile."""
    records = records_of(daemons, view)
    assert [record.round for record in records] == list(range(view.rounds + 1))
    for record in records[1:]:
        counted = [one.learner for one in record.counted]
        assert counted == sorted(daemons.sites), f"round {record.round} has counted {counted}"
    assert digest_of(daemons, view) == undisturbed, "the final model is another one"
    for name in daemons.sites:
        trained = Counter(
            said["task"] for said in said_by(daemons, name) if said["event"] == "trained"
        )
        again = [task for task, times in trained.items() if times > 1]
        assert not again, f"{name} has completed the training of {again} more than once"
