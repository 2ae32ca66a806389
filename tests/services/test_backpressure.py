"""Two hundred learners that upload at once: memory stays bounded, and every update arrives.

Bounds: the controller takes at most one and a half updates and 32 MiB over its idle size, whatever
the number of learners (deploy/bench_round.py measures the same); the broker, through which no model
byte goes, 32 MiB.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from stub_learner import stub_learner

from metisfl.deploy import processes
from metisfl.deploy.broker_access import Access
from metisfl.deploy.database import open_database
from metisfl.deploy.memory import PeakMemory
from metisfl.deploy.run_folder import DRIVER, create_run_folder
from metisfl.deploy.screen import LineScreen
from metisfl.deploy.settings import load_federation
from metisfl.deploy.view import View
from metisfl.deploy.watch import new_view, watch
from metisfl.proto import events_pb2 as pb
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

pytestmark = pytest.mark.chaos

LEARNERS = 200
VALUES = 500_000
SPARE_BYTES = 32 << 20


class Crowd:
    """Lets all learners of a round begin in the same moment."""

    def __init__(self) -> None:
        self._waiting = 0
        self.all_here = asyncio.Event()
        self.go = asyncio.Event()

    async def gate(self, task: pb.TaskAssigned) -> None:
        if task.kind == pb.TRAIN:
            self._waiting += 1
            if self._waiting == LEARNERS:
                self.all_here.set()
            await self.go.wait()


@pytest.mark.timeout(300)
def test_memory_is_bounded_and_every_update_arrives_when_all_upload_at_once(
    tmp_path: Path,
) -> None:
    async def story() -> tuple[View, int, int, int]:
        names = [f"l{number:03d}" for number in range(LEARNERS)]
        homes = create_run_folder(tmp_path / "run", names)
        update = tmp_path / "update"
        tensor = Tensor("w", np.linspace(-1, 1, VALUES, dtype=np.float32), True)
        write_model(update, [tensor])
        ingress, live, bulk = processes.free_endpoints(["tcp://127.0.0.1:0"] * 3)
        text = f"[federation]\nname = 'crowd'\nrounds = 1\nquorum = {LEARNERS}\nlease_s = 200\n"
        text += "privacy = 'plain'\n[app]\nobject = 'none:None'\n"
        text += f"[broker]\ningress = '{ingress}'\nlive = '{live}'\n"
        text += "".join(f"[[learners]]\nname = '{name}'\n" for name in names)
        (tmp_path / "crowd.toml").write_text(text)
        federation = load_federation(tmp_path / "crowd.toml")
        wires = {"ingress": ingress, "live": live}
        daemons = [
            await processes.start(
                "broker",
                "metisfl.broker.service",
                {"home": str(homes.broker), **wires},
                homes.logs / "broker.log",
            ),
            await processes.start(
                "controller",
                "metisfl.controller.service",
                {"home": str(homes.controller), "federation": "crowd", "bulk": bulk, **wires},
                homes.logs / "controller.log",
            ),
        ]
        crowd, peaks = Crowd(), []
        try:
            async with AsyncExitStack() as stack:
                learners = [
                    await stack.enter_async_context(
                        stub_learner(
                            name, "crowd", homes.learners[name], update, (ingress, live, bulk)
                        )
                    )
                    for name in names
                ]
                await asyncio.gather(*(learner.join() for learner in learners))

                async def measure() -> None:
                    await crowd.all_here.wait()
                    peaks.extend(PeakMemory(daemon.process.pid) for daemon in daemons)
                    crowd.go.set()

                works = [asyncio.ensure_future(one.work(crowd.gate)) for one in learners]
                works.append(asyncio.ensure_future(measure()))
                connection = stack.enter_context(closing(open_database(homes.driver / "driver.db")))
                view = await watch(
                    federation,
                    access=Access(ingress, live, DRIVER, homes.driver_keys),
                    connection=connection,
                    view=new_view(federation),
                    screen=LineScreen(),
                )
                taken = [peak.over_idle_bytes() for peak in peaks]
                for work in works:
                    work.cancel()
                await asyncio.gather(*works, return_exceptions=True)
        finally:
            await processes.stop_all(daemons)
        return view, taken[0], taken[1], update.stat().st_size

    view, broker_bytes, controller_bytes, update_bytes = asyncio.run(story())
    assert view.closed is not None
    assert len(view.closed.counted) == LEARNERS, "an update did not arrive"
    bound = update_bytes * 3 // 2 + SPARE_BYTES
    print(f"broker {broker_bytes}, controller {controller_bytes} of {bound}")
    assert controller_bytes <= bound, f"{controller_bytes} bytes over idle; allowed are {bound}"
    assert broker_bytes <= SPARE_BYTES, f"{broker_bytes} bytes over idle; allowed are {SPARE_BYTES}"
