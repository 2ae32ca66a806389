"""The shell around task.py: what the tasks call for is done here.

Rule 1: it has no opinion about rounds. It turns records and finished work into events, and does
what the tasks call for.
Rule 2: tasks, reports and cursors are saved together, in one transaction, before anything that
depends on them leaves the site.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from metisfl import __version__
from metisfl.broker.client import BrokerClient, Outbox, Record
from metisfl.deploy.database import transaction
from metisfl.deploy.run import StopSignal
from metisfl.learner import task as t
from metisfl.learner.state import TaskTable
from metisfl.learner.trainer import Hyperparameters
from metisfl.learner.transfer import BulkClient, DownloadRefused, UploadRefused
from metisfl.learner.worker import Job, Progress, Result, TrainingCancelled, TrainingError, Worker
from metisfl.learner.worker_messages import DURABLE_S
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.events import REASON_CHARACTERS_MAX, decode, may_send
from metisfl.proto.model_file import open_model

__all__ = ["SOFTWARE", "Learner"]

BEAT_S: Final = 1.0
CANCEL_GRACE_S: Final = 5.0
PRIVACY_MODES: Final = ("plain",)
SOFTWARE: Final = f"metisfl {__version__}"

_log = structlog.get_logger()


class Learner:
    """Follows the task and run lanes of one federation and does what they ask."""

    def __init__(
        self,
        *,
        name: str,
        federation: str,
        home: Path,
        connection: sqlite3.Connection,
        outbox: Outbox,
        client: BrokerClient,
        bulk: BulkClient,
        worker: Worker,
    ) -> None:
        self._name = name
        self._federation = federation
        self._home = home
        self._connection = connection
        self._outbox = outbox
        self._client = client
        self._bulk = bulk
        self._worker = worker
        self._table = TaskTable(connection)
        self._tasks = self._saved = self._table.load(name)
        self._fetched = b""  # the model that this process has seen to be whole
        self._cursors: dict[str, int] = {}  # how far lanes were read since the last save
        self._activities: dict[str, asyncio.Task[None]] = {}  # by task id
        self._endings: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # a stopped task may still be letting go
        self._working = ""  # the task that the worker has
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def begin(self) -> None:
        """Load the application, join, and take up what a former process left."""
        try:
            await self._worker.start()
        except TrainingError as error:
            reason = str(error)[:REASON_CHARACTERS_MAX]
            self._publish_membership(pb.LearnerLeft(learner=self._name, reason=reason))
            await self._client.drained(timeout_s=CANCEL_GRACE_S)
            raise UserError(f"the application cannot be loaded: {error}") from error
        joined = pb.LearnerJoined(
            learner=self._name, software=SOFTWARE, privacy_modes=PRIVACY_MODES
        )
        self._publish_membership(joined)
        self._sweep()
        for effect in t.resume(self._tasks):
            if isinstance(effect, t.Upload):
                update = self._update_path(effect.task.task_id)
                if not await asyncio.to_thread(_is_intact, update, effect.digest):
                    self._handle([t.Lost(effect.task.task_id)])
                    continue
            self._perform([effect])

    async def end(self) -> None:
        """Let go of what is being done, without a word: the next process takes it up again."""
        for activity in self._activities.values():
            activity.cancel()
        await asyncio.gather(*self._activities.values(), return_exceptions=True)

    async def follow(self, lane: str) -> None:
        """Apply the records of one lane, batch by batch."""
        async for batch in self._client.records(lane):
            events = [event for record in batch.records if (event := _event_of(record))]
            self._handle(events, lane, batch.through)

    async def beat(self, stop: StopSignal) -> None:
        """Say once a second that this learner lives and what it does."""
        topic = topics.beat_topic(self._federation, self._name)
        while not stop.requested:
            active = [job.stage.value for job in self._tasks.jobs.values() if job.active]
            state = active[0] if active else "idle"
            self._client.beat(topic, pb.Heartbeat(learner=self._name, state=state))
            self.save()
            try:
                await asyncio.wait_for(stop.wait(), BEAT_S)
            except asyncio.TimeoutError:
                continue

    def _publish_membership(self, message: pb.LearnerJoined | pb.LearnerLeft) -> None:
        topic = topics.member_topic(self._federation, self._name)
        with transaction(self._connection):
            self._outbox.append(topic, message)
        self._client.flush()

    def _handle(self, events: Sequence[t.Event], lane: str = "", through: int = 0) -> None:
        """Apply events, save what must not be lost, then act. `lane` was read up to `through`."""
        tasks = self._tasks
        effects: list[t.Effect] = []
        for event in events:
            tasks, caused = t.handle(tasks, event)
            effects += caused
        self._tasks = tasks
        if lane:
            self._cursors[lane] = through
        reports = [effect.message for effect in effects if isinstance(effect, t.Report)]
        made = [effect.task.task_id for effect in effects if isinstance(effect, t.Upload)]
        if reports or made:
            outcomes = (tasks.jobs[task_id].outcome for task_id in made)
            long_work = any(one is not None and one.training_s >= DURABLE_S for one in outcomes)
            self.save(reports, durable=bool(reports) or long_work)
        self._perform(effects)

    def save(
        self, reports: Sequence[pb.TaskCompleted | pb.TaskFailed] = (), *, durable: bool = True
    ) -> None:
        """Commit the tasks, the reports and the cursors that belong together.

        What is not saved yet can be had again: a task that was only accepted is in the broker's log
        behind the saved cursor. What is not `durable` survives the end of this process, but not a
        power cut.
        """
        if not reports and self._tasks is self._saved and not self._cursors:
            return
        topic = topics.done_topic(self._federation, self._name)
        self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        with transaction(self._connection):
            self._table.save(self._saved, self._tasks)
            for report in reports:
                self._outbox.append(topic, report, correlation_id=report.task_id)
            for lane, through in self._cursors.items():
                self._outbox.advance(lane, through)
        self._saved = self._tasks
        self._cursors.clear()
        if reports:
            self._client.flush()

    def _perform(self, effects: Sequence[t.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, t.Fetch):
                self._start(effect.task, partial(self._fetch, effect.task))
            elif isinstance(effect, t.Work):
                self._start(effect.task, partial(self._work, effect.task))
            elif isinstance(effect, t.Upload):
                self._start(effect.task, partial(self._upload, effect.task, effect.digest))
            elif isinstance(effect, t.Stop):
                self._stop(effect.task_id)
            elif isinstance(effect, t.Discard):
                self._update_path(effect.task_id).unlink(missing_ok=True)

    def _start(self, task: pb.TaskAssigned, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def act() -> None:
            async with self._turn:
                with structlog.contextvars.bound_contextvars(round=task.round, task=task.task_id):
                    await work()

        def ended(activity: asyncio.Task[None]) -> None:
            if self._activities.get(task.task_id) is activity:
                del self._activities[task.task_id]
            self._notice(activity)

        self._activities[task.task_id] = activity = asyncio.create_task(act())
        activity.add_done_callback(ended)

    def _notice(self, activity: asyncio.Task[None]) -> None:
        self._endings.discard(activity)
        error = None if activity.cancelled() else activity.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    def _stop(self, task_id: str) -> None:
        if self._working == task_id:
            ending = asyncio.create_task(self._worker.cancel(CANCEL_GRACE_S))
            self._endings.add(ending)
            ending.add_done_callback(self._notice)
        elif task_id in self._activities:
            self._activities[task_id].cancel()

    async def _fetch(self, task: pb.TaskAssigned) -> None:
        digest, path = task.model_digest, self._model_path(task.model_digest)
        here = digest == self._fetched or (
            path.exists() and await asyncio.to_thread(_is_intact, path, digest)
        )
        if not here:
            for old in path.parent.glob("*.model"):
                old.unlink()
            try:
                await self._bulk.download(
                    digest, path, on_progress=partial(self._progress, task, "fetching")
                )
            except DownloadRefused as error:  # as when the round is long over
                _log.error("no model", why=str(error))
                reason = f"the controller has not given the model: {error}"
                self._handle([t.Failed(task.task_id, reason)])
                return
        self._fetched = digest
        self._handle([t.Fetched(task.task_id)])

    async def _work(self, task: pb.TaskAssigned) -> None:
        def on_progress(progress: Progress) -> None:
            self._progress(task, "working", progress.fraction, progress.metrics)

        self._working = task.task_id
        try:
            result = await self._worker.run(self._job(task), on_progress)
        except TrainingCancelled as error:
            _log.info("stopped", why=str(error))
            return
        except TrainingError as error:
            _log.error("task failed", why=str(error))
            self._handle([t.Failed(task.task_id, str(error))])
            return
        finally:
            self._working = ""
            if task.task_id not in self._tasks.jobs:
                self._sweep()
        done = {pb.INITIALISE: "built the model", pb.TRAIN: "trained", pb.EVALUATE: "evaluated"}
        _log.info(done[task.kind], examples=result.examples, seconds=round(result.training_s, 3))
        self._handle([t.Done(task.task_id, _outcome(result))])

    async def _upload(self, task: pb.TaskAssigned, digest: bytes) -> None:
        try:
            await self._bulk.upload(
                task.task_id,
                self._update_path(task.task_id),
                run_id=task.run_id,
                digest=digest,
                on_progress=partial(self._progress, task, "uploading"),
            )
        except UploadRefused as error:
            _log.error("update refused", why=str(error))
            self._handle([t.Failed(task.task_id, f"the controller refused the update: {error}")])
            return
        self._handle([t.Uploaded(task.task_id)])

    def _job(self, task: pb.TaskAssigned) -> Job:
        given = task.hyperparameters
        kinds = {pb.INITIALISE: "initialise", pb.TRAIN: "train", pb.EVALUATE: "evaluate"}
        keep = self._home / "final" / task.run_id if task.keep_model else None
        if keep is not None:
            shutil.rmtree(keep, ignore_errors=True)
            keep.mkdir(parents=True)
        return Job(
            kind=kinds[task.kind],  # type: ignore[arg-type]
            seed=task.seed,
            model_path=self._model_path(task.model_digest) if task.model_digest else None,
            update_path=self._update_path(task.task_id),
            hyperparameters=Hyperparameters(given.epochs, given.batch_size, given.learning_rate),
            keep_folder=keep,
        )

    def _progress(
        self,
        task: pb.TaskAssigned,
        state: str,
        fraction: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        self._client.beat(
            topics.beat_topic(self._federation, self._name),
            pb.Progress(
                task_id=task.task_id,
                learner=self._name,
                state=state,
                fraction=fraction,
                metrics=metrics,
            ),
        )

    def _sweep(self) -> None:
        """Delete the updates of tasks that are over; work that was stopped may still write one."""
        for path in (self._home / "outbox").iterdir():
            if path.name.rpartition(".update")[0] not in self._tasks.jobs:
                path.unlink()

    def _model_path(self, digest: bytes) -> Path:
        return self._home / "models" / f"{digest.hex()}.model"

    def _update_path(self, task_id: str) -> Path:
        return self._home / "outbox" / f"{task_id}.update"


def _event_of(record: Record) -> t.Event | None:
    """Translate a record into an event of ours; what is not for a learner is None."""
    try:
        message = decode(record.type, record.payload)
    except PeerError as error:
        _log.warning("event refused", publisher=record.publisher, why=str(error))
        return None
    if not may_send(record.publisher, message):
        _log.warning("event refused", publisher=record.publisher, why=f"it sends {record.type}")
        return None
    if isinstance(message, pb.TaskAssigned):
        return t.Assigned(message)
    if isinstance(message, pb.TaskCancelled):
        return t.Cancelled(message.task_id)
    if isinstance(message, pb.RoundClosed):
        return t.RoundOver(message.run_id, message.round)
    if isinstance(message, pb.RunFinished):
        return t.RunOver(message.run_id)
    return None


def _is_intact(path: Path, digest: bytes) -> bool:
    """Whether `path` is a model file with this content, which a power cut may have spoilt."""
    try:
        with open_model(path) as model:
            return model.digest() == digest
    except (FileNotFoundError, MachineError):
        return False


def _outcome(result: Result) -> t.Outcome:
    return t.Outcome(
        result.digest, result.examples, result.batches, dict(result.metrics), result.training_s
    )
