"""What others need for a weighted sum of ciphertexts, for `metisfl bench fold --peers`.

Rule: the peers' own recommended calls, arithmetic alone: nothing is serialised, and keys and
encryption are not in the time. Prints one JSON object: nanoseconds per parameter and learner.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from metisfl.learner.openfhe_door import load_openfhe

PARAMS = 131_072
TURNS = 5


def openfhe_ns(learners: int) -> float:
    """Depth 1, 53/40 bits, BV, complex slots: the leanest recipe that can weight by a float."""
    openfhe = load_openfhe()
    settings = openfhe.CCParamsCKKSRNS()
    settings.SetMultiplicativeDepth(1)
    settings.SetFirstModSize(53)
    settings.SetScalingModSize(40)
    settings.SetSecurityLevel(openfhe.HEStd_128_classic)
    settings.SetKeySwitchTechnique(openfhe.BV)
    settings.SetCKKSDataType(openfhe.COMPLEX)
    context = openfhe.GenCryptoContext(settings)
    for feature in (openfhe.PKE, openfhe.LEVELEDSHE):
        context.Enable(feature)
    pair = context.KeyGen()
    slots = int(context.GetRingDimension()) // 2
    values = np.random.default_rng(0).normal(0, 0.05, (slots, 2)) @ np.array([1, 1j])
    count = -(-PARAMS // (2 * slots))
    plain = context.MakeCKKSPackedPlaintext(values)
    updates = [
        [context.Encrypt(pair.publicKey, plain) for _ in range(count)] for _ in range(learners)
    ]
    weights = [1.0 / learners] * learners

    def fold() -> None:
        for column in zip(*updates, strict=True):
            total: Any = context.EvalMult(column[0], weights[0])
            for ciphertext, weight in zip(column[1:], weights[1:], strict=True):
                total = context.EvalAdd(total, context.EvalMult(ciphertext, weight))

    return _median_ns(fold) / float(count * 2 * slots * learners)


def tenseal_ns(learners: int) -> float | None:
    """Degree 8192, [60, 40, 40, 60] bits, as its tutorials have it; None if it is not installed."""
    try:
        import tenseal
    except ImportError:
        return None
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, -1, [60, 40, 40, 60])
    context.global_scale = 2**40
    values = [random.Random(0).gauss(0, 0.05) for _ in range(4096)]
    count = -(-PARAMS // len(values))
    updates = [
        [tenseal.ckks_vector(context, values) for _ in range(count)] for _ in range(learners)
    ]
    weight = 1.0 / learners

    def fold() -> None:
        for column in zip(*updates, strict=True):
            total: Any = column[0] * weight
            for ciphertext in column[1:]:
                total = total + ciphertext * weight

    return _median_ns(fold) / (count * len(values) * learners)


def _median_ns(work: Callable[[], None]) -> float:
    times = []
    for _ in range(TURNS):
        started_ns = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - started_ns)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m metisfl.learner.bench_peers")
    parser.add_argument("--learners", type=int, default=10)
    options = parser.parse_args()
    found = {"openfhe_ns": openfhe_ns(options.learners), "tenseal_ns": tenseal_ns(options.learners)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
