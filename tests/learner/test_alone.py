"""What one site reaches alone, judged by the test examples of all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from metisfl.learner.alone import accuracy_alone
from metisfl.learner.trainer import EvaluateResult, Hyperparameters, TrainResult
from metisfl.proto.errors import UserError
from metisfl.proto.tensors import Tensor

# Training gives the site's own number; a model with it is right here for `sizes` of examples.
APP = """
import numpy as np
from metisfl.learner.trainer import EvaluateResult, TrainResult
from metisfl.proto.tensors import Tensor

class Sites:
    def open(self, source):
        self.number = {"a": 1.0, "b": 2.0}[source]

    def initialise(self, seed):
        return [Tensor("w", np.zeros(1), True)]

    def train(self, tensors, hyperparameters, seed, progress, cancelled):
        print("noise on stderr only", file=__import__("sys").stderr)
        return TrainResult([Tensor("w", np.full(1, self.number), True)], 5, hyperparameters.epochs)

    def evaluate(self, tensors, progress, cancelled):
        right = float(tensors[0].array[0] == self.number)
        examples = int(30 * self.number)
        return EvaluateResult(examples, {"test.accuracy": right, "test.examples": examples})

    def save(self, tensors, folder): ...
"""


class Site:
    """Its model is right for `share` of its own examples and for none of others'."""

    def __init__(self, number: int, examples: int, *, metric: str = "test.accuracy") -> None:
        self.number, self.examples, self.metric = number, examples, metric
        self.trained_from: list[float] = []
        self.epochs: list[int] = []

    def initialise(self, seed: int) -> Sequence[Tensor]:
        return [Tensor("w", np.zeros(1), True)]

    def train(
        self,
        tensors: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        seed: int,
        progress: object,
        cancelled: object,
    ) -> TrainResult:
        self.trained_from.append(float(tensors[0].array[0]))
        self.epochs.append(hyperparameters.epochs)
        return TrainResult([Tensor("w", np.full(1, float(self.number)), True)], 1, 1)

    def evaluate(self, tensors: Sequence[Tensor], *_: object) -> EvaluateResult:
        right = float(tensors[0].array[0] == self.number)
        return EvaluateResult(
            self.examples, {self.metric: right, "test.examples": float(self.examples)}
        )

    def save(self, tensors: Sequence[Tensor], folder: Path) -> None: ...


def test_each_model_is_judged_by_the_examples_of_all() -> None:
    sites = {"a": Site(1, 30), "b": Site(2, 60), "c": Site(3, 10)}
    told: list[str] = []
    assert accuracy_alone(sites, Hyperparameters(4), 0, told.append) == {
        "a": 0.3,
        "b": 0.6,
        "c": 0.1,
    }
    assert [line.partition(":")[0] for line in told] == ["a", "b", "c"]
    for site in sites.values():
        assert site.trained_from == [0.0], "each starts from the same initial model"
        assert site.epochs == [4]


def test_a_model_without_accuracy_is_the_users_error() -> None:
    with pytest.raises(UserError, match=r'compile its model with metrics=\["accuracy"\]'):
        accuracy_alone({"a": Site(1, 30, metric="test.loss")}, Hyperparameters(), 0, print)


def alone(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "sites.py").write_text(APP)
    command = [sys.executable, "-I", "-m", "metisfl.learner.alone", "--path", str(folder), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_prints_one_json_object(tmp_path: Path) -> None:
    ran = alone(tmp_path, "--app", "sites:Sites", "--sources", "a", "b", "--epochs", "2")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {"a": pytest.approx(1 / 3), "b": pytest.approx(2 / 3)}
    assert "a: 5 training examples, 2 batches, accuracy 0.333" in ran.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--app", "sites:Sights", "--sources", "a", "--epochs", "1"], "has no 'Sights'"),
        (["--app", "sites:Sites", "--sources", "z", "--epochs", "1"], "KeyError: 'z'"),
        (["--app", "sites:Sites", "--sources", "a", "--epochs", "0"], "must be at least 1"),
    ],
)
def test_a_mistake_is_one_clear_line(tmp_path: Path, more: list[str], words: str) -> None:
    ran = alone(tmp_path, *more)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert words in ran.stderr
