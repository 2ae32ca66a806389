"""The process that trains: loads the application once, then does one job after the other.

Rule 1: it lives no longer than its parent. A thread waits for the parent's end of the socket to
close, and the kernel is asked for the same, for when app code keeps that thread from running.
Rule 2: what the app, the model or the disk does wrong is a Failure to the parent; a defect of ours
ends this process with its traceback on stderr, and the parent starts another.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from metisfl.deploy.run import exit_with_parent
from metisfl.learner.app import app_code, load_app, trainer_for
from metisfl.learner.trainer import TaskCancelled, Trainer
from metisfl.learner.worker_messages import (
    DURABLE_S,
    LENGTH,
    Cancel,
    Failure,
    Fault,
    Job,
    Progress,
    Ready,
    Result,
    Run,
    Start,
    pack,
)
from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.events import (
    COUNT_MAX,
    METRIC_NAME_CHARACTERS_MAX,
    METRICS_MAX,
    REASON_CHARACTERS_MAX,
)
from metisfl.proto.model_file import open_model, sync_folder, write_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import Tensor, compare_manifests, manifest_of

__all__ = ["main"]

PROGRESS_INTERVAL_S: Final = 0.1


class _Channel:
    """The child's end of the socket. A thread reads it; only the main thread writes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = connection.makefile("rb")
        self._runs: queue.SimpleQueue[Run] = queue.SimpleQueue()
        self._cancelled = 0

    def first(self) -> Start:
        """The frame that says what to load; before `watch`."""
        start = self._read()
        assert isinstance(start, Start)
        return start

    def watch(self) -> None:
        """Read from now on in a thread of its own; end the process with the parent."""
        threading.Thread(target=self._watch, name="parent-watch", daemon=True).start()

    def next_run(self) -> Run:
        return self._runs.get()

    def is_cancelled(self, number: int) -> bool:
        return number == self._cancelled

    def send(self, message: object) -> None:
        try:
            self._connection.sendall(pack(message))
        except OSError:  # the parent is gone
            os._exit(0)

    def _read(self) -> object:
        return pickle.loads(self._exactly(*LENGTH.unpack(self._exactly(LENGTH.size))))

    def _exactly(self, count: int) -> bytes:
        data = b""
        with contextlib.suppress(ConnectionError):  # it was killed before it had read all of ours
            data = self._frames.read(count)
        if len(data) < count:  # the parent is gone
            os._exit(0)
        return data

    def _watch(self) -> None:
        while True:
            message = self._read()
            if isinstance(message, Run):
                self._runs.put(message)
            elif isinstance(message, Cancel):
                self._cancelled = message.number


class _Jobs:
    """Does jobs with one trainer."""

    def __init__(self, trainer: Trainer, channel: _Channel) -> None:
        self._trainer = trainer
        self._channel = channel
        self._own: Manifest | None = None
        self._number = 0
        self._progress_sent_s = -math.inf

    def do(self, run: Run) -> Result:
        """Do one job. Raises MetisError and OSError."""
        self._number = run.number
        self._progress_sent_s = -math.inf
        if run.job.kind == "initialise":
            return self._initialise(run.job)
        assert run.job.model_path is not None, f"{run.job.kind} without a model"
        with open_model(run.job.model_path) as model:
            difference = compare_manifests(self._own_manifest(), model.manifest)
            if difference:
                raise UserError(f"this site's app builds another model: {difference}")
            if run.job.kind == "train":
                return self._train(run.job, model.tensors())
            return self._evaluate(run.job, model.tensors())

    def _own_manifest(self) -> Manifest:
        if self._own is None:
            with app_code("the initial model could not be built"):
                self._own = manifest_of(self._trainer.initialise(0))
        return self._own

    def _initialise(self, job: Job) -> Result:
        assert job.update_path is not None
        started_s = time.perf_counter()
        with app_code("the initial model could not be built"):
            tensors = self._trainer.initialise(job.seed)
        training_s = time.perf_counter() - started_s
        return Result(_write(job.update_path, tensors, training_s), training_s=training_s)

    def _train(self, job: Job, tensors: Sequence[Tensor]) -> Result:
        assert job.update_path is not None
        number = self._number
        started_s = time.perf_counter()
        with app_code("training failed"):
            trained = self._trainer.train(
                tensors,
                job.hyperparameters,
                job.seed,
                self._on_progress,
                lambda: self._channel.is_cancelled(number),
            )
        training_s = time.perf_counter() - started_s
        difference = compare_manifests(manifest_of(trained.tensors), self._own_manifest())
        if difference:
            raise UserError(f"training changed the model's form: {difference}")
        metrics = _checked(trained.metrics)
        examples, batches = _count(trained.examples), _count(trained.batches)
        digest = _write(job.update_path, trained.tensors, training_s)
        return Result(digest, examples, batches, metrics, training_s)

    def _evaluate(self, job: Job, tensors: Sequence[Tensor]) -> Result:
        started_s = time.perf_counter()
        with app_code("evaluation failed"):
            scored = self._trainer.evaluate(tensors)
        training_s = time.perf_counter() - started_s
        if job.keep_folder is not None:
            job.keep_folder.mkdir(parents=True, exist_ok=True)
            with app_code(f"the model could not be saved to {job.keep_folder}"):
                self._trainer.save(tensors, job.keep_folder)
        return Result(b"", _count(scored.examples), 0, _checked(scored.metrics), training_s)

    def _on_progress(self, fraction: float, metrics: Mapping[str, float]) -> None:
        now_s = time.monotonic()
        if now_s - self._progress_sent_s >= PROGRESS_INTERVAL_S:
            self._progress_sent_s = now_s
            fit = (
                (k, v)
                for k, v in metrics.items()
                if 0 < len(k) <= METRIC_NAME_CHARACTERS_MAX and math.isfinite(v)
            )
            some = dict(itertools.islice(fit, METRICS_MAX))
            self._channel.send(Progress(min(1.0, max(0.0, fraction)), some))


def _write(path: Path, tensors: Sequence[Tensor], work_s: float) -> bytes:
    """Write an update and return its digest; on disk for good if it took long to make."""
    durable = work_s >= DURABLE_S
    digest = write_model(path, tensors, sync=durable)
    if durable:
        sync_folder(path.parent)
    return digest


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


@contextlib.contextmanager
def _failures(channel: _Channel) -> Iterator[None]:
    """Send what goes wrong inside as a Failure, with the traceback on stderr if the app did it."""

    def fail(reason: str, fault: Fault) -> None:
        text = reason.encode(errors="replace").decode()  # a file's name may be no text
        channel.send(Failure(text[:REASON_CHARACTERS_MAX], fault))

    try:
        yield
    except TaskCancelled as error:
        fail(str(error), "cancelled")
    except PeerError as error:
        fail(str(error), "peer")
    except MachineError as error:
        fail(str(error), "machine")
    except UserError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        fail(str(error), "user")
    except OSError as error:
        fail(f"{error.filename or 'the update file'}: {error.strerror}", "machine")


def main(descriptor: int) -> None:
    """Serve the parent at the other end of the socket `descriptor` until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer
    os.dup2(2, 1)  # what an app prints is no answer of the daemon's
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    channel = _Channel(socket.socket(fileno=descriptor))
    start = channel.first()
    exit_with_parent(start.parent, signal.SIGKILL)
    channel.watch()
    jobs = None
    with _failures(channel):
        jobs = _Jobs(trainer_for(load_app(start.app, start.path), start.source), channel)
        channel.send(Ready())
    while jobs is not None:
        run = channel.next_run()
        with _failures(channel):
            channel.send(jobs.do(run))
