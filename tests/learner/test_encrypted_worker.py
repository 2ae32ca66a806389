"""The training process with a key: it alone opens and seals, and can be stopped while it does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from metisfl.deploy.ckks_keys import SECRET_FILE, write_new_key, write_secret
from metisfl.learner.crypto import generate
from metisfl.learner.worker import Job, TrainingCancelled, TrainingError, Worker
from metisfl.learner.worker_messages import Sealing
from metisfl.proto.model_file import open_model

DEADLINE_S = 20.0
PARAMETERS = 400_000  # 14 blocks

# The second block waits until it may be sealed; `{folder}` is the test's own.
APP = """
import time
from pathlib import Path
from metisfl.learner.crypto import Crypto
from metisfl.learner.instant import Instant

encrypt_block = Crypto.encrypt_block

def held_up(crypto, values, *, index, **more):
    while index == 1 and not Path({folder!r}, "go").exists():
        time.sleep(0.001)
    return encrypt_block(crypto, values, index=index, **more)

Crypto.encrypt_block = held_up
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_new_key(tmp_path / "keys", *generate("compact", max_learners=4))
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "held.py").write_text(APP.format(folder=str(tmp_path / "app")))
    return tmp_path


@asynccontextmanager
async def working(home: Path) -> AsyncIterator[Worker]:
    worker = Worker(
        app="held:Instant", path=home / "app", source=str(PARAMETERS), keys=home / "keys"
    )
    try:
        yield worker
    finally:
        await worker.close()


def within_deadline(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, DEADLINE_S)

    asyncio.run(bounded())


def initialise(home: Path) -> Job:
    sealing = Sealing(home / "trained", (), reference_weight=None)
    return Job("initialise", update_path=home / "update", sealing=sealing)


def go_on(home: Path) -> None:
    (home / "app" / "go").touch()


def left(home: Path) -> set[str]:
    return {path.name for path in home.iterdir()} - {"keys", "app"}


async def sealing(worker: Worker, home: Path) -> asyncio.Task[object]:
    """Start a job; return it when the first block is sealed, and the second waits."""
    begun = asyncio.Event()
    run = worker.run(initialise(home), lambda progress: begun.set())
    job = asyncio.ensure_future(run)
    await begun.wait()
    return job  # type: ignore[return-value]


def test_the_child_seals_and_the_daemon_knows_no_openfhe(home: Path) -> None:
    async def test() -> None:
        go_on(home)
        async with working(home) as worker:
            await worker.start()
            assert worker.examples == 1
            made = await worker.run(initialise(home), lambda progress: None)
        with open_model(home / "update") as update, open_model(home / "trained") as trained:
            assert update.digest() == made.digest
            assert trained.digest() == made.trained_digest
            assert made.exponents == (0,)

    code = (
        "import sys; from metisfl.learner import service, shell, worker; "
        "assert 'openfhe' not in sys.modules, 'imported after all'"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-Ic", code]) == 0
    within_deadline(test())


def test_sealing_can_be_cancelled_by_asking(home: Path) -> None:
    async def test() -> None:
        async with working(home) as worker:
            job = await sealing(worker, home)
            pid = worker.pid
            cancelling = asyncio.ensure_future(worker.cancel(grace_s=DEADLINE_S))
            await asyncio.sleep(0)  # it has asked
            go_on(home)
            await cancelling
            with pytest.raises(TrainingCancelled, match="was cancelled"):
                await job
            assert worker.pid == pid, "the child lives on"
            assert left(home) == {"trained"}

    within_deadline(test())


def test_a_child_that_is_killed_while_it_seals_is_replaced_and_the_job_done_by_the_next(
    home: Path,
) -> None:
    async def test() -> None:
        async with working(home) as worker:
            job = await sealing(worker, home)
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(TrainingError, match="killed by SIGKILL") as caught:
                await job
            assert caught.value.fault == "machine"
            assert not (home / "update").exists()
            go_on(home)
            again = Job("seal", update_path=home / "update", sealing=initialise(home).sealing)
            assert (await worker.run(again, lambda progress: None)).digest
            assert left(home) == {"trained", "update"}

    within_deadline(test())


def test_a_key_that_cannot_be_used_is_said_at_the_start(home: Path) -> None:
    async def test() -> None:
        (home / "keys" / SECRET_FILE).unlink()
        write_secret(home / "keys", generate("compact", max_learners=4)[1])
        async with working(home) as worker:
            with pytest.raises(TrainingError, match="both must be of one key") as caught:
                await worker.start()
            assert caught.value.fault == "user"

    within_deadline(test())
