"""Stop a federation's run before its last round, and say what is kept of it.

Rule: a run is stopped by an event, `RunStopped`, and is over when the log has its `RunFinished`,
for which the command waits. One that is being stopped already is only waited for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message

from metisfl.broker.client import BrokerClient, Outbox
from metisfl.deploy import logs
from metisfl.deploy.broker_access import add_federation, load_access
from metisfl.deploy.database import transaction
from metisfl.deploy.insecure import INSECURE, add_insecure
from metisfl.deploy.run import Interrupted, StopSignal, first_end, run
from metisfl.deploy.settings import Federation, load_federation
from metisfl.deploy.status import PATIENCE_S, told_by_controller
from metisfl.deploy.view import shown_kept
from metisfl.deploy.watch import RunFailed
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events import REASON_CHARACTERS_MAX, decode, may_send

__all__ = ["Runs", "as_json", "chosen", "command", "line"]

UNDER_WAY: Final = frozenset({"gathering", "training", "opening", "evaluating", "stopping"})


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs that a log tells of, a fold of its events."""

    open: tuple[str, ...] = ()  # oldest first: another one that is asked for is refused in a moment
    stopping: frozenset[str] = frozenset()
    ended: Mapping[str, pb.RunFinished] = MappingProxyType({})

    def after(self, publisher: str, message: Message) -> Runs:
        """Return the runs after an event, which changes nothing if it is not its publisher's."""
        if not may_send(publisher, message):
            return self
        run_id = getattr(message, "run_id", "")
        if isinstance(message, pb.RunFinished):
            left = tuple(one for one in self.open if one != run_id)
            ended = MappingProxyType({**self.ended, run_id: message})
            return replace(self, open=left, ended=ended)
        if run_id in self.ended:
            return self
        if isinstance(message, pb.RunStopped):
            # Of a run that was not under way then it was in vain.
            return replace(self, stopping=self.stopping | ({run_id} & {*self.open}))
        # The log may be trimmed behind the start of a long run.
        known = isinstance(message, (pb.RunStarted, pb.RoundClosed)) and run_id not in self.open
        return replace(self, open=(*self.open, run_id)) if known else self


def chosen(federation: str, runs: Runs, wanted: str, told: pb.ControllerStatus | None) -> str:
    """Return the run to stop: `wanted`, or with "" the one under way. Raises UserError.

    `told` is what the controller says, where the log may have forgotten the start of a run.
    """
    open_runs = list(runs.open)
    if told is not None and told.phase in UNDER_WAY and told.run_id not in runs.ended:
        open_runs.append(told.run_id)
    if not wanted and open_runs:
        return open_runs[0]
    if not wanted:
        raise UserError(f"no run of {federation} is under way: there is nothing to stop")
    if wanted in runs.ended or wanted in open_runs:
        return wanted
    shown = f"under way is {open_runs[0]}" if open_runs else "no run is under way"
    raise UserError(f"--run {wanted[:80]}: {federation} knows no such run; {shown}")


def command(argv: list[str]) -> int:
    """`metisfl stop`. Raises UserError, MachineError."""
    parser = argparse.ArgumentParser(
        prog="metisfl stop",
        description="End the run of a federation whose daemons are running, with the last round "
        "that was closed; wait until it has ended, and say what is kept. The daemons go on.",
        epilog="Exit codes: 0 the run is stopped, 1 it had come to another end before, 2 no run is "
        "under way, 3 the broker does not answer, 130 interrupted.",
    )
    add_federation(parser)
    parser.add_argument("--run", default="", metavar="ID", help="this run and no other")
    parser.add_argument(
        "--reason", default="", metavar="TEXT", help="why, for the log and everybody's records"
    )
    add_insecure(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if len(options.reason) > REASON_CHARACTERS_MAX:
        raise UserError(f"--reason: at most {REASON_CHARACTERS_MAX} characters")
    federation = load_federation(options.file)
    ends: list[pb.RunFinished] = []

    async def until_stopped(stop: StopSignal) -> None:
        logs.configure("metisfl", level="warning")

        async def end() -> None:
            ends.append(await _end(federation, options))

        await first_end([asyncio.ensure_future(part) for part in (end(), stop.wait())])
        if not ends:
            raise Interrupted("interrupted; if the log has the stop, the run ends without you")

    code = run("metisfl", until_stopped)
    if code:
        return code
    print(json.dumps(as_json(ends[0])) if options.json else line(ends[0]))
    return 0 if ends[0].outcome == pb.RunFinished.STOPPED else RunFailed.exit_code


async def _end(federation: Federation, options: argparse.Namespace) -> pb.RunFinished:
    """Stop the run, and return its end."""
    access = load_access(federation, options.home, insecure=options.insecure)
    if not access.principal.startswith("driver:"):
        raise UserError(
            f"{options.home}/keys holds the key of {access.principal}; only a driver stops a run"
        )
    if options.insecure:
        _say(INSECURE)
    # The event is durable when the log has it, and who is killed before can stop the run again: so
    # the outbox need not outlive the command.
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        outbox = Outbox(connection, access.principal)
        async with access.client(outbox) as client:
            await client.status(PATIENCE_S)  # a broker that is not there is an error here
            return await _stopped(federation.name, options, client, outbox, connection)


async def _stopped(
    federation: str,
    options: argparse.Namespace,
    client: BrokerClient,
    outbox: Outbox,
    connection: sqlite3.Connection,
) -> pb.RunFinished:
    runs, run_id, trimmed = Runs(), "", False
    async for batch in client.records(topics.run_topic(federation)):
        for record in batch.records:
            with suppress(PeerError):  # what cannot be read changes no run
                runs = runs.after(record.publisher, decode(record.type, record.payload))
        trimmed = trimmed or batch.trimmed_to > 0
        if not run_id and batch.caught_up:
            told = await _told(client, federation) if trimmed and not runs.open else None
            run_id = chosen(federation, runs, options.run, told)
            if run_id not in runs.stopping and run_id not in runs.ended:
                stopped = pb.RunStopped(run_id=run_id, reason=options.reason)
                with transaction(connection):
                    outbox.append(topics.run_topic(federation), stopped, correlation_id=run_id)
                client.flush()
            late = f"waiting for the controller, which ends run {run_id} when it has read the stop"
            asyncio.get_running_loop().call_later(PATIENCE_S, _say, late)
        if run_id in runs.ended:
            return runs.ended[run_id]
    raise AssertionError("a lane has no end")


async def _told(client: BrokerClient, federation: str) -> pb.ControllerStatus | None:
    with suppress(asyncio.TimeoutError):
        return await asyncio.wait_for(told_by_controller(client, federation), PATIENCE_S)
    return None


def line(end: pb.RunFinished) -> str:
    """The end of the run for people. Pure."""
    if end.outcome == pb.RunFinished.STOPPED:
        return f"run {end.run_id} was {end.reason}\n{shown_kept(end)}"
    outcome = pb.RunFinished.Outcome.Name(end.outcome).lower()
    why = f": {end.reason}" if end.reason else ""
    return f"run {end.run_id} had {outcome} before it was stopped, after round {end.rounds}{why}"


def as_json(end: pb.RunFinished) -> dict[str, object]:
    """The fields that `metisfl stop --json` prints."""
    return {
        "run_id": end.run_id,
        "outcome": pb.RunFinished.Outcome.Name(end.outcome),
        "reason": end.reason,
        "rounds": end.rounds,
        "model_digest": end.model_digest.hex(),
        "record": end.record.hex(),
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
