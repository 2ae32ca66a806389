"""A trainer that returns at once: what remains of a round is the system's own time.

Rule: no framework, no data, no randomness. `source` is the number of parameters; training adds one
to each, so the mean of any number of updates is known in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metisfl.learner.trainer import (
    Cancelled,
    EvaluateResult,
    Hyperparameters,
    ProgressCall,
    TrainResult,
)
from metisfl.proto.errors import UserError
from metisfl.proto.tensors import Tensor

__all__ = ["Instant"]

PARAMETERS_MAX = 1 << 32


class Instant:
    """A model of one float32 vector."""

    def __init__(self) -> None:
        self._parameters = 0

    def open(self, source: str) -> None:
        """Raises UserError unless `source` is a number of parameters, 1 to 2^32."""
        if not (source.isascii() and source.isdigit() and 1 <= int(source) <= PARAMETERS_MAX):
            raise UserError(f"data {source!r}: a number of parameters, 1 to {PARAMETERS_MAX}")
        self._parameters = int(source)

    def examples(self) -> int:
        return 1

    def initialise(self, seed: int) -> Sequence[Tensor]:
        return [Tensor("vector", np.zeros(self._parameters, np.float32), trainable=True)]

    def train(
        self,
        tensors: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        seed: int,
        progress: ProgressCall,
        cancelled: Cancelled,
    ) -> TrainResult:
        (vector,) = tensors
        trained = Tensor("vector", vector.array + np.float32(1), trainable=True)
        return TrainResult([trained], examples=1, batches=1)

    def evaluate(
        self, tensors: Sequence[Tensor], progress: ProgressCall, cancelled: Cancelled
    ) -> EvaluateResult:
        (vector,) = tensors
        mean = float(vector.array.mean(dtype=np.float64))
        return EvaluateResult(examples=1, metrics={"test.mean": mean, "test.examples": 1.0})

    def save(self, tensors: Sequence[Tensor], folder: Path) -> None:
        (vector,) = tensors
        np.savez(folder / "model.npz", vector=vector.array)
