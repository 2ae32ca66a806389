"""What a seed decides before anything happens, and the arithmetic of its models.

Law: training, sealing and folding are pure functions. So the model of a run is known from who
counted in each round, whatever went wrong on the way.
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from metisfl.controller.state import Terms
from metisfl.proto import events_pb2 as pb

__all__ = ["FEDERATION", "Scenario", "folded", "partial", "sealed", "trained"]

FEDERATION: Final = "f"
NAMES: Final = ("ada", "bob", "cyd", "dan", "eve", "fay")
TENSORS: Final = 2


@dataclass(frozen=True)
class Scenario:
    """One federation and the runs that its driver asks for. Times are seconds."""

    seed: int
    faults: bool
    learners: tuple[str, ...]
    runs: tuple[pb.RunStarted, ...]
    asks_in_vain: bool  # for another run while one is under way
    terms: Terms | None
    examples: tuple[int, ...]
    chunks: int  # of an update
    budget: int  # of chunks under way in all uploads
    training_s: float
    snapshot_events: int
    fetch_events: int
    keep_s: float | None  # how old records may become in the broker's log
    faults_until: float
    fault_every_s: float
    crash_chance: float

    @staticmethod
    def of(seed: int, *, faults: bool = True) -> Scenario:
        choose = random.Random(f"scenario {seed}")
        learners = NAMES[: choose.choice((1, 2, 2, 3, 3, 3, 4, 4, 5))]
        encrypted = choose.random() < 0.4
        waits = choose.random() < 0.35
        quorum = choose.randint(1, len(learners))
        if waits and choose.random() < 0.5:
            quorum = len(learners)
        runs = tuple(
            pb.RunStarted(
                run_id=f"r{number}",
                rounds=choose.choice((1, 2, 3, 4)),
                learners=learners,
                quorum=quorum,
                lease_s=choose.choice((2.0, 4.0, 6.0)),
                seed=seed,
                privacy="ckks" if encrypted else "plain",
                hyperparameters=pb.Hyperparameters(epochs=1, batch_size=8),
                waits_for_quorum=waits,
            )
            for number in range(choose.choice((1, 1, 1, 2)))
        )
        joint = encrypted and len(learners) > 1 and _lot("joint", seed) < 0.4
        for run in runs if joint else ():
            run.privacy = "ckks-threshold"
        return Scenario(
            seed=seed,
            faults=faults,
            learners=learners,
            runs=runs,
            asks_in_vain=choose.random() < 0.15,
            terms=Terms(3 * len(NAMES), sites=learners if joint else ()) if encrypted else None,
            examples=tuple(choose.randint(5, 15) for _ in learners),
            chunks=choose.choice((1, 2, 3, 5, 9, 20)),
            budget=choose.choice((2, 5, 64)),
            training_s=choose.choice((0.1, 0.5, 2.0)),
            snapshot_events=choose.choice((1, 4, 10, 30, 512)),
            fetch_events=choose.choice((1, 5, 256, 256)),
            keep_s=choose.choice((None, 1.0, 6.0)),
            faults_until=choose.uniform(2.0, 25.0),
            fault_every_s=choose.choice((0.5, 1.0, 2.0, 5.0)),
            crash_chance=choose.choice((0.0, 0.0, 0.0005, 0.002, 0.005)),
        )

    def examples_of(self, learner: str) -> int:
        return self.examples[self.learners.index(learner)]

    def failure(self, task: pb.TaskAssigned) -> str:
        """Why this task cannot be done at this site; "" for most."""
        lot = _lot("failure", self.seed, task.run_id, task.round, task.kind, task.learner)
        return "the data has gone" if lot < (0.004 if task.kind == pb.OPEN else 0.03) else ""

    def stops(self, run_id: str, round_number: int) -> bool:
        """Whether the driver stops the run while this round is open, or soon after."""
        return _lot("stop", self.seed, run_id, round_number) < 0.08

    def exponents(self, task: pb.TaskAssigned) -> tuple[int, ...]:
        """Those that the update of a task needs, encrypted or not."""
        if self.terms is None:
            return ()
        place = ("exponent", self.seed, task.run_id, task.round, task.learner)
        return tuple(
            0 if (lot := _lot(*place, tensor)) < 0.8 else int(10 * lot) - 7
            for tensor in range(TENSORS)
        )


def trained(task: pb.TaskAssigned) -> bytes:
    """What training gives: of the model, the seed, the site and the hyperparameters alone."""
    given = task.hyperparameters
    return _digest(
        "trained",
        task.model_digest,
        task.kind,
        task.seed,
        task.learner,
        given.epochs,
        given.batch_size,
    )


def sealed(plain: bytes, exponents: Iterable[int]) -> bytes:
    """An encrypted update: of what was trained and the round's exponents."""
    return _digest("sealed", plain, *(tuple(exponents) or (0,) * TENSORS))


def partial(task: pb.TaskAssigned, chance: float) -> bytes:
    """A site's partial of a model: another one whenever it is made."""
    return _digest("partial", task.model_digest, task.learner, chance)


def folded(base: bytes, contributions: Sequence[tuple[str, float, bytes]]) -> bytes:
    """The community model: of its base and, in order, learner, weight and update of each."""
    return _digest("folded", base, *(part for one in contributions for part in one))


def _digest(*parts: bytes | str | int | float) -> bytes:
    hashed = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else repr(part).encode()
        hashed.update(struct.pack("<I", len(data)) + data)
    return hashed.digest()


def _lot(*parts: str | int) -> float:
    """A number in [0, 1) that belongs to these parts."""
    return int.from_bytes(_digest(*parts)[:6], "big") / 2**48
