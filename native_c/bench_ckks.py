"""`metisfl bench fold --scheme ckks`: what adding ciphertexts costs, in memory, on one thread.

Rule: the sum is checked against whole numbers first. The limits are a plain pass `sum += limb` over
as many unpacked limbs, for one learner after another, and reading the same packed bytes and nothing
else, for all learners in one pass. What the peers do is measured in a process of its own; they are
compared with one learner after another, with both halves of the ciphertexts: the expansion of the
seeds is included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from metisfl import native_c
from metisfl.native_c.bench_turns import in_turns, ratio
from metisfl.native_c.ckks import Context, Fold, block_bytes, open_block, seal_block

__all__ = ["MODULI", "CkksFigures", "measure", "table"]

RING = 2048
MODULI = {
    "compact": 2**32 - 12287,
    "standard": 2**44 - 16383,
    "fine": 2**48 - 16383,
    "wide": 2**52 - 4095,
}
"""The primes that OpenFHE takes for the profiles."""
DIGEST = bytes(range(16))
PEERS = "metisfl.learner.bench_peers"

Limbs = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class CkksFigures:
    """One run. Times are medians, in nanoseconds per parameter and learner."""

    scheme: str
    profile: str
    params: int
    learners: int
    kernel: str
    absorb_ns_per_param: float
    """One learner's blocks after another's, checksums included."""
    absorb_many_ns_per_param: float
    """Block by block, all learners at once."""
    gb_per_s: float
    """10^9 bytes of updates that `absorb_many` takes in a second."""
    add_pass_ns: float
    scan_ns: float
    fraction_of_add_pass: float
    """add pass / absorb. Above 1 when packed limbs save more than unpacking costs."""
    fraction_of_scan: float
    """scan / absorb_many."""
    expand_ns: float
    """What it costs more to absorb both halves, one of them from its seed."""
    openfhe_ns: float | None = None
    """OpenFHE's EvalMult and EvalAdd (depth 1, 53/40 bits, BV, complex)."""
    tenseal_ns: float | None = None
    ratio_openfhe: float | None = None
    """openfhe_ns / (absorb + expand), within one run."""
    ratio_tenseal: float | None = None


class _Updates:
    """Blocks of random limbs, as many as hold the parameters, for each learner."""

    def __init__(self, context: Context, params: int, learners: int) -> None:
        self.context = context
        whole = -(-params // RING)
        step = context.block_ciphertexts
        self.sizes = [min(step, whole - first) for first in range(0, whole, step)]
        self.values = whole * RING
        random = np.random.default_rng(20)
        self.limbs = [
            random.integers(0, context.modulus, (whole, RING), np.uint64) for _ in range(learners)
        ]
        self.blocks = [[self._sealed(limbs, i) for i in range(len(self.sizes))]
                       for limbs in self.limbs]  # fmt: skip

    def _sealed(self, limbs: Limbs, index: int) -> bytearray:
        first = sum(self.sizes[:index])
        block = bytearray(block_bytes(self.context, self.sizes[index], 1, 1))
        seal_block(
            self.context,
            index=index,
            count=len(self.sizes),
            exponents_digest=DIGEST,
            c0=np.ascontiguousarray(limbs[first : first + self.sizes[index]]),
            seed=os.urandom(16),
            out=block,
        )
        return block


def measure(profile: str, params: int, learners: int, *, peers: bool = False) -> CkksFigures:
    """Checks the sum, then times every case, in turns."""
    updates = _Updates(_context(profile), params, learners)
    folds = [Fold(updates.context) for _ in updates.sizes]
    cases = _cases(updates, folds)
    for name in ("absorb", "absorb_many"):
        cases[name]()
        _check(updates, folds)
    turns = in_turns(cases, updates.values * learners)
    times = {name: median(turn[name] for turn in turns) for name in cases}
    found = _peers(learners) if peers else {}
    ours = times["absorb_both"]
    packed_bytes = sum(map(len, updates.blocks[0])) / updates.values
    return CkksFigures(
        scheme="ckks",
        profile=profile,
        params=params,
        learners=learners,
        kernel=native_c.kernel(),
        absorb_ns_per_param=times["absorb"],
        absorb_many_ns_per_param=times["absorb_many"],
        gb_per_s=packed_bytes / times["absorb_many"],
        add_pass_ns=times["add_pass"],
        scan_ns=times["scan"],
        fraction_of_add_pass=ratio(turns, "add_pass", "absorb"),
        fraction_of_scan=ratio(turns, "scan", "absorb_many"),
        expand_ns=median(turn["absorb_both"] - turn["absorb"] for turn in turns),
        openfhe_ns=found.get("openfhe_ns"),
        tenseal_ns=found.get("tenseal_ns"),
        ratio_openfhe=found["openfhe_ns"] / ours if found.get("openfhe_ns") else None,
        ratio_tenseal=found["tenseal_ns"] / ours if found.get("tenseal_ns") else None,
    )


def _context(profile: str) -> Context:
    modulus = MODULI[profile]
    return Context(bytes(16), modulus.bit_length(), RING, modulus)


def _cases(updates: _Updates, folds: list[Fold]) -> dict[str, Callable[[], None]]:
    sums = np.zeros(updates.values, np.uint64)
    weights = [1] * len(updates.blocks)
    together = list(zip(*updates.blocks, strict=True))

    def begin(index: int, polynomials: int = 1) -> Fold:
        fold = folds[index]
        fold.begin(index, len(folds), updates.sizes[index], DIGEST, polynomials)
        return fold

    def absorb(polynomials: int = 1) -> None:
        for index in range(len(folds)):
            begin(index, polynomials)
        for blocks in updates.blocks:
            for fold, block in zip(folds, blocks, strict=True):
                fold.absorb(block)

    def absorb_both() -> None:
        absorb(polynomials=2)

    def absorb_many() -> None:
        for index, blocks in enumerate(together):
            begin(index).absorb_many(blocks, weights)

    def add_pass() -> None:
        for limbs in updates.limbs:
            native_c.bench_limb_pass(sums, limbs.reshape(-1))

    def scan() -> None:
        for blocks in updates.blocks:
            for block in blocks:
                native_c.bench_scan(memoryview(block)[: len(block) // 8 * 8])

    return {case.__name__: case for case in (absorb, absorb_both, absorb_many, add_pass, scan)}


def _check(updates: _Updates, folds: list[Fold]) -> None:
    """The sums are those of whole numbers; the first and the last block stand for all."""
    modulus = updates.context.modulus
    for index in {0, len(folds) - 1}:
        block = bytearray(folds[index].out_bytes)
        folds[index].finalise(block)
        shape = updates.sizes[index], RING
        c0, c1 = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
        open_block(
            updates.context,
            block,
            index=index,
            count=len(folds),
            exponents_digest=DIGEST,
            c0=c0,
            c1=c1,
        )
        first = sum(updates.sizes[:index])
        rows = [limbs[first : first + shape[0]].astype(object) for limbs in updates.limbs]
        if not np.array_equal(c0.astype(object), sum(rows) % modulus):
            raise AssertionError(f"block {index}: the sum is not that of whole numbers")


def _peers(learners: int) -> dict[str, float]:
    print("measuring OpenFHE and TenSEAL", file=sys.stderr)
    command = [sys.executable, "-m", PEERS, "--learners", str(learners)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(answer.stdout)
    return found


def table(figures: CkksFigures) -> str:
    """What people read."""
    rows = [
        ("one learner at a time", figures.absorb_ns_per_param),
        ("all learners at once", figures.absorb_many_ns_per_param),
        ("limit: sum += limb", figures.add_pass_ns),
        ("limit: reading only", figures.scan_ns),
        ("expanding a seed", figures.expand_ns),
        ("OpenFHE", figures.openfhe_ns),
        ("TenSEAL", figures.tenseal_ns),
    ]
    lines = [
        f"fold, ckks, profile {figures.profile}: {figures.params:,} parameters, "
        f"{figures.learners} learners, kernel {figures.kernel}",
        "",
        "  nanoseconds per parameter and learner",
        *(f"    {name:<24}{ns:11.3f}" for name, ns in rows if ns is not None),
        "",
        f"  one at a time: {figures.fraction_of_add_pass:.2f} of its limit; all at once: "
        f"{figures.fraction_of_scan:.2f} of its limit, {figures.gb_per_s:.1f} GB/s of updates",
    ]
    for name, times in (("OpenFHE", figures.ratio_openfhe), ("TenSEAL", figures.ratio_tenseal)):
        if times is not None:
            lines.append(f"  {times:.0f} times as fast as {name}, the expansion included")
    return "\n".join(lines)
