"""The shell around task.py: what the tasks call for is done here.

Rule 1: it has no opinion about rounds. It turns records and finished work into events, and does
what the tasks call for.
Rule 2: tasks, reports and cursors are saved together, in one transaction, before anything that
depends on them leaves the site.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final

import structlog

from metisfl import __version__
from metisfl.broker.client import BrokerClient, Outbox, Record
from metisfl.deploy.database import transaction
from metisfl.deploy.run import StopSignal
from metisfl.learner import task as t
from metisfl.learner.assignment import event_of, job_of, outcome_of, refusal
from metisfl.learner.home import Home, is_intact
from metisfl.learner.state import TaskTable
from metisfl.learner.transfer import BulkClient, DownloadRefused, NotEncrypted, UploadRefused
from metisfl.learner.verification import NotTheFold, verify
from metisfl.learner.worker import (
    Job,
    Progress,
    Result,
    TrainingCancelled,
    TrainingError,
    TrainingKilled,
    Worker,
)
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.bulk import Code
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.events import REASON_CHARACTERS_MAX

__all__ = ["SOFTWARE", "Learner"]

BEAT_S: Final = 1.0
CANCEL_GRACE_S: Final = 5.0
KILLS_FORGIVEN: Final = 2  # of one task's process; an application that crashes always fails after
DONE: Final = {
    pb.INITIALISE: "built the model",
    pb.TRAIN: "trained",
    pb.OPEN: "partial made",
    pb.EVALUATE: "evaluated",
}
ROOM_S: Final = 0.5  # between two offers to a controller whose disk is full; below any lease
SOFTWARE: Final = f"metisfl {__version__}"

_log = structlog.get_logger()


class Learner:
    """Follows the task and run lanes of one federation and does what they ask."""

    def __init__(
        self,
        *,
        name: str,
        federation: str,
        home: Home,
        connection: sqlite3.Connection,
        outbox: Outbox,
        client: BrokerClient,
        bulk: BulkClient,
        worker: Worker,
        public: PublicPart | None = None,
        on_record: Callable[[Record], None] = lambda _: None,
    ) -> None:
        """With `public`, the public part of the site's key, the learner sends nothing in plain.

        `on_record` gets every record of the log before it is applied, after a restart again.
        """
        self._name = name
        self._federation = federation
        self._home = home
        self._connection = connection
        self._outbox = outbox
        self._client = client
        self._bulk = bulk
        self._worker = worker
        self._public = public
        self._on_record = on_record
        self._privacy = "plain" if public is None else public.privacy
        self._table = TaskTable(connection)
        self._tasks = self._saved = self._table.load(name)
        self._verified = b""  # the model whose fold this process has done again
        self._fetched: list[bytes] = []  # what this process has seen to be whole
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
            kind = MachineError if error.fault == "machine" else UserError
            raise kind(f"this site cannot take part: {error}") from error
        joined = pb.LearnerJoined(
            learner=self._name,
            software=SOFTWARE,
            privacy_modes=(self._privacy,),
            examples=self._worker.examples,
        )
        self._publish_membership(joined)
        self._home.tidy(self._tasks)
        for effect in t.resume(self._tasks):
            if isinstance(effect, t.Upload):
                update = self._home.update_path(effect.task.task_id)
                if not await asyncio.to_thread(is_intact, update, effect.digest):
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
            for record in batch.records:
                self._on_record(record)
            events = [event for record in batch.records if (event := event_of(record))]
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

    def _handle(
        self,
        events: Sequence[t.Event],
        lane: str = "",
        through: int = 0,
        *,
        durable: bool = False,
    ) -> None:
        """Apply events, save what must not be lost, then act. `lane` was read up to `through`.

        A report outlives a power cut; that something was made does if it is `durable` itself.
        """
        tasks = self._tasks
        effects: list[t.Effect] = []
        for event in events:
            tasks, caused = t.handle(tasks, event)
            effects += caused
        self._tasks = tasks
        if lane:
            self._cursors[lane] = through
        reports = [effect.message for effect in effects if isinstance(effect, t.Report)]
        if reports or any(isinstance(effect, t.Upload) for effect in effects):
            self.save(reports, durable=bool(reports) or durable)
        self._perform(effects)

    def save(self, reports: Sequence[t.Answer] = (), *, durable: bool = True) -> None:
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
                self._start(effect.task, partial(self._work, effect.task, effect.outcome))
            elif isinstance(effect, t.Upload):
                self._start(effect.task, partial(self._upload, effect.task, effect.digest))
            elif isinstance(effect, t.Stop):
                self._stop(effect.task_id)
            elif isinstance(effect, t.Discard):
                self._home.sweep(self._tasks, writing=bool(self._working))

    def _start(self, task: pb.TaskAssigned, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def act() -> None:
            async with self._turn:
                with structlog.contextvars.bound_contextvars(round=task.round, task=task.task_id):
                    if why := refusal(task, self._privacy):
                        self._fail(task, why)
                    else:
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
        wanted = [one for one in (task.model_digest, task.partials_digest) if one]
        for digest in wanted:
            path = self._home.model_path(digest)
            if digest in self._fetched or (
                path.exists() and await asyncio.to_thread(is_intact, path, digest)
            ):
                continue
            self._home.drop_models(wanted)
            try:
                await self._bulk.download(
                    digest, path, on_progress=partial(self._progress, task, "fetching")
                )
            except DownloadRefused as error:  # as when the round is long over
                self._fail(task, f"the controller has not given the model: {error}")
                return
        self._fetched = wanted
        self._handle([t.Fetched(task.task_id)])

    async def _work(self, task: pb.TaskAssigned, trained: t.Outcome | None) -> None:
        """Do a task; what an earlier attempt `trained` is only sealed."""

        def on_progress(progress: Progress) -> None:
            self._progress(task, "working", progress.fraction, progress.metrics)

        if trained is not None:
            path = self._home.trained_path(task)
            if not await asyncio.to_thread(is_intact, path, trained.trained_digest):
                self._handle([t.Lost(task.task_id)])
                return
        if trained is None and not await self._is_the_fold(task):
            return
        self._working = task.task_id
        try:
            mark = self._tasks.marks.get(task.run_id)
            result = await self._run(job_of(task, self._home, trained, mark), on_progress)
        except TrainingCancelled as error:
            _log.info("stopped", why=str(error))
            return
        except TrainingError as error:
            self._fail(task, str(error))
            return
        finally:
            self._working = ""
            if task.task_id not in self._tasks.jobs:
                self._home.sweep(self._tasks, writing=False)
        what = DONE[task.kind] if trained is None else "sealed again"
        _log.info(what, examples=result.examples, seconds=round(result.training_s, 3))
        outcome = outcome_of(result, trained)
        if result.exceeded:
            _log.info("update does not fit", tensor=result.exceeded, attempt=task.attempt)
            self._handle([t.Exceeded(task.task_id, outcome, result.exceeded)])
        else:
            self._handle([t.Done(task.task_id, outcome)], durable=result.durable)

    async def _run(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        """Do a job; once more if its process was killed, since it is the same job then."""
        for _ in range(KILLS_FORGIVEN):
            try:
                return await self._worker.run(job, on_progress)
            except TrainingKilled as error:
                _log.warning("doing it again", why=str(error))
        return await self._worker.run(job, on_progress)

    async def _is_the_fold(self, task: pb.TaskAssigned) -> bool:
        """Whether the task's model is the fold of its updates, if this federation verifies.

        It is asked before a model is opened for the first time, to train on or to evaluate.
        """
        if self._public is None or self._public.verify != "full":
            return True
        if task.model_digest in (b"", self._verified) or task.partials_digest:
            return True  # what all sites have given their partials of was verified before
        try:
            await verify(
                self._home.model_path(task.model_digest),
                task.model_digest,
                self._bulk,
                self._public,
                self._home.verification,
                lambda fraction: self._progress(task, "working", fraction),
            )
        except (NotTheFold, DownloadRefused) as error:
            self._fail(task, f"the model cannot be verified: {error}")
            return False
        self._verified = task.model_digest
        _log.info("verified")
        return True

    async def _upload(self, task: pb.TaskAssigned, digest: bytes) -> None:
        told = False
        while True:
            try:
                await self._bulk.upload(
                    task.task_id,
                    self._home.update_path(task.task_id),
                    run_id=task.run_id,
                    digest=digest,
                    on_progress=partial(self._progress, task, "uploading"),
                )
            except UploadRefused as error:
                if error.code != Code.NO_SPACE:
                    self._fail(task, f"the controller refused the update: {error}")
                    return
                if not told:
                    _log.warning("the controller has no room yet, offering again", why=str(error))
                told = True
                self._progress(task, "waiting", 0.0)  # for room there: this site is not silent
                await asyncio.sleep(ROOM_S)
            except NotEncrypted as error:
                self._fail(task, str(error))
                return
            else:
                self._handle([t.Uploaded(task.task_id)])
                return

    def _fail(self, task: pb.TaskAssigned, reason: str) -> None:
        _log.error("task failed", why=reason)
        self._handle([t.Failed(task.task_id, reason)])

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
