"""Measure how long a killed daemon is missed, when a supervisor starts it again at once.

Rule: real processes, keys and disks; each figure is the median from SIGKILL to the first sign of
the next life (deploy/outages.py says what counts as one):
    controller_s      the first event that the new controller has published
    broker_s          the first record that the new broker has stored
    learner_s         its progress with the task that the kill cut, or an answer to one
    learner_import_s  what a learner takes to load its application, in a process of its own while
                      the same run goes on: the least that learner_s can be
    retrained         tasks whose training was completed more than once, as the learners' logs tell
    bits_equal        whether the final model is that of an undisturbed run of the same seed
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from metisfl.deploy import logs
from metisfl.deploy.chaos import RoundTimes
from metisfl.deploy.demo_chaos import model_digest
from metisfl.deploy.driver import Outcome, drive
from metisfl.deploy.options import whole_number
from metisfl.deploy.recovery_screen import Strike, Strikes
from metisfl.deploy.restarts import KILLS_MAX
from metisfl.deploy.settings import ANY_PORT, App, Encryption, Federation, Learner, Training
from metisfl.deploy.supervisor import SERVERS
from metisfl.deploy.watch import RunFailed
from metisfl.proto import ckks
from metisfl.proto.errors import MachineError

__all__ = ["command"]

APP: Final = "metisfl.deploy.bench_site:Site"
TRAINING_S: Final = 0.4
LEASE_S: Final = 60.0
SPARE_ROUNDS: Final = 6
# Loads the application as a learner's training process does, and says how long that took.
LOADING: Final = """
import asyncio, sys, time
from pathlib import Path
from metisfl.learner.worker import Worker

async def load(app, source, keys):
    worker = Worker(app=app, path=Path("."), source=source, keys=Path(keys) if keys else None)
    began = time.perf_counter()
    await worker.start()
    print(time.perf_counter() - began)
    await worker.close()

asyncio.run(load(*sys.argv[1:]))
"""


def command(argv: list[str]) -> int:
    """`metisfl bench recovery`: the time from SIGKILL to the round going on."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench recovery",
        description="Run a federation twice, once undisturbed; in the other run kill controller, "
        "broker and a learner in turn, and measure how long each is missed.",
    )
    parser.add_argument(
        "--learners", type=whole_number(2, 100), default=4, metavar="N", help="default: 4"
    )
    parser.add_argument(
        "--times",
        type=whole_number(1, KILLS_MAX),
        default=KILLS_MAX,
        metavar="N",
        help=f"how often each is killed (default and at most {KILLS_MAX}: who is killed more often "
        "is given up)",
    )
    parser.add_argument(
        "--privacy",
        choices=("plain", "ckks"),
        default="plain",
        help="whether updates are encrypted (default: plain)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    options = parser.parse_args(argv)
    logs.configure("metisfl", level="warning")
    federation = _federation(options.learners, options.times, options.privacy)
    with tempfile.TemporaryDirectory(prefix="metisfl-bench-") as folder:
        figures = asyncio.run(_measure(federation, Path(folder), options.times))
    figures = {"privacy": options.privacy, "learners": options.learners, **figures}
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:<18} {value:.3f}" if isinstance(value, float) else f"{name:<18} {value}")
    return 0


def _federation(learners: int, times: int, privacy: str) -> Federation:
    return Federation(
        name="bench",
        rounds=(len(SERVERS) + 2) * times + SPARE_ROUNDS,
        quorum=learners,
        waits_for_quorum=False,
        lease_s=LEASE_S,
        seed=0,
        privacy=privacy,
        encryption=Encryption(
            profile=None, error=ckks.ERROR, min_contributors=2, max_share=1.0, verify="none"
        ),
        training=Training(epochs=1, batch_size=1, learning_rate=None),
        app=App(APP, Path(".")),
        learners=tuple(
            Learner(f"l{number:04d}", str(TRAINING_S)) for number in range(1, learners + 1)
        ),
        ingress=ANY_PORT,
        live=ANY_PORT,
        bulk=ANY_PORT,
    )


async def _measure(federation: Federation, folder: Path, times: int) -> Mapping[str, object]:
    screen = RoundTimes()
    screen.say("first undisturbed")
    undisturbed = await drive(federation, folder / "undisturbed", screen)
    screen.say(f"a round takes {screen.median_s:.2f} s; the same again, with kills")
    victim = federation.learners[0].name
    loads: list[asyncio.Task[float]] = []
    strikes = Strikes(
        _plan(victim, times, screen.median_s),
        lambda: loads.append(asyncio.ensure_future(_load(federation, folder / "disturbed"))),
    )
    disturbed = await drive(federation, folder / "disturbed", strikes, strikes.on_started)
    if strikes.left or not all(outage.over for outage in strikes.outages):
        raise RunFailed(
            f"the run ended before all was measured; {len(strikes.left)} kills are left"
        )

    def median_s(name: str) -> float:
        found = [outage.seconds for outage in strikes.outages if outage.victim == name]
        return round(statistics.median(found), 3)

    return {
        "controller_s": median_s("controller"),
        "broker_s": median_s("broker"),
        "learner_s": median_s(victim),
        "learner_import_s": round(statistics.median(await asyncio.gather(*loads)), 3),
        "retrained": _retrained(disturbed, federation.learners),
        "bits_equal": model_digest(undisturbed.model) == model_digest(disturbed.model),
    }


def _plan(learner: str, times: int, round_s: float) -> list[Strike]:
    """Every victim in turn, at places spread over a round; a learner while it trains.

    A round without a victim is for loading the application.
    """
    plan = []
    for number in range(times):
        place = (number + 0.5) / times
        plan += [Strike(name, place * round_s) for name in SERVERS]
        plan += [Strike(learner, place * TRAINING_S), Strike("", 0.0)]
    return plan


async def _load(federation: Federation, folder: Path) -> float:
    """Seconds that loading the application takes now, with the key if there is one."""
    site = federation.learners[0]
    keys = folder / "learners" / site.name / "keys" if federation.privacy == "ckks" else ""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOADING, federation.app.object, site.data, str(keys)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
    )
    answer, _ = await process.communicate()
    if process.returncode:
        raise MachineError(f"loading the application ended with exit code {process.returncode}")
    return float(answer)


def _retrained(outcome: Outcome, learners: Sequence[Learner]) -> int:
    trained: Counter[str] = Counter()
    for learner in learners:
        log = outcome.folder / "logs" / f"{learner.name}.log"
        for line in log.read_text().splitlines():
            said = json.loads(line)
            if said["event"] == "trained":
                trained[f"{learner.name} {said['task']}"] += 1
    return sum(count > 1 for count in trained.values())
