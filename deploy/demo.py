"""Train one heart-disease model with four hospitals, whose patients stay where they are.

Rule: the demo is an ordinary federation, written out in full before it runs, so that a newcomer can
read it, change it and run it again with `metisfl up`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from metisfl.deploy.demo_chaos import run_twice
from metisfl.deploy.driver import Outcome, new_run_folder, up, updates_of_a_round
from metisfl.deploy.options import whole_number
from metisfl.deploy.settings import Federation, load_federation
from metisfl.proto.errors import MachineError, UserError

__all__ = ["command"]

EXAMPLE: Final = Path(__file__).parent / "examples" / "heart_disease"


def command(argv: list[str]) -> int:
    """`metisfl demo`: four hospitals, one model."""
    parser = argparse.ArgumentParser(
        prog="metisfl demo",
        description="Write the four-hospital example, run it as a federation of real processes on "
        "this machine, and compare the shared model with what each hospital reaches alone.",
    )
    parser.add_argument(
        "--run-folder",
        type=Path,
        metavar="DIR",
        help="where the example and the run go (default: runs/hearts-<time>)",
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="fewer or more rounds")
    parser.add_argument("--seed", type=int, metavar="N", help="another run of the same federation")
    parser.add_argument(
        "--privacy",
        choices=("ckks", "ckks-threshold", "plain"),
        help="whether updates leave a hospital encrypted under a key that all have (ckks, "
        "the default), under one of which each has a share (ckks-threshold), or not (plain)",
    )
    parser.add_argument(
        "--chaos",
        type=whole_number(0, 2**63 - 1),
        metavar="SEED",
        help="run twice, the second time with broker, controller and two hospitals killed at "
        "moments that SEED chooses, and compare the final models bit by bit",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout at the end"
    )
    options = parser.parse_args(argv)
    started = time.monotonic()
    folder = options.run_folder or new_run_folder("hearts")
    changes = {"rounds": options.rounds, "seed": options.seed, "privacy": options.privacy}
    federation = load_federation(_write_example(folder, changes))
    _say(f"four hospitals, {federation.rounds} rounds; the federation is {folder}/federation.toml")
    if options.chaos is not None:
        return run_twice(federation, folder, options.chaos, as_json=options.json)
    outcome = up(federation, folder / "run")
    _say("now each hospital alone, with as many epochs on its own patients")
    alone = asyncio.run(_train_alone(federation))
    seconds = time.monotonic() - started
    if options.json:
        print(json.dumps(_as_json(outcome, alone, seconds)))
    else:
        print("\n".join(_table(federation, outcome, alone, seconds)))
    return 0


def _write_example(folder: Path, changes: Mapping[str, int | str | None]) -> Path:
    """Copy the example into `folder` and return the path of its federation file.

    `changes` gives keys another value than the example's; None leaves it.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; the demo needs a folder of its own")
    try:
        shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        raise MachineError(f"cannot write the example to {folder}: {error}") from None
    path = folder / "federation.toml"
    text = path.read_text()
    for key, value in changes.items():
        if value is not None:  # a number or a word of a-z is the same in JSON and in TOML
            lines = [f"{key} = {json.dumps(value)}" if line.startswith(f"{key} = ") else line
                     for line in text.splitlines()]  # fmt: skip
            text = "\n".join(lines) + "\n"
    path.write_text(text)
    return path


async def _train_alone(federation: Federation) -> dict[str, float]:
    """Accuracy on the pooled test patients of a model trained at one site alone, by learner.

    In a process of its own, since the driver never imports the framework.
    """
    training = federation.training
    command = [
        *(sys.executable, "-m", "metisfl.learner.alone"),
        *("--app", federation.app.object, "--path", str(federation.app.path)),
        *("--sources", *(learner.data for learner in federation.learners)),
        *("--epochs", str(federation.rounds * training.epochs)),
        *("--batch-size", str(training.batch_size)),
        *("--seed", str(federation.seed)),
    ]
    if training.learning_rate is not None:
        command += ["--learning-rate", str(training.learning_rate)]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await process.communicate()
    if process.returncode:
        raise MachineError(
            f"training alone ended with exit code {process.returncode}; it says why above"
        )
    by_source: Mapping[str, float] = json.loads(answer)
    return {learner.name: by_source[learner.data] for learner in federation.learners}


def _as_json(outcome: Outcome, alone: Mapping[str, float], seconds: float) -> dict[str, Any]:
    return {
        "rounds": outcome.rounds,
        "accuracy": round(outcome.metrics["test.accuracy"], 6),
        "alone": {name: round(accuracy, 6) for name, accuracy in alone.items()},
        "privacy": outcome.privacy,
        "update_bytes": outcome.update_bytes,
        "plain_bytes": outcome.plain_bytes,
        "seconds": round(seconds, 3),
        "model": str(outcome.model),
    }


def _table(
    federation: Federation, outcome: Outcome, alone: Mapping[str, float], seconds: float
) -> list[str]:
    """Federated against alone: the same pooled test patients for every figure but the last."""
    patients = int(outcome.metrics["test.examples"])
    together = outcome.metrics["test.accuracy"]
    rows = [
        "",
        f"Accuracy on the pooled {patients} test patients of all hospitals",
        "",
        f"  {'hospital':<16} {'alone':>7} {'federated':>10} {'gain':>7}   its own patients",
    ]
    for learner in federation.learners:
        own = outcome.by_learner[learner.name]
        rows.append(
            f"  {learner.name:<16} {alone[learner.name]:>7.3f} {together:>10.3f} "
            f"{together - alone[learner.name]:>+7.3f}   "
            f"{own['test.accuracy']:.3f} of {int(own['test.examples'])}"
        )
    mean = sum(alone.values()) / len(alone)
    rows += [
        f"  {'mean':<16} {mean:>7.3f} {together:>10.3f} {together - mean:>+7.3f}",
        "",
        updates_of_a_round(outcome),
        f"{outcome.rounds} rounds in {outcome.seconds:.1f} s, all in {seconds:.1f} s",
        f"model: {outcome.model} (model.npz, model.keras)",
    ]
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
