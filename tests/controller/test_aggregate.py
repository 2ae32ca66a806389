"""A fold is the weighted mean, bit for bit the same however it is cut, and needs little memory."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from metisfl.controller import aggregate
from metisfl.proto.model_file import open_model, write_model
from metisfl.proto.tensors import Tensor

RNG = np.random.default_rng(5)


def model(values: float | None = None, size: int = 70_001) -> list[Tensor]:
    """Tensors that cross chunk boundaries, of several dtypes, one of them a counter."""
    draw = RNG.normal if values is None else lambda size: np.full(size, values)
    return [
        Tensor("dense/kernel", draw(size=(size,)).astype(np.float32), True),
        Tensor("dense/bias", draw(size=(3,)).astype(np.float64), True),
        Tensor("norm/scale", draw(size=(130, 7)).astype(np.float16), True),
        Tensor("seen", np.array([RNG.integers(100)]), False),
    ]


def fold(folder: Path, models: list[list[Tensor]], weights: list[float], base: bool = True) -> Path:
    updates = []
    for number, (tensors, weight) in enumerate(zip(models, weights, strict=True)):
        path = folder / f"{number}.update"
        write_model(path, tensors)
        updates.append(aggregate.Update(path, weight))
    target = folder / "target.model"
    base_path = None
    if base:
        base_path = folder / "base.model"
        write_model(base_path, [*model(0.0)[:3], Tensor("seen", np.array([7]), False)])
    digest = aggregate.fold(updates, base_path, target)
    with open_model(target) as made:
        assert made.digest() == digest
    return target


def test_the_mean_is_weighted_and_exact_to_the_last_bit(tmp_path: Path) -> None:
    models, weights = [model() for _ in range(11)], [float(w) for w in range(1, 12)]
    with open_model(fold(tmp_path, models, weights)) as made:
        tensors = made.tensors()
        for index in range(3):
            sums = np.zeros(models[0][index].array.shape)
            for tensors_of_one, weight in zip(models, weights, strict=True):
                sums += weight * tensors_of_one[index].array.astype(np.float64)
            expected = (sums / 66.0).astype(models[0][index].array.dtype)
            np.testing.assert_array_equal(tensors[index].array, expected)
        del tensors


def test_counters_stay_as_the_community_model_has_them(tmp_path: Path) -> None:
    with open_model(fold(tmp_path, [model(), model()], [1.0, 1.0])) as made:
        assert made.tensors()[3].array.tolist() == [7]


def test_the_initial_model_is_taken_as_it_is(tmp_path: Path) -> None:
    only = model()
    with open_model(fold(tmp_path, [only], [1.0], base=False)) as made:
        for ours, theirs in zip(made.tensors(), only, strict=True):
            np.testing.assert_array_equal(ours.array, theirs.array)


def test_equal_models_give_the_same_model(tmp_path: Path) -> None:
    same = model()
    with open_model(fold(tmp_path, [same, same, same], [3.0, 5.0, 9.0])) as made:
        np.testing.assert_allclose(made.tensors()[0].array, same[0].array, rtol=1e-7)


@pytest.mark.parametrize("learners", [2, 24])
def test_memory_does_not_grow_with_models_or_learners(tmp_path: Path, learners: int) -> None:
    path = tmp_path / "big.update"
    write_model(path, [Tensor("w", np.ones(8_000_000, np.float32), True)])  # 32 MB
    updates = [aggregate.Update(path, 1.0)] * learners
    aggregate.fold(updates[:2], None, tmp_path / "warm.model")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    aggregate.fold(updates, None, tmp_path / "target.model")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 8 * 1024, f"{learners} updates of 32 MB cost {grown_kib} KiB more"
