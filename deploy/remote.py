"""Ask daemons that run already, here or on other machines, for a run, and watch it.

Rule: it needs a driver's key that the broker knows, and nothing else. Interrupting it does not end
the run: that belongs to the federation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from contextlib import closing
from pathlib import Path

from metisfl.deploy import logs
from metisfl.deploy.broker_access import add_federation, load_access
from metisfl.deploy.database import open_database
from metisfl.deploy.insecure import INSECURE, add_insecure
from metisfl.deploy.run import Interrupted, StopSignal, first_end, run
from metisfl.deploy.screen import screen_for
from metisfl.deploy.settings import Federation, load_federation
from metisfl.deploy.view import View, shown_metric, shown_missing
from metisfl.deploy.watch import new_view, watch
from metisfl.proto.errors import MachineError, UserError

__all__ = ["command"]


def command(argv: list[str]) -> int:
    """`metisfl run`: ask running daemons for a run."""
    parser = argparse.ArgumentParser(
        prog="metisfl run",
        description="Ask a federation whose daemons are running for a run, and show it. The file "
        "says where the broker is ([broker] ingress and live) and who takes part.",
    )
    add_federation(parser, home_required=True)
    parser.add_argument(
        "--continue",
        dest="continues",
        default="",
        metavar="RUN",
        help="begin with the newest model that a site opened in that run, also under another key "
        "since (privacy mode ckks-threshold)",
    )
    add_insecure(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout at the end"
    )
    options = parser.parse_args(argv)
    federation = load_federation(options.file)
    started = time.monotonic()
    views: list[View] = []

    async def until_stopped(stop: StopSignal) -> None:
        logs.configure("metisfl", level="warning")

        async def follow() -> None:
            views.append(
                await _follow(federation, options.home, options.continues, options.insecure)
            )

        await first_end([asyncio.ensure_future(part) for part in (follow(), stop.wait())])
        if not views:
            raise Interrupted("interrupted; what has begun of the run goes on without you")

    code = run("metisfl", until_stopped)
    if code:
        return code
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps(_as_json(views[0], seconds)))
    else:
        print(f"{views[0].round} rounds in {seconds:.1f} s; {shown_metric(views[0])}")
        for line in shown_missing(views[0].round, views[0].missed):
            print(line)
        print(f"each learner has the model in its home, under final/{views[0].run_id}")
    return 0


async def _follow(federation: Federation, home: Path, continues: str, insecure: bool) -> View:
    access = load_access(federation, home, insecure=insecure)
    if not access.principal.startswith("driver:"):
        raise UserError(f"{home}/keys holds the key of {access.principal}; only a driver asks")
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)  # without keys it may be new
    except OSError as error:
        raise MachineError(f"{home}: {error.strerror}") from None
    # What an earlier command asked for and the broker never got is not asked for any more.
    for left in home.glob("driver.db*"):
        left.unlink()
    view = new_view(federation, continues)
    with screen_for(view) as screen, closing(open_database(home / "driver.db")) as connection:
        if insecure:
            screen.say(INSECURE)
        return await watch(
            federation,
            access=access,
            connection=connection,
            view=view,
            screen=screen,
        )


def _as_json(view: View, seconds: float) -> dict[str, object]:
    return {
        "run_id": view.run_id,
        "rounds": view.round,
        "seconds": round(seconds, 3),
        "metrics": view.metrics,
        "missed": {name: list(rounds) for name, rounds in view.missed.items()},
        "learners": {name: dict(metrics) for name, metrics in view.evaluated.items()},
    }
