"""`metisfl bench fold`: what a fold costs here, next to the memory's limit and to the alternatives.

Rule: if one bit of the sum differs from NumPy's, there is nothing to measure. How it is measured is
in bench_turns.py; the encrypted scheme is in bench_ckks.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from metisfl import native_c
from metisfl.native_c import bench_ckks
from metisfl.native_c.bench_turns import in_turns, ratio

__all__ = ["FoldFigures", "command", "measure"]

SCHEMES = ("plain", "ckks")
PARAMS_MAX = 2**32
LEARNERS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class FoldFigures:
    """One run. Times are medians, in nanoseconds per parameter and learner."""

    scheme: str
    params: int
    learners: int
    kernel: str
    absorb_ns_per_param: float
    """One learner's whole vector after another's."""
    absorb_many_ns_per_param: float
    """All learners in one pass over the sums."""
    gb_per_s: float
    """10^9 bytes of updates that `absorb` takes in a second."""
    add_pass_ns: float
    """A C loop `sum += value` over the same sums and updates: the limit of `absorb`."""
    scan_ns: float
    """A C loop that reads the same updates and nothing else: the limit of `absorb_many`."""
    fraction_of_add_pass: float
    """add pass / absorb. Above 1 when the kernel streams better than the plain loop."""
    fraction_of_scan: float
    """scan / absorb_many, likewise."""
    numpy_ns: float
    """NumPy's weighted sum in float64, with scratch space allocated beforehand."""


class NumpySum:
    """The same weighted sum as NumPy does it: multiply into scratch space, add."""

    def __init__(self, updates: list[NDArray[np.float32]], weights: list[float]) -> None:
        self._updates = updates
        self._weights = weights
        self._scratch = np.empty(len(updates[0]))
        self.sums = np.zeros(len(updates[0]))

    def run(self) -> None:
        for update, weight in zip(self._updates, self._weights, strict=True):
            np.multiply(update, weight, out=self._scratch, dtype=np.float64)
            np.add(self.sums, self._scratch, out=self.sums)


def command(argv: list[str]) -> int:
    """Runs the benchmark that `argv` asks for; prints a table, or with --json one object."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench fold",
        description="Measure the weighted sum of updates next to the limits of this machine.",
    )
    parser.add_argument("--scheme", choices=SCHEMES, default="plain", help="the privacy mode")
    parser.add_argument(
        "--params",
        type=_whole(PARAMS_MAX),
        default=10_000_000,
        metavar="N",
        help="parameters of the model",
    )
    parser.add_argument(
        "--learners", type=_whole(LEARNERS_MAX), default=10, metavar="N", help="updates to fold"
    )
    parser.add_argument(
        "--profile",
        choices=list(bench_ckks.MODULI),
        default="standard",
        help="the size of limbs, with --scheme ckks (default: standard)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="with --scheme ckks: also OpenFHE's own sum and, where installed, TenSEAL's",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)

    # Float32 updates; four float64 arrays: the sums, NumPy's sums, its scratch space, a copy.
    # Encrypted, a value is up to 6.5 bytes of an update and three arrays of whole limbs.
    value_bytes = 7 if options.scheme == "ckks" else 4
    needed_gib = options.params * (value_bytes * options.learners + 8 * 4) / 2**30
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if needed_gib > 0.8 * memory_gib:
        parser.error(
            f"this needs {needed_gib:.1f} GiB of memory, allowed are {0.8 * memory_gib:.1f} GiB, "
            "80 % of this machine's: lower --params or --learners"
        )
    if options.scheme == "ckks":
        encrypted = bench_ckks.measure(
            options.profile, options.params, options.learners, peers=options.peers
        )
        print(json.dumps(asdict(encrypted)) if options.json else bench_ckks.table(encrypted))
        return 0
    figures = measure(options.params, options.learners)
    print(json.dumps(asdict(figures)) if options.json else _table(figures))
    return 0


def measure(params: int, learners: int) -> FoldFigures:
    """Checks the sums against NumPy's, then times every case, in turns."""
    generator = np.random.default_rng(20)
    updates = [generator.random(params, dtype=np.float32) for _ in range(learners)]
    weights: list[float] = generator.uniform(1.0, 1000.0, learners).tolist()
    by_numpy = NumpySum(updates, weights)
    with native_c.Accumulator(capacity=params) as accumulator:
        cases = _cases(accumulator, updates, weights) | {"numpy": by_numpy.run}
        by_numpy.run()
        _check_bits(accumulator, [cases["absorb"], cases["absorb_many"]], by_numpy.sums)
        turns = in_turns(cases, params * learners)
    times = {name: median(turn[name] for turn in turns) for name in cases}
    return FoldFigures(
        scheme="plain",
        params=params,
        learners=learners,
        kernel=native_c.kernel(),
        absorb_ns_per_param=times["absorb"],
        absorb_many_ns_per_param=times["absorb_many"],
        gb_per_s=updates[0].itemsize / times["absorb"],
        add_pass_ns=times["add_pass"],
        scan_ns=times["scan"],
        fraction_of_add_pass=ratio(turns, "add_pass", "absorb"),
        fraction_of_scan=ratio(turns, "scan", "absorb_many"),
        numpy_ns=times["numpy"],
    )


def _cases(
    accumulator: native_c.Accumulator, updates: list[NDArray[np.float32]], weights: list[float]
) -> dict[str, Callable[[], None]]:
    def absorb() -> None:
        for update, weight in zip(updates, weights, strict=True):
            accumulator.absorb(update, "float32", weight)

    def absorb_many() -> None:
        accumulator.absorb_many(updates, "float32", weights)

    def add_pass() -> None:
        for update in updates:
            native_c.bench_add_pass(accumulator, update)

    def scan() -> None:
        for update in updates:
            native_c.bench_scan(update[: update.size // 2 * 2])  # eight bytes at a time

    return {case.__name__: case for case in (absorb, absorb_many, add_pass, scan)}


def _check_bits(
    accumulator: native_c.Accumulator,
    folds: list[Callable[[], None]],
    expected: NDArray[np.float64],
) -> None:
    sums = np.empty_like(expected)
    for fold in folds:
        accumulator.begin(expected.size)
        fold()
        accumulator.finalise("float64", sums, 1.0)
        if not np.array_equal(sums.view(np.uint64), expected.view(np.uint64)):
            raise AssertionError(f"{fold.__name__} and NumPy disagree on the sum")


def _whole(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number, 1 to {most:,}")
        return int(text)

    return parse


def _table(figures: FoldFigures) -> str:
    rows = [
        ("one learner at a time", figures.absorb_ns_per_param),
        ("all learners in one pass", figures.absorb_many_ns_per_param),
        ("limit: sum += value", figures.add_pass_ns),
        ("limit: reading only", figures.scan_ns),
        ("NumPy", figures.numpy_ns),
    ]
    return "\n".join(
        [
            f"fold, {figures.scheme}, float32: {figures.params:,} parameters, "
            f"{figures.learners:,} learners, kernel {figures.kernel}",
            "",
            "  nanoseconds per parameter and learner",
            *(f"    {name:<26}{time_ns:9.3f}" for name, time_ns in rows),
            "",
            f"  one at a time: {figures.gb_per_s:.1f} GB/s of updates, "
            f"{figures.fraction_of_add_pass:.2f} of its limit, "
            f"{figures.numpy_ns / figures.absorb_ns_per_param:.1f} times as fast as NumPy",
            f"  in one pass: {figures.fraction_of_scan:.2f} of its limit",
        ]
    )
