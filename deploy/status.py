"""Show how a federation stands: the round, whom it waits for since when, and how the broker is.

Rule: it asks those who know, and reads nothing else: the controller tells once a second, the broker
when asked. What does not answer is said to be silent, which is the answer most looked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from google.protobuf.json_format import MessageToDict

from metisfl.broker.client import BrokerClient, BrokerStatus, Outbox
from metisfl.deploy import logs
from metisfl.deploy.broker_access import add_federation, load_access
from metisfl.deploy.insecure import INSECURE, add_insecure
from metisfl.deploy.run import StopSignal, first_end, run
from metisfl.deploy.settings import load_federation
from metisfl.deploy.view import readable_bytes
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.events import decode

__all__ = ["PATIENCE_S", "Status", "command", "lines", "told_by_controller"]

PATIENCE_S: Final = 5.0  # the controller tells once a second, and is heard about as soon


@dataclass(frozen=True, slots=True)
class Status:
    """What was learned. `controller` is None if it said nothing in time."""

    federation: str
    broker: BrokerStatus
    controller: pb.ControllerStatus | None


def command(argv: list[str]) -> int:
    """`metisfl status`. Exit code 4 if the controller is silent. Raises UserError, MachineError."""
    parser = argparse.ArgumentParser(
        prog="metisfl status",
        description="Show how a federation whose daemons are running stands: who is awaited, since "
        "when, and when each lease ends; and how the broker is.",
    )
    add_federation(parser)
    add_insecure(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    found: list[Status] = []

    async def until_stopped(stop: StopSignal) -> None:
        logs.configure("metisfl", level="error")

        async def ask() -> None:
            found.append(await _ask(options.file, options.home, options.insecure))

        await first_end([asyncio.ensure_future(part) for part in (ask(), stop.wait())])

    code = run("metisfl", until_stopped)
    if code or not found:
        return code
    if options.json:
        print(json.dumps(_as_json(found[0])))
    else:
        print("\n".join(lines(found[0], time.time())))
    return PeerError.exit_code if found[0].controller is None else 0


async def _ask(file: Path, home: Path | None, insecure: bool) -> Status:
    federation = load_federation(file)
    access = load_access(federation, home, insecure=insecure)
    # It publishes nothing, so its outbox need not outlive it, and fences no other command.
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        outbox = Outbox(connection, access.principal)
        async with access.client(outbox) as client:
            told = asyncio.ensure_future(told_by_controller(client, federation.name))
            try:
                broker = await client.status(PATIENCE_S)
                controller = await asyncio.wait_for(told, PATIENCE_S)
            except asyncio.TimeoutError:
                controller = None
            finally:
                told.cancel()
                await asyncio.gather(told, return_exceptions=True)
    return Status(federation.name, broker, controller)


async def told_by_controller(client: BrokerClient, federation: str) -> pb.ControllerStatus:
    """What the controller says next of itself."""
    async for beat in client.beats(topics.beat_topic(federation, topics.ALL)):
        message = decode(beat.type, beat.payload)
        if isinstance(message, pb.ControllerStatus):
            return message
    raise MachineError("the connection to the broker has ended")


def lines(status: Status, unix_s: float) -> list[str]:
    """The status for people, at the moment `unix_s`. Pure."""
    shout = [INSECURE.upper()] if status.broker.insecure else []
    return [*shout, *_controller_lines(status, unix_s), *_broker_lines(status.broker, unix_s)]


def _controller_lines(status: Status, unix_s: float) -> list[str]:
    one = status.controller
    if one is None:
        return [f"{status.federation}: the controller is silent; does it run, for this federation?"]
    if not one.run_id:
        return [f"{status.federation}: no run yet; waiting for {one.waits_for}"]
    what = f"{status.federation}: run {one.run_id}, round {one.round} of {one.rounds}, {one.phase}"
    if one.phase == "training":
        what += f", {one.counted} of {one.invited} updates (quorum {one.quorum})"
    shown = [what]
    if one.waits_for:
        shown.append(f"waiting for {one.waits_for}")
    if one.awaited:
        width = max(len(wait.learner) for wait in one.awaited)
        shown += [
            f"  {wait.learner:<{width}}  silent for {_seconds(unix_s - wait.since_unix_ns / 1e9)}, "
            f"lease ends in {_seconds(wait.lease_left_s)}  ({wait.task_id or 'has yet to join'})"
            for wait in one.awaited
        ]
    if one.awaited_total > len(one.awaited):
        shown.append(f"  and {one.awaited_total - len(one.awaited)} more, whose leases end later")
    return shown


def _broker_lines(broker: BrokerStatus, unix_s: float) -> list[str]:
    log = (
        f"broker: {broker.head} events, {readable_bytes(broker.log_bytes)} of "
        f"{readable_bytes(broker.log_limit_bytes)}, {readable_bytes(broker.disk_free_bytes)} free "
        "on its disk"
    )
    shown = [log if not broker.floor else f"{log}, trimmed up to {broker.floor}"]
    if broker.full_since_unix_ns:
        since = _seconds(unix_s - broker.full_since_unix_ns / 1e9)
        shown.append(f"  takes no events since {since}: {broker.full_reason}")
    return shown


def _seconds(value: float) -> str:
    return f"{max(0.0, value):.0f} s"


def _as_json(status: Status) -> dict[str, object]:
    told = status.controller
    return {
        "federation": status.federation,
        "controller": None if told is None else _fields(told),
        "broker": asdict(status.broker),
    }


def _fields(told: pb.ControllerStatus) -> dict[str, object]:
    whole = MessageToDict(told, preserving_proto_field_name=True)
    whole["awaited"] = [
        {
            "learner": one.learner,
            "task_id": one.task_id,
            "since_unix_ns": one.since_unix_ns,
            "lease_left_s": one.lease_left_s,
        }
        for one in told.awaited
    ]
    return whole
