"""The shell around conductor.py: the log in, events, folds and leases out.

Rule 1: state comes from the log alone. At the start the last snapshot is taken, and the log behind
it is read to its end; only then does the controller act, in the round in which it was.
Rule 2: what the state calls for is committed to the outbox before it is sent.
Rule 3: a snapshot is committed with the place in the log that it stands for, and after the files
that belong to it (round records) are on disk.
Rule 4: leases run only while learners can be heard.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
from google.protobuf.message import Message

from metisfl.broker.client import BrokerClient, Outbox, Record
from metisfl.controller.bulk import BulkEndpoint, Expected
from metisfl.controller.conductor import Conductor
from metisfl.controller.effects import Fold, Publish
from metisfl.controller.encrypted_fold import UnusableUpdate, partial_form_of, terms_of
from metisfl.controller.folding import fold_round
from metisfl.controller.lease import Leases
from metisfl.controller.record import record_of
from metisfl.controller.repeats import Repeats
from metisfl.controller.room import NoRoom
from metisfl.controller.round_files import write_record
from metisfl.controller.scheduling import waits
from metisfl.controller.snapshot_table import SnapshotTable
from metisfl.controller.spool import Spool
from metisfl.controller.state import Logged, Phase, Run, Status
from metisfl.controller.status import status_of
from metisfl.controller.store import ModelStore
from metisfl.deploy.audit import Audit
from metisfl.deploy.database import transaction
from metisfl.deploy.run import StopSignal
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.chunk import federation_digest
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.events import decode

__all__ = ["Controller"]

SNAPSHOT_EVENTS: Final = 512
SNAPSHOT_S: Final = 30.0  # a quiet federation keeps no more of the log than a busy one
STATUS_S: Final = 1.0
STOPPED_S: Final = 3 * STATUS_S  # a process that was not running for so long has heard nobody
ROOM_S: Final = 2.0  # between two looks for room on a full disk
RETURN_S: Final = 6.0  # what learners may take to find that the broker is back

_log = structlog.get_logger()


class Controller:
    """Follows the lane of one federation and does what its state calls for."""

    def __init__(
        self,
        *,
        federation: str,
        home: Path,
        connection: sqlite3.Connection,
        outbox: Outbox,
        client: BrokerClient,
        bulk: BulkEndpoint,
        store: ModelStore,
        spool: Spool,
        public: PublicPart | None,
        audit: Audit,
    ) -> None:
        """Take the last snapshot. Raises MachineError if it cannot be read."""
        self._federation = federation
        self._lane = topics.federation_lane(federation)
        self._home = home
        self._connection = connection
        self._outbox = outbox
        self._client = client
        self._bulk = bulk
        self._store = store
        self._spool = spool
        self._public = public
        self._audit = audit
        self._snapshots = SnapshotTable(connection)
        run = self._snapshots.load(self._lane, terms_of(public))
        self._conductor = Conductor(run or Run(federation, terms_of(public)))
        self._through = outbox.cursor(self._lane)
        self._since_snapshot, self._snapshot_at = 0, time.monotonic()
        self._repeats = Repeats()
        self._leases = Leases()
        self._lease_timer: asyncio.TimerHandle | None = None
        self._live = False
        self._works: set[asyncio.Task[None]] = set()
        self._stored: list[Publish] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def run(self) -> Run:
        """The state that the log has given so far."""
        return self._conductor.run

    async def follow(self) -> None:
        """Read the lane from the snapshot on, then keep up with it for ever."""
        # What a former process decided must be in the log before this one decides anything.
        await self._client.drained(timeout_s=math.inf)
        async for batch in self._client.records(self._lane):
            if batch.trimmed_to:
                raise MachineError(
                    f"the broker's log begins behind {batch.trimmed_to}, and this controller has "
                    f"read it up to {self._outbox.cursor(self._lane)} only: restore the newest "
                    "copy of its home, or start with empty folders on both sides"
                )
            for record in batch.records:
                self._apply(record)
            if batch.caught_up:
                self._act()
            self._through = batch.through
            self._since_snapshot += len(batch.records)
            over = bool(batch.records) and self.run.phase is Phase.FINISHED
            if over or self._since_snapshot >= SNAPSHOT_EVENTS:
                self._snapshot()

    async def listen(self) -> None:
        """Renew the lease of every learner that gets on with its task."""
        async for beat in self._client.beats(f"{self._federation}/beat/"):
            try:
                message = decode(beat.type, beat.payload)
            except PeerError as error:
                if count := self._repeats.line(beat.topic, "beat refused"):
                    _log.warning("beat refused", topic=beat.topic, count=count, why=str(error))
                continue
            if not isinstance(message, pb.Progress):
                continue
            if beat.topic == topics.beat_topic(self._federation, message.learner):
                now = time.monotonic()
                self._leases = self._leases.renew(message.learner, message.task_id, now)

    async def tell(self, stop: StopSignal) -> None:
        """Say once a second how the run stands, and hold the leases while nobody can be heard."""
        topic = topics.beat_topic(self._federation, topics.ALL)
        deaf_at, told_at = -math.inf, time.monotonic()
        while not stop.requested:
            now = time.monotonic()
            if not self._client.connected or now - told_at > STOPPED_S:
                deaf_at = now
            if now - deaf_at < RETURN_S:
                self._leases = self._leases.afresh(now)
                self._set_lease_timer()
            told_at = now
            if self._live:
                status = status_of(self._conductor.run, self._leases, now, time.time_ns())
                self._client.beat(topic, status)
            if self._since_snapshot and now - self._snapshot_at > SNAPSHOT_S:
                self._snapshot()
            try:
                await asyncio.wait_for(stop.wait(), STATUS_S)
            except asyncio.TimeoutError:
                continue

    def on_stored(self, task_id: str, digest: bytes, update_bytes: int) -> None:
        """The bulk endpoint has an update, checked and durable; told again after a restart."""
        stored = self._conductor.stored(task_id, digest, update_bytes)
        if stored and not self._stored:  # those that come together are one transaction
            self._begin(self._publish_stored())
        self._stored += stored

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it beside everything else; its error ends the daemon."""
        task = asyncio.create_task(work)
        self._works.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._works.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _publish_stored(self) -> None:
        stored, self._stored = self._stored, []
        if not self.failed.done():  # else the daemon is ending; the next one tells it again
            self._publish(stored)

    def _apply(self, record: Record) -> None:
        try:
            message = decode(record.type, record.payload)
        except PeerError as error:
            who, why = record.publisher, str(error)
            if count := self._repeats.line(who, "event refused"):
                _log.warning("event refused", publisher=who, count=count, why=why)
            return
        before = self._conductor.run
        dropped = self._conductor.take(Logged(message, record.publisher, record.logged_unix_ns))
        who = record.publisher
        if dropped and self._live and (count := self._repeats.line(who, record.type)):
            _log.info("event dropped", type=record.type, publisher=who, count=count, why=dropped)
        self._note(before, self._conductor.run)
        self._record(record, message, dropped, was_open=before.finished is None)

    def _note(self, before: Run, after: Run) -> None:
        """Keep the record of a round that is now over, and tell people what happened."""
        if after.record != before.record and (record := record_of(after)) is not None:
            write_record(self._home / "rounds", record)
        closed, finished = after.closed, after.finished
        if closed is not None and before.closed is not closed and self._live:
            _log.info(
                "round closed",
                round=closed.round,
                counted=[one.learner for one in closed.counted],
                missing={one.learner: one.reason for one in closed.missing},
            )
        if after.stopped and not before.stopped and self._live:
            _log.info("run stopped", run=after.plan.run_id if after.plan else "", why=after.stopped)
        if finished is not None and before.finished is None and self._live:
            outcome = pb.RunFinished.Outcome.Name(finished.outcome)
            _log.info(
                "run finished",
                outcome=outcome,
                reason=finished.reason,
                record=finished.record.hex(),
            )

    def _record(self, record: Record, message: Message, dropped: str, *, was_open: bool) -> None:
        """Keep for good who asks for a run or stops it, and its end: once, whatever is read again.

        A run that was refused may be asked for as often as somebody likes.
        """
        write = self._audit.record if self._live else self._audit.record_once
        finished = self._conductor.run.finished
        if isinstance(message, pb.RunStarted) and not dropped:
            write("run asked for", by=record.publisher, run=message.run_id, event=record.sequence)
        elif isinstance(message, pb.RunStarted) and self._live:
            self._audit.refused("run refused", record.publisher, run=message.run_id, why=dropped)
        elif isinstance(message, pb.RunStopped) and not dropped:
            write(
                "run stopped",
                by=record.publisher,
                run=message.run_id,
                reason=message.reason,
                event=record.sequence,
            )
        elif isinstance(message, pb.RunStopped) and self._live:
            self._audit.refused("stop refused", record.publisher, run=message.run_id, why=dropped)
        elif finished is not None and was_open:
            write(
                "run finished",
                run=finished.run_id,
                outcome=pb.RunFinished.Outcome.Name(finished.outcome),
                record=finished.record.hex(),
                event=record.sequence,
            )

    def _snapshot(self) -> None:
        """Keep the state with its place in the log, so that a restart goes on from there."""
        with transaction(self._connection):
            self._snapshots.save(self._lane, self._conductor.run)
            self._outbox.advance(self._lane, self._through)
        self._since_snapshot, self._snapshot_at = 0, time.monotonic()

    def _act(self) -> None:
        """Do what the state calls for and is not under way yet."""
        self._live = True
        self._expect()
        self._offer()
        due = self._conductor.due()
        self._publish([effect for effect in due if isinstance(effect, Publish)])
        for effect in due:
            if isinstance(effect, Fold):
                self._begin(self._fold(effect))
        self._leases = self._leases.watch(waits(self._conductor.run), time.monotonic())
        self._set_lease_timer()

    def _publish(self, effects: Sequence[Publish]) -> None:
        if not effects:
            return
        with transaction(self._connection):
            for effect in effects:
                self._outbox.append(
                    effect.topic, effect.message, correlation_id=effect.correlation_id
                )
        self._client.flush()

    def _expect(self) -> None:
        """Tell the bulk endpoint whose updates are welcome now."""
        run = self._conductor.run
        plan = run.plan
        if plan is None or run.phase not in (Phase.TRAINING, Phase.OPENING):
            self._bulk.expect({})
            return
        run_digest = federation_digest(self._federation, plan.run_id)
        form = None
        if self._public and run.phase is Phase.OPENING:
            form = partial_form_of(self._public, self._store, run.model_digest)
        elif self._public:
            form = self._public.update_form(run.exponents)
        self._bulk.expect(
            {
                task.task_id: Expected(
                    learner=f"learner:{task.learner}",
                    model_digest=run.model_digest or None,
                    federation=run_digest,
                    stored_digest=task.stored_digest,
                    encryption=form,
                    learners=len(plan.learners),
                )
                for task in run.tasks.values()
                if task.status in (Status.INVITED, Status.ASSIGNED, Status.COMPLETED)
            }
        )

    def _offer(self) -> None:
        """Let sites that check the fold themselves fetch what is in the newest model."""
        closed = self._conductor.run.closed
        if self._public and self._public.verify == "full" and closed is not None:
            self._bulk.offer(
                {one.update_digest: self._spool.update_path(one.task_id) for one in closed.counted}
            )

    async def _fold(self, effect: Fold) -> None:
        try:
            digest = await asyncio.to_thread(
                fold_round, effect, self._store, self._spool, self._public
            )
        except UnusableUpdate as error:
            one = effect.contributions[error.position]
            _log.error("update unusable", task=one.task_id, learner=one.learner, why=str(error))
            self._publish([self._conductor.unusable(effect, error.position, str(error))])
            return
        except NoRoom as error:
            if self.run.phase is Phase.STOPPING:
                self._conductor.given_up(effect)
                self._act()
                return
            _log.error("the round cannot be folded yet, trying again", why=str(error))
            await asyncio.sleep(ROOM_S)
            self._begin(self._fold(effect))
            return
        # While the round is open, nothing of the next one can be among what is deleted.
        run = self._conductor.run
        await asyncio.to_thread(self._forget, [*run.tasks], [*run.recent_models, digest])
        self._publish([self._conductor.folded(effect, digest)])

    def _forget(self, task_ids: list[str], models: list[bytes]) -> None:
        """Delete the updates of closed rounds and models that nobody can ask for any more."""
        self._spool.keep(task_ids)
        self._store.keep(models)

    def _set_lease_timer(self) -> None:
        if self._lease_timer is not None:
            self._lease_timer.cancel()
        end = self._leases.next_end()
        if end is not None:
            delay_s = max(end - time.monotonic(), 0.0) + 0.001
            self._lease_timer = asyncio.get_running_loop().call_later(
                delay_s, lambda: self._begin(self._end_leases())
            )

    async def _end_leases(self) -> None:
        if self.failed.done():
            return  # the daemon is ending
        self._leases, ended = self._leases.end(time.monotonic())
        for one in ended:
            learner, task_id = one.wait.learner, one.wait.task_id
            _log.warning("lease ended", learner=learner, task=task_id, silent_s=one.silent_s)
        self._publish(self._conductor.lapsed(ended))
        self._set_lease_timer()
