"""Trains a Keras application; the only file that imports keras and tensorflow.

Rule: nothing that a task leaves behind reaches the next one. The model and its compiled functions
are kept, because building them takes longer than a small task; every state in them (optimiser,
seed generators, metrics, layers' own) is set back to what it was when the model was new.

Randomness must come from Keras (layers, `keras.random`), `numpy.random` or `random`. What
`tf.random` draws has state inside compiled functions; TensorFlow refuses it here, since no global
seed is set.
"""

from __future__ import annotations

import hashlib
import os
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from metisfl.learner.app import Features, KerasApp, Split, app_code, prepare_environment
from metisfl.learner.trainer import (
    Cancelled,
    EvaluateResult,
    Hyperparameters,
    ProgressCall,
    TaskCancelled,
    TrainResult,
)
from metisfl.proto.errors import UserError
from metisfl.proto.tensors import Array, Tensor, compare_manifests, manifest_of

prepare_environment()

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras.src.random.seed_generator import global_seed_generator  # noqa: E402

__all__ = ["KerasTrainer"]

EVALUATION_BATCH: Final = 1024

tf.get_logger().setLevel("ERROR")  # it warns that a smaller last batch is compiled by itself


class KerasTrainer:
    """A Trainer (see trainer.py) for an app with model() and data().

    Raises UserError for what is wrong with the app: a model that is not compiled, shapes that do
    not fit, a loss or a weight that is not finite.
    """

    def __init__(self, app: KerasApp, data: Mapping[str, Split]) -> None:
        tf.config.experimental.enable_op_determinism()
        self._app = app
        self._data = data
        # The counters behind names such as dense_1 start anew: names do not depend on the past.
        keras.utils.clear_session(free_memory=False)
        self._seed_states: dict[int, Any] = {}
        self._seed_everything(0)
        self._model = self._build()
        self._names = _names_of(self._model)
        self._manifest = manifest_of(self._tensors())
        optimizer = self._model.optimizer
        optimizer.build(self._model.trainable_variables)
        weights = {id(weight) for weight in self._model.weights}
        own = [each for each in self._model.variables if id(each) not in weights]
        for variable in own:
            if variable.path.endswith("seed_generator_state"):
                self._seed_states[id(variable)] = variable
        self._initial = [
            (variable, _compact(variable))
            for variable in (*optimizer.variables, *own)
            if id(variable) not in self._seed_states
        ]

    def examples(self) -> int:
        """See Trainer."""
        return self._data["train"].examples

    def initialise(self, seed: int) -> list[Tensor]:
        """See Trainer. Builds a second model, since initialisers draw only when one is built."""
        self._seed_everything(seed)
        return [
            Tensor(name, _values(weight), bool(weight.trainable))
            for name, weight in zip(self._names, self._build().weights, strict=True)
        ]

    def train(
        self,
        tensors: Sequence[Tensor],
        hyperparameters: Hyperparameters,
        seed: int,
        progress: ProgressCall,
        cancelled: Cancelled,
    ) -> TrainResult:
        """See Trainer. Each epoch has its own permutation; the last batch may be smaller."""
        self._reset(tensors, seed)
        self._set_learning_rate(hyperparameters.learning_rate)
        split = self._data["train"]
        shuffle = np.random.Generator(np.random.PCG64(seed))
        batches_per_epoch = -(-split.examples // hyperparameters.batch_size)
        batches_total = batches_per_epoch * hyperparameters.epochs
        batches = 0
        metrics: dict[str, float] = {}
        for epoch in range(1, hyperparameters.epochs + 1):
            self._model.reset_metrics()
            order = shuffle.permutation(split.examples)
            for x, y in _batches(split, order, hyperparameters.batch_size):
                if cancelled():
                    raise TaskCancelled("the task was cancelled")
                with app_code("the model could not train on its data"):
                    logs = self._model.train_on_batch(x, y, return_dict=True)
                batches += 1
                metrics = _floats(logs)
                progress(batches / batches_total, metrics)
            if not np.isfinite(metrics["loss"]):
                raise UserError(
                    f"the loss is {metrics['loss']} in epoch {epoch} of {hyperparameters.epochs}; "
                    f"lower the learning rate (now {self._learning_rate()})"
                )
        trained = self._tensors()
        _check_weights(trained)
        return TrainResult(trained, split.examples, batches, _finite(metrics))

    def evaluate(
        self, tensors: Sequence[Tensor], progress: ProgressCall, cancelled: Cancelled
    ) -> EvaluateResult:
        """See Trainer. The model's own metrics, over all examples of a split together."""
        self._reset(tensors, 0)
        metrics: dict[str, float] = {}
        splits = {name: self._data[name] for name in ("test", "validation")}
        seen, examples = 0, sum(split.examples for split in splits.values())
        for name, split in splits.items():
            self._model.reset_metrics()
            for x, y in _batches(split, np.arange(split.examples), EVALUATION_BATCH):
                if cancelled():
                    raise TaskCancelled("the task was cancelled")
                with app_code(f"the model could not be evaluated on {name}"):
                    logs = self._model.test_on_batch(x, y, return_dict=True)
                seen = min(seen + EVALUATION_BATCH, examples)
                progress(seen / examples, {})
            for metric, value in _finite(_floats(logs)).items():
                metrics[f"{name}.{metric}"] = value
            metrics[f"{name}.examples"] = float(split.examples)
        return EvaluateResult(self._data["test"].examples, metrics)

    def save(self, tensors: Sequence[Tensor], folder: Path) -> None:
        """Write `model.npz` (arrays by tensor name) and `model.keras` to `folder`."""
        self._reset(tensors, 0)
        arrays = {tensor.name: _for_numpy(tensor.array) for tensor in self._tensors()}
        partial = folder / "partial.npz"
        with zipfile.ZipFile(
            partial, "w"
        ) as archive:  # savez has parameters; a tensor may be `file`
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(  # type: ignore[no-untyped-call]
                        member, array, allow_pickle=False
                    )
        os.replace(partial, folder / "model.npz")
        partial = folder / "partial.keras"
        with app_code("the model could not be saved"):
            self._model.save(partial)
        os.replace(partial, folder / "model.keras")

    def _build(self) -> Any:
        """A new model of the app, built and compiled."""
        with app_code("the app's model() failed"):
            model = self._app.model()
        if not isinstance(model, keras.Model):
            raise UserError(f"the app's model() returned a {type(model).__name__}, no keras.Model")
        if not model.compiled or model.optimizer is None:
            raise UserError(
                "the app's model is not compiled; call model.compile(optimizer, loss, metrics) "
                "before model() returns it"
            )
        if not model.built:
            x, _ = next(_batches(self._data["train"], np.arange(1), 1))
            with app_code("the model could not be built from its training data"):
                model(x)
        return model

    def _tensors(self) -> list[Tensor]:
        return [
            Tensor(name, _values(weight), bool(weight.trainable))
            for name, weight in zip(self._names, self._model.weights, strict=True)
        ]

    def _reset(self, tensors: Sequence[Tensor], seed: int) -> None:
        """Make the kept model what a new one with these tensors and this seed would be."""
        difference = compare_manifests(self._manifest, manifest_of(tensors))
        if difference:
            raise UserError(difference)
        for weight, tensor in zip(self._model.weights, tensors, strict=True):
            weight.assign(tensor.array)
        for variable, value in self._initial:
            variable.assign(value if isinstance(value, np.ndarray) else np.zeros(*value))
        self._model.reset_metrics()
        self._seed_everything(seed)

    def _seed_everything(self, seed: int) -> None:
        """Seed all randomness that an app may use, each generator differently.

        Not by keras.utils.set_random_seed: that also clears TensorFlow's kernels (80 ms a task).
        """
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # What layers without a generator of their own draw from; it may be a new one after
        # clear_session, while functions compiled before that keep the old.
        shared = global_seed_generator().state
        self._seed_states.setdefault(id(shared), shared)
        for index, state in enumerate(self._seed_states.values()):
            digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
            state.assign(np.array([int.from_bytes(digest[:4], "little"), 0], state.dtype))

    def _set_learning_rate(self, learning_rate: float) -> None:
        if learning_rate:
            with app_code("the app's optimizer does not let its learning rate be set"):
                self._model.optimizer.learning_rate = learning_rate

    def _learning_rate(self) -> float:
        return float(keras.ops.convert_to_numpy(self._model.optimizer.learning_rate))


def _names_of(model: Any) -> list[str]:
    """A unique name for each weight: its path, without the model's own name where all have it."""
    prefix = f"{model.name}/"
    paths = [str(weight.path) for weight in model.weights]
    if all(path.startswith(prefix) for path in paths):
        paths = [path[len(prefix) :] for path in paths]
    names: dict[str, None] = {}
    for path in paths:
        name, count = path, 1
        while name in names:
            count += 1
            name = f"{path}#{count}"
        names[name] = None
    return list(names)


def _values(variable: Any) -> Array:
    array: Array = np.asarray(variable.value.numpy())  # a scalar comes as no array
    return array


def _compact(variable: Any) -> Array | tuple[tuple[int, ...], Any]:
    """A variable's value; for one that is all zeros (most optimiser state) only its shape."""
    array = _values(variable)
    return array if array.any() else (array.shape, array.dtype)


def _batches(split: Split, order: Array, batch_size: int) -> Iterator[tuple[Features, Array]]:
    """The examples in `order`, `batch_size` at a time."""
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        x = split.x
        if isinstance(x, Mapping):
            yield {name: part[rows] for name, part in x.items()}, split.y[rows]
        elif isinstance(x, np.ndarray):
            yield x[rows], split.y[rows]
        else:
            yield [part[rows] for part in x], split.y[rows]


def _floats(logs: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Without metrics that have no value on these examples, such as a recall without positives."""
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def _check_weights(tensors: Sequence[Tensor]) -> None:
    """Raise UserError that names the first tensor with a value that is not finite."""
    for tensor in tensors:
        if tensor.array.dtype.kind in "fV" and not np.isfinite(tensor.array).all():
            raise UserError(
                f"tensor {tensor.name!r} has NaN or infinity after training; lower the learning "
                "rate or clip gradients"
            )


def _for_numpy(array: Array) -> Array:
    """numpy's own formats know no bfloat16; float32 holds all of its values."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array
