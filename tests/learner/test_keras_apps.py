"""What an application may look like for Keras, and what is said when it cannot be."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unwatched import UNWATCHED

from metisfl.learner.app import check_data, prepare_environment
from metisfl.learner.trainer import Hyperparameters, TrainResult
from metisfl.proto.errors import UserError
from metisfl.proto.model_file import open_model, write_model

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


def data(x: Callable[[int], object] = lambda rows: np.ones((rows, 6), np.float32)) -> Any:
    """Eight, three and four examples."""
    sizes = (("train", 8), ("validation", 3), ("test", 4))
    pairs = {name: (x(rows), np.arange(rows) % 2) for name, rows in sizes}
    return check_data(pairs, "test")


def trained(trainer: Any, hyperparameters: Hyperparameters) -> TrainResult:
    initial = trainer.initialise(0)
    result: TrainResult = trainer.train(
        initial, hyperparameters, 0, lambda fraction, metrics: None, lambda: False
    )
    return result


class Plain:
    """An app like most: `change` is applied to the model before it is returned."""

    def __init__(self, change: Callable[[Any], Any] = lambda model: model) -> None:
        self._change = change

    def model(self) -> Any:
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1, "sigmoid")])
        model.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
        return self._change(model)


def not_compiled(model: Any) -> Any:
    return keras.Sequential(model.layers)


def other_input(model: Any) -> Any:
    other = keras.Sequential([keras.Input((9,)), keras.layers.Dense(1)])
    other.compile("sgd", "mse")
    return other


def fails(model: Any) -> Any:
    raise KeyError("width")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: None, r"returned a NoneType, no keras\.Model"),
        (not_compiled, r"is not compiled; call model\.compile"),
        (fails, r"the app's model\(\) failed: KeyError: 'width' \(.*test_keras_apps\.py"),
    ],
)
def test_what_is_wrong_with_a_model_is_said(change: Callable[[Any], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        KerasTrainer(Plain(change), data())


def test_a_model_that_does_not_fit_the_data_is_the_apps_error() -> None:
    trainer = KerasTrainer(Plain(other_input), data())
    with pytest.raises(UserError, match="the model could not train on its data: ValueError"):
        trained(trainer, Hyperparameters())


def test_a_schedule_does_not_let_the_learning_rate_be_set() -> None:
    def scheduled(model: Any) -> Any:
        schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
        model.compile(keras.optimizers.SGD(schedule), "mse")
        return model

    trainer = KerasTrainer(Plain(scheduled), data())
    trained(trainer, Hyperparameters())
    with pytest.raises(UserError, match="does not let its learning rate be set: TypeError"):
        trained(trainer, Hyperparameters(learning_rate=0.1))


def test_several_inputs_and_an_unbuilt_model() -> None:
    """A functional model with a dict of inputs, and a Sequential without an Input."""

    class Two:
        def model(self) -> Any:
            a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
            joined = keras.layers.Concatenate()([a, b])
            model = keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(joined))
            model.compile("sgd", "mse")
            return model

    class Unbuilt:
        def model(self) -> Any:
            model = keras.Sequential([keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            return model

    two = KerasTrainer(Two(), data(lambda n: {"a": np.ones((n, 2)), "b": np.ones((n, 3))}))
    unbuilt = KerasTrainer(Unbuilt(), data(lambda n: np.ones((n, 5))))
    for trainer in (two, unbuilt):
        result = trained(trainer, Hyperparameters(1, 4))
        assert result.tensors[0].array.shape == (5, 1)
        assert result.batches == 2
        assert trainer.evaluate(result.tensors, *UNWATCHED).examples == 4


def test_names_do_not_depend_on_what_was_built_before() -> None:
    for _ in range(2):
        names = [t.name for t in KerasTrainer(Plain(), data()).initialise(0)]
        assert names == ["dense/kernel", "dense/bias"]


def test_weights_of_one_path_get_names_of_their_own() -> None:
    def twice(model: Any) -> Any:
        first, second = keras.layers.Dense(2, name="same"), keras.layers.Dense(1, name="other")
        model = keras.Sequential([keras.Input((6,)), first, second])
        second.name = "same"
        for weight in second.weights:
            weight._path = weight.path.replace("other", "same")
        model.compile("sgd", "mse")
        return model

    names = [t.name for t in KerasTrainer(Plain(twice), data()).initialise(0)]
    assert names == ["same/kernel", "same/bias", "same/kernel#2", "same/bias#2"]


def test_bfloat16_weights_travel(tmp_path: Path) -> None:
    def half(model: Any) -> Any:
        dense = keras.layers.Dense(1, "sigmoid", dtype="bfloat16")
        model = keras.Sequential([keras.Input((6,)), dense])
        model.compile("sgd", "binary_crossentropy")
        return model

    trainer = KerasTrainer(Plain(half), data())
    initial = trainer.initialise(0)
    result = trained(trainer, Hyperparameters(3, 4, 0.5))
    assert [tensor.dtype_name for tensor in result.tensors] == ["bfloat16", "bfloat16"]
    assert result.tensors[0].array.tobytes() != initial[0].array.tobytes()
    write_model(tmp_path / "model", result.tensors)
    with open_model(tmp_path / "model") as model:
        trainer.save(model.tensors(), tmp_path)
    with np.load(tmp_path / "model.npz") as arrays:
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_the_saved_model_opens_without_us(tmp_path: Path) -> None:
    trainer = KerasTrainer(Plain(), data())
    tensors = trainer.initialise(4)
    trainer.save(tensors, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.keras", "model.npz"]
    with np.load(tmp_path / "model.npz") as arrays:
        assert set(arrays) == {t.name for t in tensors}
        for tensor in tensors:
            np.testing.assert_array_equal(arrays[tensor.name], tensor.array)
    assert zipfile.is_zipfile(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    x, y = data()["test"].x, data()["test"].y
    scored = model.evaluate(x, y, verbose=0, return_dict=True)
    ours = trainer.evaluate(tensors, *UNWATCHED).metrics
    assert scored["accuracy"] == pytest.approx(ours["test.accuracy"])
