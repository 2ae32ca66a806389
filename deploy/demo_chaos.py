"""The demo twice with one seed, once undisturbed and once with daemons killed: the same bits?

Rule: bits are compared, not accuracies. The final model is every tensor that a hospital holds in
plain; the community model itself is compared where updates are plain. Encrypted, it is another one
in every run, and opens to the same values: what a site decrypts lies on a grid that is wider than
all the noise there is (`repeatable` in `metisfl keys show`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metisfl.deploy.chaos import Chaos, Moment, RoundTimes, moments
from metisfl.deploy.driver import Outcome, up
from metisfl.deploy.outages import Outage
from metisfl.deploy.settings import Federation
from metisfl.deploy.watch import RunFailed

__all__ = ["model_digest", "run_twice"]


def run_twice(federation: Federation, folder: Path, seed: int, *, as_json: bool) -> int:
    """Run, run again with kills, compare, and say all of it. Returns the exit code.

    It is 1 if the models differ. `seed` chooses the kills; the federation has its own. Raises
    MetisError if a run fails.
    """
    started = time.monotonic()
    times = RoundTimes()
    times.say("first undisturbed")
    undisturbed = up(federation, folder / "undisturbed", times)
    learners = [learner.name for learner in federation.learners]
    chaos = Chaos(moments(seed, federation.rounds, learners), times.median_s)
    chaos.say(f"the same again, with kills (seed {seed}); a round takes {times.median_s:.2f} s")
    disturbed = up(federation, folder / "disturbed", chaos, chaos.on_started)
    kills = [*chaos.outages.items()]
    if chaos.left:
        raise RunFailed(f"the run ended before {', '.join(chaos.left)} could be killed")
    digests = [model_digest(outcome.model) for outcome in (undisturbed, disturbed)]
    same = digests[0] == digests[1] and _same_community_model(undisturbed, disturbed)
    if as_json:
        seconds = time.monotonic() - started
        print(json.dumps(_as_json(seed, undisturbed, disturbed, kills, digests, same, seconds)))
    else:
        print("\n".join(_lines(kills, digests, same)))
    return 0 if same else 1


def model_digest(folder: Path) -> str:
    """SHA-256 over names, types, shapes and bytes of all arrays of `folder`/model.npz."""
    digest = hashlib.sha256()
    with np.load(folder / "model.npz") as arrays:
        for name in sorted(arrays.files):
            array = arrays[name]
            digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def _same_community_model(one: Outcome, other: Outcome) -> bool:
    return one.privacy != "plain" or one.model_digest == other.model_digest


def _as_json(
    seed: int,
    undisturbed: Outcome,
    disturbed: Outcome,
    kills: Sequence[tuple[Moment, Outage]],
    digests: Sequence[str],
    same: bool,
    seconds: float,
) -> dict[str, Any]:
    return {
        "seed": seed,
        "privacy": disturbed.privacy,
        "rounds": disturbed.rounds,
        "kills": [
            {
                "victim": moment.victim,
                "round": moment.round,
                "fraction": round(moment.fraction, 3),
                "missed_s": round(outage.seconds, 3) if outage.over else None,
            }
            for moment, outage in kills
        ],
        "undisturbed_s": round(undisturbed.seconds, 3),
        "disturbed_s": round(disturbed.seconds, 3),
        "accuracy": round(disturbed.metrics["test.accuracy"], 6),
        "undisturbed_digest": digests[0],
        "disturbed_digest": digests[1],
        "same_bits": same,
        "seconds": round(seconds, 3),
    }


def _lines(kills: Sequence[tuple[Moment, Outage]], digests: Sequence[str], same: bool) -> list[str]:
    rows = ["", f"  {'killed':<16} {'round':>7} {'missed for':>11}"]
    for moment, outage in kills:
        missed = f"{outage.seconds:.2f} s" if outage.over else "to the end"
        rows.append(f"  {moment.victim:<16} {moment.round + moment.fraction:>7.2f} {missed:>11}")
    verdict = "the final models have the same bits" if same else "the final models DIFFER"
    return [
        *rows,
        "",
        f"  undisturbed  {digests[0]}",
        f"  disturbed    {digests[1]}",
        "",
        verdict,
    ]
