"""Start a federation on this machine, show its run, and keep what comes out of it.

Rule: the driver is one more client of the broker. It starts processes, asks for a run by an event
and watches the log; nothing of a run goes through it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from metisfl.deploy import logs, processes
from metisfl.deploy.broker_access import Access
from metisfl.deploy.database import open_database
from metisfl.deploy.encryption import give_key
from metisfl.deploy.insecure import INSECURE, add_insecure
from metisfl.deploy.joint_encryption import make_joint_key
from metisfl.deploy.run import Interrupted, StopSignal, run
from metisfl.deploy.run_folder import DRIVER, RunFolder, create_run_folder
from metisfl.deploy.screen import Screen, screen_for
from metisfl.deploy.settings import Federation, load_federation
from metisfl.deploy.supervisor import Supervisor
from metisfl.deploy.view import View, readable_bytes, shown_metric, shown_missing
from metisfl.deploy.watch import RunFailed, new_view, watch
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import JOINT
from metisfl.proto.errors import UserError
from metisfl.proto.model_file import header_of, open_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import plain_payload_bytes, serialise_manifest

__all__ = ["Outcome", "command", "drive", "new_run_folder", "up", "updates_of_a_round"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a completed run gave. `model` is the folder with model.npz and model.keras.

    `update_bytes` is the size of the updates in the last round's model, all together, and
    `plain_bytes` what they would be without encryption.
    """

    run_id: str
    rounds: int
    seconds: float  # from the first process started to the run finished
    metrics: Mapping[str, float]  # of the final model, pooled over the learners
    by_learner: Mapping[str, Mapping[str, float]]
    privacy: str
    update_bytes: int
    plain_bytes: int
    model_digest: bytes  # of the last community model: encrypted, every run has another one
    model: Path
    folder: Path
    missed: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # by learner, rounds without it


async def drive(
    federation: Federation,
    folder: Path,
    screen: Screen | None = None,
    on_started: Callable[[Mapping[str, int]], None] | None = None,
    *,
    insecure: bool = False,
) -> Outcome:
    """Run `federation` once in `folder`, start to end. Raises MetisError if it does not complete.

    `on_started` gets the process id of every daemon, by name, before the run is asked for; the
    mapping stays true when one of them is started again.
    Cancel it to end the run: all processes are stopped before the cancellation goes on.
    """
    if insecure and federation.privacy == JOINT:
        raise UserError(
            "a joint key is made by sites that know each other by their keys: leave --insecure "
            "out, or take another privacy mode"
        )
    started = time.monotonic()
    view = new_view(federation)
    run_folder = create_run_folder(folder, list(view.learners), insecure=insecure)
    with screen or screen_for(view) as shown:
        supervisor = Supervisor(shown.say, spare=len(federation.learners) - federation.quorum)
        try:
            if insecure:
                shown.say(INSECURE)
            if federation.privacy == "ckks":
                shown.say(await give_key(federation, run_folder))
            endpoints = processes.free_endpoints(
                [federation.ingress, federation.live, federation.bulk]
            )
            await _start_daemons(federation, run_folder, endpoints, supervisor, insecure, shown.say)
            if on_started is not None:
                on_started(supervisor.pids)
            shown.say(
                f"started broker, controller and {len(view.learners)} learners; "
                f"logs in {run_folder.logs}"
            )
            with closing(open_database(run_folder.driver / "driver.db")) as connection:
                view = await watch(
                    federation,
                    access=Access(endpoints[0], endpoints[1], DRIVER, run_folder.driver_keys),
                    connection=connection,
                    view=view,
                    screen=shown,
                    meanwhile=supervisor.watch,
                )
            model = _keep_model(run_folder, view)
        finally:
            await supervisor.stop()
    return Outcome(
        run_id=view.run_id,
        rounds=view.round,
        seconds=time.monotonic() - started,
        metrics=view.metrics,
        by_learner=view.evaluated,
        privacy=federation.privacy,
        update_bytes=view.uploaded,
        plain_bytes=_plain_bytes(run_folder, view),
        model_digest=_closed(view).model_digest,
        model=model,
        folder=folder,
        missed=view.missed,
    )


async def _start_daemons(
    federation: Federation,
    run_folder: RunFolder,
    endpoints: list[str],
    supervisor: Supervisor,
    insecure: bool,
    say: Callable[[str], None],
) -> None:
    flags: dict[str, None] = {"insecure": None} if insecure else {}

    async def start(name: str, service: str, home: Path, options: Mapping[str, str]) -> None:
        module, log = f"metisfl.{service}.service", run_folder.logs / f"{name}.log"
        await supervisor.start(name, module, {"home": str(home), **options, **flags}, log)

    ingress, live, bulk = endpoints
    wires = {"ingress": ingress, "live": live}
    await start("broker", "broker", run_folder.broker, wires)
    if federation.privacy == JOINT:
        say("the sites make a joint key; nobody will hold it alone")
        say(await make_joint_key(federation, run_folder, wires))
    wires |= {"federation": federation.name, "bulk": bulk}
    await start("controller", "controller", run_folder.controller, wires)
    for learner in federation.learners:
        options = {
            "name": learner.name,
            "app": federation.app.object,
            "path": str(federation.app.path),
            "data": learner.data,
            **wires,
        }
        await start(learner.name, "learner", run_folder.learners[learner.name], options)


def _keep_model(run_folder: RunFolder, view: View) -> Path:
    """Copy the final model, which every learner has written at its site, into the run folder."""
    target = run_folder.folder / "model"
    for name in sorted(view.evaluated):  # who has reported has written all of it
        written = run_folder.learners[name] / "final" / view.run_id
        if (written / "model.npz").exists():
            shutil.copytree(written, target)
            return target
    raise RunFailed("no learner has written the final model; see their logs")


def _plain_bytes(run_folder: RunFolder, view: View) -> int:
    """Bytes of the last round's updates as plain model files."""
    closed = _closed(view)
    path = run_folder.controller / "models" / f"{closed.model_digest.hex()}.model"
    with open_model(path) as model:
        plain = Manifest(
            tensors=model.manifest.tensors, payload_bytes=plain_payload_bytes(model.manifest)
        )
    update = len(header_of(serialise_manifest(plain))) + plain.payload_bytes
    return update * len(closed.counted)


def _closed(view: View) -> pb.RoundClosed:
    """The last round of a completed run."""
    assert view.closed is not None, "a completed run has closed a round"
    return view.closed


def up(
    federation: Federation,
    folder: Path,
    screen: Screen | None = None,
    on_started: Callable[[Mapping[str, int]], None] | None = None,
    *,
    insecure: bool = False,
) -> Outcome:
    """`drive` for a command: ends cleanly on Ctrl-C. Raises MetisError."""
    outcomes: list[Outcome] = []

    async def until_stopped(stop: StopSignal) -> None:
        logs.configure("metisfl", level="warning")
        driving = asyncio.ensure_future(
            drive(federation, folder, screen, on_started, insecure=insecure)
        )
        stopped = asyncio.ensure_future(stop.wait())
        await asyncio.wait({driving, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not driving.done():
            driving.cancel()
            await asyncio.gather(driving, return_exceptions=True)
            raise Interrupted(f"interrupted; what the run has left is in {folder}")
        stopped.cancel()
        outcomes.append(driving.result())

    if code := run("metisfl", until_stopped):
        sys.exit(code)
    return outcomes[0]


def command(argv: list[str]) -> int:
    """`metisfl up`: run a whole federation on this machine."""
    parser = argparse.ArgumentParser(
        prog="metisfl up",
        description="Start broker, controller and all learners of a federation file on this "
        "machine, show the run, and keep logs, round records and the final model in a run folder.",
    )
    parser.add_argument("file", type=Path, metavar="FEDERATION.toml")
    parser.add_argument(
        "--run-folder",
        type=Path,
        metavar="DIR",
        help="where the run's files go (default: runs/<federation>-<time>)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout at the end"
    )
    add_insecure(parser)
    options = parser.parse_args(argv)
    federation = load_federation(options.file)
    folder = options.run_folder or new_run_folder(federation.name)
    outcome = up(federation, folder, insecure=options.insecure)
    if options.json:
        print(json.dumps(as_json(outcome)))
    else:
        print(f"\n{outcome.rounds} rounds in {outcome.seconds:.1f} s; {_summary(outcome)}")
        for line in shown_missing(outcome.rounds, outcome.missed):
            print(line)
        print(updates_of_a_round(outcome))
        print(f"model: {outcome.model}")
    return 0


def new_run_folder(name: str) -> Path:
    """runs/<name>-<UTC time to the microsecond>, so that no two commands share one."""
    return Path("runs") / f"{name}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"


def as_json(outcome: Outcome) -> dict[str, object]:
    """The fields that `metisfl up --json` prints."""
    return {
        "run_id": outcome.run_id,
        "rounds": outcome.rounds,
        "seconds": round(outcome.seconds, 3),
        "metrics": dict(outcome.metrics),
        "learners": {name: dict(metrics) for name, metrics in outcome.by_learner.items()},
        "missed": {name: list(rounds) for name, rounds in outcome.missed.items()},
        "privacy": outcome.privacy,
        "update_bytes": outcome.update_bytes,
        "plain_bytes": outcome.plain_bytes,
        "model": str(outcome.model),
        "folder": str(outcome.folder),
    }


def updates_of_a_round(outcome: Outcome) -> str:
    """How large the updates of a round are, for people."""
    size, plain = readable_bytes(outcome.update_bytes), readable_bytes(outcome.plain_bytes)
    how = f"encrypted (in plain {plain})" if outcome.privacy != "plain" else "not encrypted"
    return f"updates of a round, all learners together: {size}, {how}"


def _summary(outcome: Outcome) -> str:
    view = View("", outcome.rounds, MappingProxyType({}), evaluated=outcome.by_learner)
    return shown_metric(view) or "no metrics were reported"
