"""What a trainer is, whatever its framework.

Rule: a task is a pure function of tensors, data, hyperparameters and seed. The same call gives the
same bits in a new process and in one that already ran other tasks; a trainer keeps a model only to
save time, never to remember.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from metisfl.proto.errors import MetisError
from metisfl.proto.tensors import Tensor

__all__ = [
    "Cancelled",
    "EvaluateResult",
    "Hyperparameters",
    "ProgressCall",
    "TaskCancelled",
    "TrainResult",
    "Trainer",
    "derive_seed",
    "examples_of",
]

ProgressCall = Callable[[float, Mapping[str, float]], None]
"""Called with the fraction done (0 to 1) and the metrics so far; cheap, so call it every batch."""

Cancelled = Callable[[], bool]
"""True once the task is not wanted any more; a trainer asks between batches."""


class TaskCancelled(MetisError):
    """The trainer stopped because `cancelled()` was true."""


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """How one training task trains."""

    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 0.0
    """0: the application's own."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """An update: every tensor of the model after training, and what the update weighs."""

    tensors: Sequence[Tensor]
    examples: int
    """Size of the training split, each example counted once however many epochs it was seen."""
    batches: int
    """Optimiser steps taken."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last epoch, such as `loss` and `accuracy`."""


@dataclass(frozen=True, slots=True)
class EvaluateResult:
    """How a model does on this site's held-out data."""

    examples: int
    """Size of the test split."""
    metrics: Mapping[str, float]
    """For both splits, such as `test.loss`, `test.accuracy`, `test.examples`, `validation.loss`."""


class Trainer(Protocol):
    """Trains one application on one site's data. Never called from two threads at once.

    A trainer may also have `examples() -> int`, the size of its training split, cheap to ask
    before any training: the federation scales the weights of its updates by it.
    """

    def initialise(self, seed: int) -> Sequence[Tensor]:
        """The initial model: a pure function of `seed` (0 to 2^63 - 1)."""

    def train(
        self,
        tensors: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        seed: int,
        progress: ProgressCall,
        cancelled: Cancelled,
    ) -> TrainResult:
        """Train from `tensors`. Raises TaskCancelled soon after `cancelled()` became true."""

    def evaluate(
        self, tensors: Sequence[Tensor], progress: ProgressCall, cancelled: Cancelled
    ) -> EvaluateResult:
        """Score `tensors` on the test and validation splits. Raises TaskCancelled like `train`.

        Who scores for longer than the federation's lease and reports no progress is taken for hung.
        """

    def save(self, tensors: Sequence[Tensor], folder: Path) -> None:
        """Write the model to `folder` (which exists) in formats that others can open."""


def examples_of(trainer: Trainer) -> int:
    """The size of the training split; 0 if the trainer does not say."""
    examples = getattr(trainer, "examples", None)
    return examples() if callable(examples) else 0


def derive_seed(run_seed: int, round_number: int, learner: str) -> int:
    """The seed (0 to 2^63 - 1) of one learner's task in one round of a run."""
    text = f"{run_seed}/{round_number}/{learner}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
