"""The process that trains: what it answers, and that it always answers."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from metisfl.learner.trainer import Hyperparameters
from metisfl.learner.worker import Job, Progress, TrainingCancelled, TrainingError, Worker
from metisfl.proto.model_file import open_model, write_model
from metisfl.proto.tensors import Tensor

DEADLINE_S = 20.0

# A trainer whose `source` says how it behaves; `{folder}` is the test's own.
APP = """
import ctypes, os, signal, sys, time
from pathlib import Path
import numpy as np
from metisfl.learner.trainer import EvaluateResult, TaskCancelled, TrainResult
from metisfl.proto.tensors import Tensor

FOLDER = Path({folder!r})

class App:
    def open(self, source):
        self.source = source

    def initialise(self, seed):
        return [Tensor("w", np.full(4, float(seed)), True)]

    def train(self, tensors, hyperparameters, seed, progress, cancelled):
        metrics = getattr(self, self.source)(progress, cancelled) or {{"loss": 0.25}}
        epochs = hyperparameters.epochs
        changed = Tensor("w", tensors[0].array + seed * epochs, True)
        return TrainResult([changed] * (2 if self.source == "grow" else 1), 10, 3, metrics)

    def evaluate(self, tensors, progress, cancelled):
        return EvaluateResult(7, {{"test.mean": float(tensors[0].array.mean())}})

    def save(self, tensors, folder):
        (folder / "saved").write_text(str(tensors[0].array.tolist()))

    def plain(self, progress, cancelled):
        print("printed by the app")

    grow = plain

    def chatty(self, progress, cancelled):
        until = time.monotonic() + 0.35
        while time.monotonic() < until:
            progress(0.5, {{"loss": 1.0, "undefined": float("nan")}})

    def obedient(self, progress, cancelled):
        progress(0.1, {{}})
        while not cancelled():
            time.sleep(0.001)
        raise TaskCancelled("stopped by request")

    def deaf(self, progress, cancelled):
        progress(0.1, {{}})
        if not (FOLDER / "cured").exists():
            time.sleep(1000)

    def undefined(self, progress, cancelled):
        return {{"loss": float("nan")}}

    def wrong(self, progress, cancelled):
        return 1 / 0

    def leave(self, progress, cancelled):
        sys.exit(3)

    def die(self, progress, cancelled):
        if not (FOLDER / "cured").exists():
            (FOLDER / "cured").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def crash(self, progress, cancelled):
        ctypes.string_at(0)

    def hold(self, progress, cancelled):
        progress(0.1, {{}})
        ctypes.PyDLL(None).sleep(1000)  # keeps the lock of the interpreter: no thread can run
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "behaviour.py").write_text(APP.format(folder=str(tmp_path)))
    write_model(tmp_path / "model", [Tensor("w", np.arange(4.0), True)])
    return tmp_path


@asynccontextmanager
async def working(folder: Path, source: str = "plain") -> AsyncIterator[Worker]:
    worker = Worker(app="behaviour:App", path=folder, source=source)
    try:
        yield worker
    finally:
        await worker.close()


def within_deadline(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, DEADLINE_S)

    asyncio.run(bounded())


def train(folder: Path, seed: int = 2, epochs: int = 3) -> Job:
    hyperparameters = Hyperparameters(epochs)
    return Job("train", seed, folder / "model", folder / "update", hyperparameters)


def ignore(progress: Progress) -> None:
    pass


async def first_progress(run: Callable[[Callable[[Progress], None]], Awaitable[object]]) -> object:
    """Start a run; return its task once the child has reported progress."""
    started = asyncio.Event()
    task = asyncio.ensure_future(run(lambda progress: started.set()))
    await started.wait()
    return task


def test_three_kinds_of_jobs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with working(folder) as worker:
            made = await worker.run(Job("initialise", 7, update_path=folder / "first"), ignore)
            trained = await worker.run(train(folder), ignore)
            job = Job("evaluate", 0, folder / "model", keep_folder=folder / "kept" / "here")
            scored = await worker.run(job, ignore)
        with open_model(folder / "first") as model:
            assert model.tensors()[0].array.tolist() == [7.0] * 4
            assert model.digest() == made.digest
        with open_model(folder / "update") as model:
            assert model.tensors()[0].array.tolist() == [6.0, 7.0, 8.0, 9.0]
            assert model.digest() == trained.digest
        assert (trained.examples, trained.batches, trained.metrics) == (10, 3, {"loss": 0.25})
        assert 0 <= trained.training_s < DEADLINE_S
        assert (scored.digest, scored.examples, scored.metrics) == (b"", 7, {"test.mean": 1.5})
        assert (folder / "kept" / "here" / "saved").read_text() == "[0.0, 1.0, 2.0, 3.0]"

    within_deadline(test())
    printed = capfd.readouterr()
    assert "printed by the app" not in printed.out, "the daemon's stdout is not the app's"
    assert "printed by the app" in printed.err


def test_one_child_does_all_jobs_and_the_app_stays_out_of_the_daemon(folder: Path) -> None:
    async def test() -> None:
        async with working(folder) as worker:
            assert worker.pid is None
            await worker.start()
            pid = worker.pid
            for _ in range(3):
                await worker.run(train(folder), ignore)
            await worker.start()
            assert worker.pid == pid
            assert pid != os.getpid()
        assert worker.pid is None
        assert "behaviour" not in sys.modules

    within_deadline(test())


def test_a_run_costs_about_a_millisecond(folder: Path) -> None:
    async def test() -> None:
        took_s = []
        async with working(folder) as worker:
            await worker.start()
            for _ in range(40):
                started_s = time.perf_counter()
                await worker.run(train(folder), ignore)
                took_s.append(time.perf_counter() - started_s)
        assert min(took_s) < 0.005, "the best of 40, each with two fsyncs"

    within_deadline(test())


def test_progress_is_throttled_and_finite(folder: Path) -> None:
    async def test() -> None:
        told: list[Progress] = []
        async with working(folder, "chatty") as worker:
            await worker.run(train(folder), told.append)
        assert 1 <= len(told) <= 4, "thousands of calls in 0.35 s are at most one each 0.1 s"
        assert all(each.fraction == 0.5 and each.metrics == {"loss": 1.0} for each in told)

    within_deadline(test())


def test_cancel_asks_first(folder: Path) -> None:
    async def test() -> None:
        async with working(folder, "obedient") as worker:
            task = await first_progress(lambda tell: worker.run(train(folder), tell))
            pid = worker.pid
            await worker.cancel(grace_s=DEADLINE_S)
            with pytest.raises(TrainingCancelled, match="stopped by request"):
                await task  # type: ignore[misc]
            assert worker.pid == pid, "the child lives on"
            job = Job("evaluate", model_path=folder / "model")
            assert (await worker.run(job, ignore)).examples == 7

    within_deadline(test())


def test_cancel_kills_what_does_not_listen(folder: Path) -> None:
    async def test() -> None:
        async with working(folder, "deaf") as worker:
            task = await first_progress(lambda tell: worker.run(train(folder), tell))
            pid = worker.pid
            await worker.cancel(grace_s=0.05)
            with pytest.raises(TrainingCancelled, match="was killed"):
                await task  # type: ignore[misc]
            assert worker.pid not in (None, pid), "a new child is on its way"
            (folder / "cured").touch()
            assert (await worker.run(train(folder), ignore)).examples == 10

    within_deadline(test())


def test_cancel_without_a_job_does_nothing(folder: Path) -> None:
    async def test() -> None:
        async with working(folder) as worker:
            await worker.cancel(grace_s=0)
            await worker.run(train(folder), ignore)
            await worker.cancel(grace_s=0)
            assert (await worker.run(train(folder), ignore)).examples == 10

    within_deadline(test())


def test_who_stops_waiting_for_a_run_gets_no_old_answers_later(folder: Path) -> None:
    async def test() -> None:
        async with working(folder, "deaf") as worker:
            task = await first_progress(lambda tell: worker.run(train(folder), tell))
            task.cancel()  # type: ignore[attr-defined]
            with pytest.raises(asyncio.CancelledError):
                await task  # type: ignore[misc]
            (folder / "cured").touch()
            assert (await worker.run(train(folder), ignore)).examples == 10

    within_deadline(test())


@pytest.mark.parametrize(
    ("source", "words", "fault"),
    [
        ("wrong", r"training failed: ZeroDivisionError: division by zero \(.*behaviour.py", "user"),
        ("undefined", "the trainer reports loss = nan; leave out what has no value", "user"),
        ("grow", "two tensors are called 'w'; names must be unique", "user"),
        ("leave", "the training process ended with exit code 3", "user"),
        ("die", r"killed by SIGKILL \(the kernel does this when memory runs out\)", "machine"),
        ("crash", "killed by SIGSEGV", "machine"),
    ],
)
def test_a_job_that_goes_wrong_says_why_and_whose_fault_it_is(
    folder: Path, source: str, words: str, fault: str
) -> None:
    async def test() -> None:
        async with working(folder, source) as worker:
            with pytest.raises(TrainingError, match=words) as caught:
                await worker.run(train(folder), ignore)
            assert caught.value.fault == fault
            assert not (folder / "update").exists()
            job = Job("evaluate", model_path=folder / "model")
            assert (await worker.run(job, ignore)).examples == 7, "the next job is done"

    within_deadline(test())


def test_a_model_of_another_form_is_refused_before_training(folder: Path) -> None:
    async def test() -> None:
        write_model(folder / "model", [Tensor("w", np.arange(5.0), True)])
        async with working(folder, "crash") as worker:
            with pytest.raises(TrainingError) as caught:
                await worker.run(train(folder), ignore)
            assert str(caught.value) == (
                "this site's app builds another model: "
                "tensor 'w' is (4,) here and (5,) in the federation"
            )

    within_deadline(test())


@pytest.mark.parametrize(
    ("content", "words"), [(None, "model: No such file"), (b"x", "is not a model file")]
)
def test_a_model_file_that_cannot_be_read(folder: Path, content: bytes | None, words: str) -> None:
    async def test() -> None:
        (folder / "model").unlink()
        if content is not None:
            (folder / "model").write_bytes(content)
        async with working(folder) as worker:
            with pytest.raises(TrainingError, match=words) as caught:
                await worker.run(train(folder), ignore)
            assert caught.value.fault == "machine"

    within_deadline(test())


def test_an_app_that_cannot_be_loaded_is_loaded_anew_by_the_next_start(folder: Path) -> None:
    async def test() -> None:
        good = (folder / "behaviour.py").read_text()
        (folder / "behaviour.py").write_text("import missing_here")
        async with working(folder) as worker:
            for _ in range(2):
                with pytest.raises(TrainingError, match="missing_here") as caught:
                    await worker.start()
                assert caught.value.fault == "user"
            (folder / "behaviour.py").write_text(good)
            assert (await worker.run(train(folder), ignore)).examples == 10

    within_deadline(test())


def test_a_child_that_died_while_idle_is_replaced(folder: Path) -> None:
    async def test() -> None:
        async with working(folder) as worker:
            await worker.start()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
            assert (await worker.run(train(folder), ignore)).examples == 10

    within_deadline(test())


def test_ctrl_c_is_for_the_daemon(folder: Path) -> None:
    async def test() -> None:
        async with working(folder) as worker:
            await worker.start()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGINT)
            assert (await worker.run(train(folder), ignore)).examples == 10

    within_deadline(test())


def test_close_ends_a_child_that_trains(folder: Path) -> None:
    async def test() -> None:
        async with working(folder, "deaf") as worker:
            task = await first_progress(lambda tell: worker.run(train(folder), tell))
            await worker.close()
            with pytest.raises(TrainingError, match="SIGKILL"):
                await task  # type: ignore[misc]

    within_deadline(test())


PARENT = """
import asyncio, sys
from pathlib import Path
from metisfl.learner.worker import Job, Worker

async def main():
    folder = Path(sys.argv[1])
    worker = Worker(app="behaviour:App", path=folder, source=sys.argv[2])
    job = Job("train", 0, folder / "model", folder / "update")
    await worker.run(job, lambda progress: print(worker.pid, flush=True))

asyncio.run(main())
"""


@pytest.mark.parametrize("source", ["deaf", "hold"])
def test_the_child_dies_with_its_parent_while_it_trains(folder: Path, source: str) -> None:
    """Noticed by its thread, and by the kernel if app code lets no thread run."""
    command = [sys.executable, "-c", PARENT, str(folder), source]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        watch = os.pidfd_open(child)
        parent.kill()
    try:
        assert select.select([watch], [], [], DEADLINE_S)[0], "the child outlived its parent"
    finally:
        os.close(watch)
