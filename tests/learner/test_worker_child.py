"""What an app's own trainer says is made fit for an event, or is a failure that names it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from metisfl.learner.worker import Job, Progress, Result, TrainingError, Worker
from metisfl.proto.errors import DiskFull
from metisfl.proto.events import encode
from metisfl.proto.events_pb2 import TaskFailed
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

APP = """
import errno, os
import numpy as np
from metisfl.learner.trainer import EvaluateResult, TrainResult
from metisfl.proto.tensors import Tensor

class App:
    def open(self, source):
        self.source = source

    def initialise(self, seed):
        return [Tensor("w", np.zeros(4), True)]

    def train(self, tensors, hyperparameters, seed, progress, cancelled):
        if self.source == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")
        if self.source == "file":
            open(b"/nowhere/patients-\\xff")
        progress(0.5, {"": 1.0, "n" * 200: 1.0, "loss": 0.5})
        return TrainResult(tensors, int(self.source), np.int64(3))

    def evaluate(self, tensors, progress, cancelled):
        return EvaluateResult(int(self.source), {})

    def save(self, tensors, folder):
        pass
"""


def work(folder: Path, source: str) -> tuple[Result, list[Progress]]:
    (folder / "own.py").write_text(APP)
    write_model(folder / "model", [Tensor("w", np.zeros(4), True)])
    job = Job("train", model_path=folder / "model", update_path=folder / "update")
    said: list[Progress] = []

    async def scenario() -> Result:
        worker = Worker(app="own:App", path=folder, source=source)
        try:
            return await worker.run(job, said.append)
        finally:
            await worker.close()

    return asyncio.run(scenario()), said


def test_what_cannot_be_shown_is_left_out_of_progress(tmp_path: Path) -> None:
    result, said = work(tmp_path, "7")
    assert (result.examples, result.batches) == (7, 3)
    assert [one.metrics for one in said] == [{"loss": 0.5}]


@pytest.mark.parametrize("count", ["-1", str(2**53 + 1)])
def test_a_number_of_examples_that_cannot_be_fails_the_task(tmp_path: Path, count: str) -> None:
    with pytest.raises(TrainingError, match=f"reports {count} examples"):
        work(tmp_path, count)


def test_a_full_disk_is_nobodys_failure_though_the_apps_own_code_met_it(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"training failed: .*No space left.*; make room"):
        work(tmp_path, "full")


def test_a_reason_is_text_whatever_a_file_is_called(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="patients-") as caught:
        work(tmp_path, "file")
    encode(TaskFailed(task_id="t", learner="ada", reason=str(caught.value)))


@pytest.mark.parametrize(
    ("method", "said"),
    [("", 0), ("def examples(self): return 12", 12), ("examples = 12", 0)],
)
def test_an_app_may_say_how_many_examples_it_trains_on(
    tmp_path: Path, method: str, said: int
) -> None:
    assert examples_of(tmp_path, method) == said


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("def examples(self): return -1", "reports -1 examples"),
        ("def examples(self): return 1 / 0", r"examples\(\) failed: ZeroDivisionError.*own.py"),
    ],
)
def test_what_cannot_be_a_number_of_examples_is_said_at_the_start(
    tmp_path: Path, method: str, words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        examples_of(tmp_path, method)


def examples_of(folder: Path, method: str) -> int:
    (folder / "own.py").write_text(f"{APP}\n    {method}\n")

    async def scenario() -> int:
        worker = Worker(app="own:App", path=folder, source="7")
        try:
            await worker.start()
            return worker.examples
        finally:
            await worker.close()

    return asyncio.run(scenario())
