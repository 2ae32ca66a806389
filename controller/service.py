"""The controller daemon: the shell around round.py, scheduling.py and lease.py.

Rule 1: state comes from the log alone. At the start the whole lane of the federation is replayed;
only then does the controller act, and it goes on in the round in which it was.
Rule 2: what the state calls for is committed to the outbox before it is sent, and an effect that is
under way is not begun again until the log has answered it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from metisfl import __version__
from metisfl.broker.client import BrokerClient, ClientKeys, Outbox, Record
from metisfl.controller.bulk import BulkEndpoint, Expected
from metisfl.controller.encrypted_fold import UnusableUpdate, context_of, terms_of
from metisfl.controller.folding import fold_round
from metisfl.controller.lease import Leases
from metisfl.controller.record import record_of
from metisfl.controller.round import apply
from metisfl.controller.scheduling import (
    Contribution,
    Fold,
    Publish,
    decide,
    key_of,
    round_closed,
    waits,
)
from metisfl.controller.spool import Spool
from metisfl.controller.state import Logged, Phase, Run, Status
from metisfl.controller.store import ModelStore
from metisfl.deploy import logs, run
from metisfl.deploy.allocator import return_freed_memory
from metisfl.deploy.ckks_keys import load_public, refuse_secret_parts
from metisfl.deploy.database import open_database, sole_process, transaction
from metisfl.deploy.keys import load_identity, load_peers, load_servers
from metisfl.deploy.options import BULK, INGRESS, LIVE, add_option, daemon_parser, name_of
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.chunk import federation_digest
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events import decode
from metisfl.proto.records import pack_record

__all__ = ["main"]

MODELS_KEPT: Final = 3  # the current one, and those that a slow learner may still be fetching
SOFTWARE: Final = f"metisfl {__version__}"

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
    ) -> None:
        self._federation = federation
        self._home = home
        self._connection = connection
        self._outbox = outbox
        self._client = client
        self._bulk = bulk
        self._store = store
        self._spool = spool
        self._public = public
        self._run = Run(federation, terms_of(public))
        self._under_way: set[str] = set()
        self._folding = ""
        self._leases = Leases()
        self._lease_timer: asyncio.TimerHandle | None = None
        self._recorded: tuple[str, int] | None = None
        self._live = False
        self._works: set[asyncio.Task[None]] = set()
        self._recent_models: deque[bytes] = deque(maxlen=MODELS_KEPT)
        self._stored: list[Publish] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def follow(self) -> None:
        """Replay the lane, then keep up with it for ever."""
        # What a former process decided must be in the log before this one decides anything.
        await self._client.drained(timeout_s=math.inf)
        # The lane's cursor never moves: every start replays it whole.
        async for batch in self._client.records(topics.federation_lane(self._federation)):
            for record in batch.records:
                self._apply(record)
            if batch.caught_up:
                self._act()

    async def listen(self) -> None:
        """Renew the lease of every learner that gets on with its task."""
        async for beat in self._client.beats(f"{self._federation}/beat/"):
            try:
                message = decode(beat.type, beat.payload)
            except PeerError as error:
                _log.warning("beat refused", topic=beat.topic, why=str(error))
                continue
            if not isinstance(message, pb.Progress):
                continue
            if beat.topic == topics.beat_topic(self._federation, message.learner):
                now = time.monotonic()
                self._leases = self._leases.renew(message.learner, message.task_id, now)

    def on_stored(self, task_id: str, digest: bytes, update_bytes: int) -> None:
        """The bulk endpoint has an update, checked and durable; told again after a restart."""
        if (task := self._run.tasks.get(task_id)) is None:
            return  # its round was closed in the meantime
        stored = pb.UpdateStored(
            task_id=task_id, learner=task.learner, digest=digest, update_bytes=update_bytes
        )
        topic = topics.ledger_topic(self._federation, task.learner)
        if not self._stored:  # those that come together are one transaction
            self._begin(self._publish_stored())
        self._stored.append(Publish(key_of(stored), topic, stored, task_id))

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
            _log.warning("event refused", publisher=record.publisher, why=str(error))
            return
        if record.publisher == "controller":
            self._under_way.discard(key_of(message))
            if isinstance(message, pb.UpdateUnusable):  # the round's fold begins anew
                self._under_way.discard(self._folding)
        before = self._run
        self._run, dropped = apply(
            self._run, Logged(message, record.publisher, record.logged_unix_ns)
        )
        if dropped and self._live:
            _log.info("event dropped", type=record.type, publisher=record.publisher, why=dropped)
        if self._run is not before:
            self._note(before)

    def _note(self, before: Run) -> None:
        """Keep the record of a round that is now over, and tell people what happened."""
        current, closed = self._run, self._run.closed
        if closed is not None and before.closed is not closed:
            self._recent_models.append(closed.model_digest)
            if self._live:
                _log.info(
                    "round closed",
                    round=closed.round,
                    counted=[one.learner for one in closed.counted],
                    missing={one.learner: one.reason for one in closed.missing},
                )
        record = record_of(current)
        if record is not None and self._recorded != (record.run_id, record.round):
            self._recorded = (record.run_id, record.round)
            path = self._home / "rounds" / record.run_id / f"{record.round:06d}.msgpack"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_suffix(".draft")
                draft.write_bytes(pack_record(record))
                draft.replace(path)
        if current.finished is not None and before.finished is None and self._live:
            outcome = pb.RunFinished.Outcome.Name(current.finished.outcome)
            _log.info("run finished", outcome=outcome, reason=current.finished.reason)

    def _act(self) -> None:
        """Do what the state calls for and is not under way yet."""
        self._live = True
        self._expect()
        self._offer()
        new = [effect for effect in decide(self._run) if effect.key not in self._under_way]
        self._under_way.update(effect.key for effect in new)
        self._publish([effect for effect in new if isinstance(effect, Publish)])
        for effect in new:
            if isinstance(effect, Fold):
                self._begin(self._fold(effect))
        self._leases = self._leases.watch(waits(self._run), time.monotonic())
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
        plan = self._run.plan
        if plan is None or self._run.phase is not Phase.TRAINING:
            self._bulk.expect({})
            return
        run_digest = federation_digest(self._federation, plan.run_id)
        form = self._public.update_form(self._run.exponents) if self._public else None
        self._bulk.expect(
            {
                task.task_id: Expected(
                    learner=f"learner:{task.learner}",
                    model_digest=self._run.model_digest or None,
                    federation=run_digest,
                    stored_digest=task.stored_digest,
                    encryption=form,
                    learners=len(plan.learners),
                )
                for task in self._run.tasks.values()
                if task.status in (Status.INVITED, Status.ASSIGNED, Status.COMPLETED)
            }
        )

    def _offer(self) -> None:
        """Let sites that check the fold themselves fetch what is in the newest model."""
        closed = self._run.closed
        if self._public and self._public.verify == "full" and closed is not None:
            self._bulk.offer(
                {one.update_digest: self._spool.update_path(one.task_id) for one in closed.counted}
            )

    async def _fold(self, effect: Fold) -> None:
        self._folding = effect.key
        try:
            digest = await asyncio.to_thread(
                fold_round, effect, self._store, self._spool, self._public
            )
        except UnusableUpdate as error:
            self._leave_out(effect.contributions[error.position], str(error))
            return
        # While the round is open, nothing of the next one can be among what is deleted.
        current = [task.task_id for task in self._run.tasks.values()]
        await asyncio.to_thread(self._forget, current, [*self._recent_models, digest])
        self._publish([round_closed(self._run, effect, digest)])

    def _leave_out(self, one: Contribution, reason: str) -> None:
        """Tell the log that an update cannot be folded; then the others are."""
        _log.error("update unusable", task=one.task_id, learner=one.learner, why=reason)
        unusable = pb.UpdateUnusable(task_id=one.task_id, learner=one.learner, reason=reason)
        topic = topics.ledger_topic(self._federation, one.learner)
        self._publish([Publish(key_of(unusable), topic, unusable, one.task_id)])

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
        effects = []
        for one in ended:
            wait = one.wait
            _log.warning(
                "lease ended", learner=wait.learner, task=wait.task_id, silent_s=one.silent_s
            )
            message = pb.LeaseEnded(
                task_id=wait.task_id, learner=wait.learner, silent_s=one.silent_s
            )
            topic = topics.ledger_topic(self._federation, wait.learner)
            effects.append(Publish(key_of(message), topic, message, wait.task_id))
        self._publish(effects)
        self._set_lease_timer()


async def serve(options: argparse.Namespace, stop: run.StopSignal) -> None:
    """Run the controller until `stop`. Raises MetisError for whatever keeps it from its work."""
    return_freed_memory()
    home: Path = options.home
    identity = load_identity(home / "keys")
    if identity.principal != "controller":
        raise UserError(f"{home}/keys holds the key of {identity.principal}, not the controller's")
    servers = load_servers(home / "keys", "broker")
    refuse_secret_parts("the controller", [home, home / "keys", home / "spool", home / "models"])
    public = load_public(home / "keys")
    with sole_process(home, "controller"):
        store = ModelStore(home / "models")
        spool = Spool(home / "spool", context=context_of(public) if public else None)
        connection = open_database(home / "controller.db")
        outbox = Outbox(connection, "controller")
        loop = asyncio.get_running_loop()
        controllers: list[Controller] = []

        def on_stored(task_id: str, digest: bytes, update_bytes: int) -> None:
            loop.call_soon_threadsafe(controllers[0].on_stored, task_id, digest, update_bytes)

        client = BrokerClient(
            ingress=options.ingress,
            live=options.live,
            keys=ClientKeys(identity.public, identity.secret, servers["broker"]),
            principal="controller",
            outbox=outbox,
            software=SOFTWARE,
        )
        bulk = BulkEndpoint(
            endpoint=options.bulk,
            identity=identity,
            peers=load_peers(home / "keys"),
            store=store,
            spool=spool,
            on_stored=on_stored,
        )
        try:
            async with client:
                controller = Controller(
                    federation=options.federation,
                    home=home,
                    connection=connection,
                    outbox=outbox,
                    client=client,
                    bulk=bulk,
                    store=store,
                    spool=spool,
                    public=public,
                )
                controllers.append(controller)
                bulk.start()
                run.ready()
                _log.info("serving", bulk=bulk.endpoint)
                ends = [
                    asyncio.ensure_future(controller.follow()),
                    asyncio.ensure_future(controller.listen()),
                    asyncio.ensure_future(stop.wait()),
                    asyncio.shield(asyncio.wrap_future(bulk.finished)),
                    controller.failed,
                ]
                await run.first_end(ends)
        finally:
            bulk.close()
            connection.close()


def main(argv: Sequence[str] | None = None) -> int:
    """`metisfl-controller`."""
    parser = daemon_parser(
        "metisfl-controller",
        "Conduct the rounds of one federation: ask the learners, take their updates, make the next "
        "community model.",
    )
    add_option(parser, "federation", help="name of the federation", type=name_of("federation"))
    add_option(parser, "ingress", help="the broker's ingress endpoint", default=INGRESS)
    add_option(parser, "live", help="the broker's live endpoint", default=LIVE)
    add_option(parser, "bulk", help="endpoint to bind for model bytes", default=BULK)
    options = parser.parse_args(argv)

    async def begin(stop: run.StopSignal) -> None:
        logs.configure("metisfl-controller")
        structlog.contextvars.bind_contextvars(federation=options.federation)
        await serve(options, stop)

    return run.run("metisfl-controller", begin)


if __name__ == "__main__":
    sys.exit(main())
