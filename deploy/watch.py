"""Ask a federation for a run, and follow the run to its end.

Rule: a run is asked for by an event, `RunStarted`, which is in the driver's outbox before it is
sent; what is shown comes from the log alone. It does not matter who started the daemons.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any

from metisfl.broker.client import BrokerClient, Outbox
from metisfl.deploy.broker_access import Access
from metisfl.deploy.database import transaction
from metisfl.deploy.run import first_end
from metisfl.deploy.screen import Screen
from metisfl.deploy.settings import Federation
from metisfl.deploy.view import LearnerView, View, shown_kept
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.errors import MetisError, PeerError
from metisfl.proto.events import decode, may_send

__all__ = ["Follower", "RunFailed", "RunStopped", "new_view", "watch"]


class RunFailed(MetisError):
    """The federation could not finish the run; the text is its reason."""

    exit_code = 1


class RunStopped(RunFailed):
    """A driver has stopped the run; the text says who, why, and what is kept."""

    exit_code = 5


def new_view(federation: Federation, continues: str = "") -> View:
    """The view of a run that is about to be asked for; its id is the time, in UTC.

    `continues`: the run whose newest model it begins with.
    """
    names = sorted(learner.name for learner in federation.learners)
    return View(
        run_id=f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}",
        rounds=federation.rounds,
        learners=MappingProxyType({name: LearnerView() for name in names}),
        continues=continues,
    )


async def watch(
    federation: Federation,
    *,
    access: Access,
    connection: sqlite3.Connection,
    view: View,
    screen: Screen,
    meanwhile: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> View:
    """Return the view of the completed run. Raises RunFailed, RunStopped, what `meanwhile` raises.

    `connection` is the driver's own database.
    """
    outbox = Outbox(connection, access.principal)
    async with access.client(outbox) as client:
        with transaction(connection):
            outbox.append(
                topics.run_topic(federation.name),
                _run_started(federation, view),
                correlation_id=view.run_id,
            )
        client.flush()
        follower = Follower(client, federation.name, view, screen)
        parts = [follower.follow(), follower.listen()]
        if meanwhile is not None:
            parts.append(meanwhile())
        await first_end([asyncio.ensure_future(part) for part in parts])
    finished = follower.view.finished
    assert finished is not None
    if finished.outcome == pb.RunFinished.STOPPED:
        raise RunStopped(f"the run was {finished.reason}; {shown_kept(finished)}")
    if finished.outcome != pb.RunFinished.COMPLETED:
        raise RunFailed(f"the run failed: {finished.reason}")
    return follower.view


def _run_started(federation: Federation, view: View) -> pb.RunStarted:
    return pb.RunStarted(
        run_id=view.run_id,
        rounds=federation.rounds,
        learners=list(view.learners),
        quorum=federation.quorum,
        waits_for_quorum=federation.waits_for_quorum,
        lease_s=federation.lease_s,
        seed=federation.seed,
        privacy=federation.privacy,
        max_examples=federation.max_examples,
        continues=view.continues,
        hyperparameters=pb.Hyperparameters(
            epochs=federation.training.epochs,
            batch_size=federation.training.batch_size,
            learning_rate=federation.training.learning_rate or 0.0,
        ),
    )


class Follower:
    """Keeps a view up to date with the log and the beats, and shows it."""

    def __init__(self, client: BrokerClient, federation: str, view: View, screen: Screen) -> None:
        self.view = view
        self._client = client
        self._federation = federation
        self._screen = screen
        self._ignored: set[str] = set()

    async def listen(self) -> None:
        """Take what learners and controller say of themselves, for ever."""
        async for beat in self._client.beats(f"{self._federation}/beat/"):
            subject = topics.parse_topic(beat.topic).subject
            publisher = "controller" if subject == topics.ALL else f"learner:{subject}"
            self._take(beat.type, beat.payload, publisher, 0)

    async def follow(self) -> None:
        """Return when the run is finished."""
        async for batch in self._client.records(topics.federation_lane(self._federation)):
            for record in batch.records:
                self._take(record.type, record.payload, record.publisher, record.logged_unix_ns)
            if self.view.finished is not None:
                return

    def _take(self, kind: str, payload: bytes, publisher: str, logged_unix_ns: int) -> None:
        try:
            message = decode(kind, payload)
            if not may_send(publisher, message):
                raise PeerError(f"{kind} is not its to send")
        except PeerError as error:
            if self.view.started and publisher not in self._ignored:
                self._ignored.add(publisher)  # one line for each, however many it sends
                self._screen.say(f"events of {publisher} are ignored: {error}")
            return
        before, self.view = self.view, self.view.after(message)
        self._screen.show(before, self.view, message, logged_unix_ns)
