"""Whole federations under every kind of trouble: the laws of the README hold, seed by seed.

A failure names its seed: `.venv/bin/python -I tests/simulation --first SEED --seeds 1` shows it
again, with `--trace` the whole history.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mutants import FIRST_SEEDS, MUTANTS
from simulated.runner import simulate_block
from simulated.scenario import Scenario
from simulated.world import World

HERE = Path(__file__).parent
SEEDS = 500
BLOCKS = 10
DEFECT_SEEDS = 200
REGRESSIONS = [
    (0, "a learner left before the run began: gone, and not among the absent"),
    (338, "a trimmed log was taken for the end of the run that went on"),
    (4987, "a fold was overtaken by a reopening: no controller could read the log any more"),
    (6318, "a round of a run that was over was opened in the next run"),
]


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_seed_keeps_the_laws(block: int) -> None:
    first = block * SEEDS // BLOCKS
    done = simulate_block(range(first, (block + 1) * SEEDS // BLOCKS))
    assert not done.failure, done.failure
    assert done.rounds > SEEDS // BLOCKS, "hardly any round came about: nothing was tested"


@pytest.mark.parametrize(("seed", "story"), REGRESSIONS)
def test_what_once_failed_holds(seed: int, story: str) -> None:
    done = simulate_block(range(seed, seed + 1))
    assert not done.failure, f"again: {story}\n{done.failure}"


@pytest.mark.parametrize(("mutate", "law"), MUTANTS, ids=[each.__name__ for each, _ in MUTANTS])
def test_a_defect_is_found(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[pytest.MonkeyPatch], None], law: str
) -> None:
    mutate(monkeypatch)
    first = FIRST_SEEDS.get(mutate, 0)
    found = simulate_block(range(first, first + DEFECT_SEEDS)).failure
    assert found, f"{mutate.__name__}: {DEFECT_SEEDS} seeds have not noticed"
    assert law in found.rpartition("\n\n")[2], f"noticed for another reason:\n{found}"


def test_a_seed_has_one_history() -> None:
    """In one process, and in others that hash in another order."""
    seeds = range(3, 7)
    digests = [_digests_here(seeds) for _ in range(2)]
    digests += [_digests_elsewhere(seeds, hash_seed) for hash_seed in ("1", "2")]
    assert all(digest == digests[0] for digest in digests), digests


def test_seeds_differ() -> None:
    assert len(set(_digests_here(range(20, 26)))) == 6


def _digests_here(seeds: range) -> list[str]:
    worlds = [World(Scenario.of(seed)) for seed in seeds]
    for world in worlds:
        world.run()
    return [world.scheduler.digest() for world in worlds]


def _digests_elsewhere(seeds: range, hash_seed: str) -> list[str]:
    told = subprocess.run(
        [
            sys.executable, str(HERE), "--digest",
            "--first", str(seeds.start), "--seeds", str(len(seeds)),
        ],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )  # fmt: skip
    return [line.split()[1] for line in told.stdout.splitlines()]
