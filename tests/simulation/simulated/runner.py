"""Many seeds in several processes, until one of them breaks a law."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from simulated.scenario import Scenario
from simulated.scheduler import Broken
from simulated.world import World, compare_with_twin

__all__ = ["main"]

BLOCK_SEEDS: Final = 10
LINES_SHOWN: Final = 40
TELL_S: Final = 2.0
TWIN_EVERY: Final = 10  # seeds: one is compared with its fault-free twin


@dataclass(frozen=True)
class Block:
    """What became of some seeds."""

    seeds: int = 0
    rounds: int = 0
    virtual_s: float = 0.0
    failure: str = ""


def simulate_block(seeds: range) -> Block:
    """One process's share. Ends with the first failure."""
    gc.disable()  # a world is full of circles, and so is the next: all of them go in the end
    try:
        return _simulate(seeds)
    finally:
        gc.enable()
        gc.collect()


def _simulate(seeds: range) -> Block:
    done = rounds = 0
    virtual_s = 0.0
    for seed in seeds:
        world = World(Scenario.of(seed))
        try:
            history = world.run()
            if seed % TWIN_EVERY == 0:
                compare_with_twin(history)
        except Exception as error:
            return Block(done, rounds, virtual_s, _story(seed, world, error))
        done, rounds = done + 1, rounds + history.rounds
        virtual_s += history.virtual_s
    return Block(done, rounds, virtual_s)


def _story(seed: int, world: World, error: Exception) -> str:
    lines = world.scheduler.lines(LINES_SHOWN)
    if isinstance(error, Broken):
        what = f"seed {seed} breaks {error}"
    else:
        trace = "".join(traceback.format_exception(error)[-3:])
        what = f"seed {seed}: {type(error).__name__}: {error}\n{trace}"
    return "\n".join([*lines, "", what])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a law was broken."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, metavar="N", help="how many (1000)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="the first (0)")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, metavar="P", help="side by side"
    )
    parser.add_argument("--trace", action="store_true", help="print the history of the first seed")
    parser.add_argument("--digest", action="store_true", help="print a digest of each history")
    options = parser.parse_args(arguments)
    if options.trace or options.digest:
        return _tell_histories(options)
    began, told = time.monotonic(), 0.0
    seeds = rounds = 0
    virtual_s = 0.0
    for block in _blocks(options):
        seeds, rounds = seeds + block.seeds, rounds + block.rounds
        virtual_s += block.virtual_s
        took_s = time.monotonic() - began
        if block.failure or seeds == options.seeds or took_s - told >= TELL_S:
            told = took_s
            print(
                f"{seeds} of {options.seeds} seeds, {rounds} rounds "
                f"({rounds / took_s * 60:.0f} a minute), {virtual_s / 3600:.1f} hours in "
                f"{took_s:.0f} s",
                flush=True,
            )
        if block.failure:
            print(block.failure, flush=True)
            return 1
    return 0


def _blocks(options: argparse.Namespace) -> Iterator[Block]:
    last = options.first + options.seeds
    starts = range(options.first, last, BLOCK_SEEDS)
    shares = [range(start, min(start + BLOCK_SEEDS, last)) for start in starts]
    if options.processes <= 1:
        yield from map(simulate_block, shares)
        return
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        yield from pool.imap_unordered(simulate_block, shares)


def _tell_histories(options: argparse.Namespace) -> int:
    """For people, and for the test that one seed has one history."""
    for seed in range(options.first, options.first + options.seeds):
        world = World(Scenario.of(seed))
        failure = ""
        try:
            world.run()
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        if options.trace:
            print("\n".join(world.scheduler.lines()))
        print(seed, world.scheduler.digest(), failure)
        if options.trace:
            break
    return 0
