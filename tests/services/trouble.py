"""Applications for tests: honest ones, and one for each way in which a site can go wrong.

`source` says what this site does: "honest", or the name of a trouble.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metisfl.learner.trainer import EvaluateResult, TrainResult
from metisfl.proto.tensors import Tensor

VALUES = 5_000
SLOW_S = 6.0


class Site:
    """Adds its number of examples to every value, so that the mean can be told in advance."""

    def open(self, source: str) -> None:
        self.trouble, _, number = source.partition(" ")
        self.count = int(number or 1)
        if self.trouble == "broken":
            raise FileNotFoundError("patients.csv")

    def examples(self) -> int:
        return self.count

    def initialise(self, seed: int) -> Sequence[Tensor]:
        values = VALUES + 1 if self.trouble == "shape" else VALUES
        if self.trouble == "secret":  # weights that can be searched for
            return [Tensor("w", self._luck(seed).normal(0, 0.1, values).astype(np.float32), True)]
        return [Tensor("w", np.zeros(values, np.float32), True)]

    def _luck(self, seed: int) -> np.random.Generator:
        return np.random.default_rng(seed)

    def train(self, tensors, hyperparameters, seed, progress, cancelled) -> TrainResult:  # type: ignore[no-untyped-def]
        (w,) = tensors
        if self.trouble == "raises":
            raise ZeroDivisionError("no rows left after filtering")
        if self.trouble == "crash":
            os.kill(os.getpid(), 11)
        while self.trouble == "hangs":
            time.sleep(0.01)
        slow_until = time.monotonic() + SLOW_S
        while self.trouble == "slow" and time.monotonic() < slow_until:
            progress(0.5, {})
            time.sleep(0.01)
        value = np.nan if self.trouble == "nan" else np.float32(self.count)
        if self.trouble == "secret":
            value = self._luck(seed).normal(0, 0.1, w.array.size).astype(np.float32)
        return TrainResult([Tensor("w", w.array + value, True)], self.count, 1, {"loss": 0.5})

    def evaluate(self, tensors, progress, cancelled) -> EvaluateResult:  # type: ignore[no-untyped-def]
        (w,) = tensors
        mean = float(w.array.mean(dtype=np.float64))
        return EvaluateResult(1, {"test.mean": mean, "test.examples": 1.0})

    def save(self, tensors, folder: Path) -> None:  # type: ignore[no-untyped-def]
        (w,) = tensors
        np.savez(folder / "model.npz", w=w.array)
