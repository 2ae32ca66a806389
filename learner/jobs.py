"""What the training process does: a job at a time, with one trainer.

Rule: what a job gives is a function of the job and the trainer. What the trainer says of itself is
checked here, so that whatever leaves fits an event.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from metisfl.learner.app import app_code
from metisfl.learner.trainer import TaskCancelled, Trainer, examples_of
from metisfl.learner.worker_messages import DURABLE_S, Job, Progress, Result
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events import COUNT_MAX, METRIC_NAME_CHARACTERS_MAX, METRICS_MAX
from metisfl.proto.model_file import open_model, sync_folder, write_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import Tensor, compare_manifests, is_encrypted, manifest_of

__all__ = ["JobLine", "Jobs"]

PROGRESS_INTERVAL_S: Final = 0.1


class JobLine:
    """The line between the job that is done and whoever waits for it."""

    def __init__(
        self, send: Callable[[Progress], None], is_cancelled: Callable[[int], bool]
    ) -> None:
        self._send = send
        self._is_cancelled = is_cancelled
        self._number = 0
        self._sent_s = -math.inf

    def begin(self, number: int) -> None:
        """The next job is `number`."""
        self._number = number
        self._sent_s = -math.inf

    def cancelled(self) -> bool:
        return self._is_cancelled(self._number)

    def progress(self, fraction: float, metrics: Mapping[str, float]) -> None:
        """Tell how far the job is, at most ten times a second; metrics without a value are not."""
        now_s = time.monotonic()
        if now_s - self._sent_s >= PROGRESS_INTERVAL_S:
            self._sent_s = now_s
            fit = (
                (k, v)
                for k, v in metrics.items()
                if 0 < len(k) <= METRIC_NAME_CHARACTERS_MAX and math.isfinite(v)
            )
            some = dict(itertools.islice(fit, METRICS_MAX))
            self._send(Progress(min(1.0, max(0.0, fraction)), some))

    def go_on(self, fraction: float) -> None:
        """The same, for our own work between two blocks. Raises TaskCancelled."""
        if self.cancelled():
            raise TaskCancelled("the task was cancelled")
        self.progress(fraction, {})


class Jobs:
    """Jobs with plain models."""

    def __init__(self, trainer: Trainer, line: JobLine) -> None:
        self._trainer = trainer
        self._line = line
        self._own: Manifest | None = None

    def examples(self) -> int:
        """Size of the training split, 0 if unknown. Raises UserError for what cannot be one."""
        with app_code("the trainer's examples() failed"):
            examples = examples_of(self._trainer)
        return _count(examples)

    def initial(self, seed: int) -> Sequence[Tensor]:
        """The initial model of a seed. Raises UserError for what the app does wrong."""
        with app_code("the initial model could not be built"):
            return self._trainer.initialise(seed)

    def do(self, job: Job) -> Result:
        """Do one job. Raises MetisError and OSError."""
        if job.kind == "initialise":
            return self._initialise(job)
        assert job.model_path is not None, f"{job.kind} without a model"
        with open_model(job.model_path) as model:
            if is_encrypted(model.manifest):
                raise PeerError("the model is encrypted, and this site has no key to open it")
            difference = compare_manifests(self._own_manifest(), model.manifest)
            if difference:
                raise UserError(f"this site's app builds another model: {difference}")
            if job.kind == "train":
                return self._train(job, model.tensors())
            assert job.kind == "evaluate", f"{job.kind} of a plain model"
            return self._evaluate(job, model.tensors())

    def _own_manifest(self) -> Manifest:
        if self._own is None:
            self._own = manifest_of(self.initial(0))
        return self._own

    def _initialise(self, job: Job) -> Result:
        assert job.update_path is not None
        started_s = time.perf_counter()
        tensors = self.initial(job.seed)
        return _written(job.update_path, tensors, Result(training_s=_since(started_s)))

    def _train(self, job: Job, tensors: Sequence[Tensor]) -> Result:
        assert job.update_path is not None
        started_s = time.perf_counter()
        with app_code("training failed"):
            trained = self._trainer.train(
                tensors,
                job.hyperparameters,
                job.seed,
                self._line.progress,
                self._line.cancelled,
            )
        training_s = _since(started_s)
        difference = compare_manifests(manifest_of(trained.tensors), self._own_manifest())
        if difference:
            raise UserError(f"training changed the model's form: {difference}")
        result = Result(
            examples=_count(trained.examples),
            batches=_count(trained.batches),
            metrics=_checked(trained.metrics),
            training_s=training_s,
        )
        return _written(job.update_path, trained.tensors, result)

    def _evaluate(self, job: Job, tensors: Sequence[Tensor]) -> Result:
        started_s = time.perf_counter()
        with app_code("evaluation failed"):
            scored = self._trainer.evaluate(tensors, self._line.progress, self._line.cancelled)
        training_s = _since(started_s)
        if job.keep_folder is not None:
            job.keep_folder.mkdir(parents=True, exist_ok=True)
            with app_code(f"the model could not be saved to {job.keep_folder}"):
                self._trainer.save(tensors, job.keep_folder)
        examples, metrics = _count(scored.examples), _checked(scored.metrics)
        return Result(examples=examples, metrics=metrics, training_s=training_s)


def _since(started_s: float) -> float:
    return time.perf_counter() - started_s


def _written(path: Path, tensors: Sequence[Tensor], result: Result) -> Result:
    """Write an update, on disk for good if it took long to make, and add it to the result."""
    durable = result.training_s >= DURABLE_S
    digest = write_model(path, tensors, sync=durable)
    if durable:
        sync_folder(path.parent)
    return replace(result, digest=digest, durable=durable)


def _count(number: int) -> int:
    """A number of examples or batches of an app's own trainer, as an event may carry it."""
    if not 0 <= number <= COUNT_MAX or number != int(number):
        raise UserError(f"the trainer reports {number} examples or batches; 0 to 2^53 are allowed")
    return int(number)


def _checked(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an app's own trainer, as an event may carry them."""
    if len(metrics) > METRICS_MAX:
        raise UserError(f"the trainer reports {len(metrics)} metrics; at most {METRICS_MAX}")
    for name, value in metrics.items():
        if not 1 <= len(name) <= METRIC_NAME_CHARACTERS_MAX:
            raise UserError(
                f"metric name {name[:METRIC_NAME_CHARACTERS_MAX]!r} has {len(name)} characters; "
                f"at most {METRIC_NAME_CHARACTERS_MAX}"
            )
        if not math.isfinite(value):
            raise UserError(f"the trainer reports {name} = {value}; leave out what has no value")
    return {name: float(value) for name, value in metrics.items()}
