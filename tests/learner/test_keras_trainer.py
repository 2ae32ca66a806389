"""A training task is a pure function; TensorFlow is imported once for the whole file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from metisfl.learner.app import Split, check_data, prepare_environment
from metisfl.learner.trainer import Hyperparameters, TaskCancelled, TrainResult, derive_seed
from metisfl.proto.errors import UserError
from metisfl.proto.tensors import Tensor, manifest_of

keras: Any = None
KerasTrainer: Any = None

# Keras hands TensorFlow's variables to numpy, which wants a keyword that they do not know yet.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module", autouse=True)
def _framework() -> None:
    global keras, KerasTrainer
    prepare_environment()  # TensorFlow reads it when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's import uses what Python deprecates
        import keras as framework

        from metisfl.learner.keras_trainer import KerasTrainer as trainer
    keras, KerasTrainer = framework, trainer


def ignore(fraction: float, metrics: Mapping[str, float]) -> None:
    pass


def never() -> bool:
    return False


def examples(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 6)).astype(np.float32)
    return x, (x[:, 0] + x[:, 1] > 0).astype(np.float32)


def data() -> dict[str, Split]:
    pairs = {"train": examples(50, 1), "validation": examples(11, 2), "test": examples(17, 3)}
    return check_data(pairs, "test")


class Stateful:
    """A model with every kind of state that could survive a task."""

    def model(self) -> Any:
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8, activation="relu"),
                layers.Dropout(0.5),
                layers.BatchNormalization(),
                Noise(),
                layers.GaussianNoise(0.1),
                layers.Dense(1, activation="sigmoid"),
            ]
        )
        model.compile(
            keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy", "auc"]
        )
        return model


def Noise() -> Any:
    """A layer that draws from Keras's shared generator and counts its calls."""

    class NoiseLayer(keras.layers.Layer):  # type: ignore[misc, name-defined]
        def build(self, shape: object) -> None:
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x: Any, training: bool = False) -> Any:
            self.calls.assign_add(1.0)
            return x + 0.1 * keras.random.normal(keras.ops.shape(x)) if training else x

    return NoiseLayer()


def bits(tensors: Any) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.name} {tensor.array.dtype} {tensor.array.shape}".encode())
        digest.update(tensor.array.tobytes())
    return digest.hexdigest()


def one_task(trainer: Any) -> str:
    initial = trainer.initialise(11)
    result = trainer.train(initial, Hyperparameters(2, 16, 0.02), 5, ignore, never)
    return f"{bits(initial)} {bits(result.tensors)} {sorted(result.metrics.items())}"


@pytest.fixture(scope="module")
def trainer(_framework: None) -> Any:
    return KerasTrainer(Stateful(), data())


def test_a_task_gives_the_same_bits_whatever_ran_before(trainer: Any) -> None:
    first = one_task(trainer)
    other = trainer.initialise(12)
    trainer.train(other, Hyperparameters(3, 7, 0.5), 6, ignore, never)
    trainer.evaluate(other, ignore, never)
    assert one_task(trainer) == first, "after another task in the same trainer"
    assert one_task(KerasTrainer(Stateful(), data())) == first, "in a second trainer"
    assert one_task(trainer) == first, "in the first one, after a second one was made"


def test_a_task_gives_the_same_bits_in_a_new_process_with_one_core(trainer: Any) -> None:
    script = f"""
import importlib.util, os
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})
spec = importlib.util.spec_from_file_location("there", {__file__!r})
there = importlib.util.module_from_spec(spec)
spec.loader.exec_module(there)
from metisfl.learner.keras_trainer import KerasTrainer, keras
there.keras = keras
print(there.one_task(KerasTrainer(there.Stateful(), there.data())))
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    fresh = subprocess.run(
        [sys.executable, "-I", "-c", script], stdout=subprocess.PIPE, check=True, text=True, env=own
    )
    assert fresh.stdout.strip() == one_task(trainer)


def test_the_seed_decides_the_initial_model_and_the_training(trainer: Any) -> None:
    assert bits(trainer.initialise(1)) == bits(trainer.initialise(1))
    assert bits(trainer.initialise(1)) != bits(trainer.initialise(2))
    initial = trainer.initialise(1)
    trained = [
        bits(trainer.train(initial, Hyperparameters(), seed, ignore, never).tensors)
        for seed in (1, 1, 2, derive_seed(1, 2, "l1"))
    ]
    assert trained[0] == trained[1]
    assert len(set(trained)) == 3


def test_a_learning_rate_that_was_set_does_not_stay(trainer: Any) -> None:
    initial = trainer.initialise(1)
    own = bits(trainer.train(initial, Hyperparameters(), 1, ignore, never).tensors)
    faster = Hyperparameters(learning_rate=0.5)
    assert bits(trainer.train(initial, faster, 1, ignore, never).tensors) != own
    assert bits(trainer.train(initial, Hyperparameters(), 1, ignore, never).tensors) == own


def test_all_weights_are_tensors_with_names_of_their_layers(trainer: Any) -> None:
    tensors = trainer.initialise(0)
    assert [(t.name, t.array.shape, t.trainable) for t in tensors] == [
        ("dense/kernel", (6, 8), True),
        ("dense/bias", (8,), True),
        ("batch_normalization/gamma", (8,), True),
        ("batch_normalization/beta", (8,), True),
        ("batch_normalization/moving_mean", (8,), False),
        ("batch_normalization/moving_variance", (8,), False),
        ("noise_layer/variable", (), False),
        ("dense_1/kernel", (8, 1), True),
        ("dense_1/bias", (1,), True),
    ]
    assert {t.array.dtype.name for t in tensors} == {"float32"}
    assert all(isinstance(t.array, np.ndarray) for t in tensors)
    manifest_of(tensors)


def test_training_reports_and_counts(trainer: Any) -> None:
    told: list[float] = []
    result: TrainResult = trainer.train(
        trainer.initialise(0),
        Hyperparameters(2, 16),
        0,
        lambda fraction, metrics: told.append(fraction),
        never,
    )
    assert told == [index / 8 for index in range(1, 9)], "50 examples are 4 batches of 16"
    assert (result.examples, result.batches) == (50, 8)
    assert trainer.examples() == 50
    assert set(result.metrics) == {"loss", "accuracy", "auc"}


def test_training_learns(trainer: Any) -> None:
    initial = trainer.initialise(0)
    trained = trainer.train(initial, Hyperparameters(60, 16, 0.01), 0, ignore, never)
    before, after = (
        trainer.evaluate(initial, ignore, never).metrics,
        trainer.evaluate(trained.tensors, ignore, never).metrics,
    )
    assert after["test.loss"] < before["test.loss"]
    assert after["test.accuracy"] > 0.7


def test_evaluation_is_that_of_keras_on_the_whole_split(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a split takes several batches, of which the last is smaller."""
    tensors = trainer.initialise(3)
    whole = trainer.evaluate(tensors, ignore, never)
    test = data()["test"]
    model = trainer._model
    expected = model.evaluate(test.x, test.y, verbose=0, return_dict=True)
    monkeypatch.setattr("metisfl.learner.keras_trainer.EVALUATION_BATCH", 5)
    parts = trainer.evaluate(tensors, ignore, never)
    assert whole.examples == 17
    assert whole.metrics["test.examples"] == 17
    assert whole.metrics["validation.examples"] == 11
    for name, value in expected.items():
        assert whole.metrics[f"test.{name}"] == pytest.approx(value, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


def test_evaluation_changes_nothing(trainer: Any) -> None:
    tensors = trainer.initialise(3)
    before = bits(tensors)
    first = trainer.evaluate(tensors, ignore, never)
    assert trainer.evaluate(tensors, ignore, never) == first
    assert bits(tensors) == before


def test_a_cancelled_task_stops_between_batches(trainer: Any) -> None:
    told: list[float] = []
    with pytest.raises(TaskCancelled):
        trainer.train(
            trainer.initialise(0),
            Hyperparameters(5, 10),
            0,
            lambda fraction, metrics: told.append(fraction),
            lambda: len(told) == 3,
        )
    assert len(told) == 3


def test_evaluation_says_how_far_it_is_and_can_be_cancelled(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metisfl.learner.keras_trainer.EVALUATION_BATCH", 5)
    tensors, told = trainer.initialise(0), []
    trainer.evaluate(tensors, lambda fraction, metrics: told.append(fraction), never)
    assert told == sorted(told)
    assert told[-1] == 1.0
    del told[3:]
    with pytest.raises(TaskCancelled):
        trainer.evaluate(tensors, ignore, lambda: True)


def test_a_model_of_another_form_is_refused(trainer: Any) -> None:
    tensors = trainer.initialise(0)
    tensors[0] = Tensor("dense/kernel", np.zeros((7, 8), np.float32), True)
    with pytest.raises(UserError, match=r"\(6, 8\) here and \(7, 8\) in the federation"):
        trainer.evaluate(tensors, ignore, never)


def test_a_loss_that_is_not_finite_names_the_epoch(trainer: Any) -> None:
    tensors = trainer.initialise(0)
    poisoned = [
        Tensor(t.name, np.full_like(t.array, np.inf), t.trainable) if t.trainable else t
        for t in tensors
    ]
    with pytest.raises(UserError, match=r"the loss is nan in epoch 1 of 3; lower the learning"):
        trainer.train(poisoned, Hyperparameters(3), 0, ignore, never)


def test_a_weight_that_is_not_finite_is_named(trainer: Any) -> None:
    """A running mean may overflow while the loss is still fine."""
    tensors = trainer.initialise(0)
    index = next(i for i, t in enumerate(tensors) if t.name.endswith("variable"))
    tensors[index] = Tensor(tensors[index].name, np.array(np.inf, np.float32), False)
    with pytest.raises(UserError, match="tensor 'noise_layer/variable' has NaN or infinity"):
        trainer.train(tensors, Hyperparameters(), 0, ignore, never)
