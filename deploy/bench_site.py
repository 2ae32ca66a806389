"""What the sites of `metisfl bench recovery` train: quick to load, and busy for as long as told.

Rule: a task is a pure function of model, seed and site, as in any application, so that a task that
was done again shows in no bit. Its time is waited for, not computed: what is measured is recovery,
not two busy processors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from metisfl.proto.errors import UserError
from metisfl.proto.tensors import Tensor

__all__ = ["PARAMETERS", "Site"]

PARAMETERS: Final = 20_000
STEPS: Final = 20
EXAMPLES: Final = 32


class Trained(NamedTuple):
    """What a trainer returns (`metisfl.learner.trainer.TrainResult` has the same fields)."""

    tensors: Sequence[Tensor]
    examples: int
    batches: int
    metrics: Mapping[str, float]


class Scored(NamedTuple):
    """`metisfl.learner.trainer.EvaluateResult`, likewise."""

    examples: int
    metrics: Mapping[str, float]


class Site:
    """A model of one float32 vector, moved by luck that the seed decides."""

    def __init__(self) -> None:
        self._training_s = 0.0

    def open(self, source: str) -> None:
        """`source` is how long training takes, in seconds. Raises UserError for anything else."""
        try:
            self._training_s = float(source)
        except ValueError:
            raise UserError(f"data {source!r}: how long training takes, in seconds") from None

    def examples(self) -> int:
        return EXAMPLES

    def initialise(self, seed: int) -> Sequence[Tensor]:
        start = np.random.default_rng(seed).normal(0, 0.1, PARAMETERS).astype(np.float32)
        return [Tensor("vector", start, trainable=True)]

    def train(
        self,
        tensors: Sequence[Tensor],
        hyperparameters: object,
        seed: int,
        progress: Callable[[float, Mapping[str, float]], None],
        cancelled: Callable[[], bool],
    ) -> Trained:
        """A cancelled task ends early; its result is for nobody."""
        (vector,) = tensors
        luck, values = np.random.default_rng(seed), vector.array.copy()
        for step in range(STEPS):
            progress(step / STEPS, {})
            if cancelled():
                break
            time.sleep(self._training_s / STEPS)
            values += luck.normal(0, 0.01, PARAMETERS).astype(np.float32)
        return Trained([Tensor("vector", values, trainable=True)], EXAMPLES, STEPS, {})

    def evaluate(self, tensors: Sequence[Tensor], progress: object, cancelled: object) -> Scored:
        (vector,) = tensors
        mean = float(vector.array.mean(dtype=np.float64))
        return Scored(EXAMPLES, {"test.mean": mean, "test.examples": float(EXAMPLES)})

    def save(self, tensors: Sequence[Tensor], folder: Path) -> None:
        (vector,) = tensors
        arrays: dict[str, Any] = {"vector": vector.array}
        np.savez(folder / "model.npz", **arrays)
