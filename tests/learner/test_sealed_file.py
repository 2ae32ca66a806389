"""Whole models: sealed at sites, added without a key, opened at sites; exact to the grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sealed_models import (
    BFLOAT16,
    BLOCK_VALUES,
    HALF_STEP,
    LEARNERS,
    PUBLIC,
    SECRET,
    community,
    floats,
    opened,
    quiet,
    sealed,
)

from metisfl.learner.crypto import Crypto
from metisfl.learner.sealed_file import Exceeded, seal
from metisfl.proto import ckks
from metisfl.proto.errors import UserError
from metisfl.proto.model_file import open_model
from metisfl.proto.tensors import FLOATS, Tensor


@pytest.fixture(scope="module")
def crypto() -> Crypto:
    return Crypto(PUBLIC, SECRET)


# ---- Weights and scales --------------------------------------------------------


@pytest.mark.parametrize("sites", [2, ckks.SEEDS_FORWARDED, ckks.SEEDS_FORWARDED + 1])
def test_the_model_is_the_weighted_mean_to_the_promised_error(
    crypto: Crypto, tmp_path: Path, sites: int
) -> None:
    random = np.random.default_rng(sites)
    shapes = [(3, 5), (), (2, BLOCK_VALUES // 2 + 7), (1,), (0, 4), (17,)]
    models = [
        [random.normal(0, 0.05, shape).astype(np.float64) for shape in shapes] for _ in range(sites)
    ]
    weights = random.uniform(0.5, 1.5, sites)
    weights *= sites / weights.sum()
    model = community(crypto, tmp_path, [floats(*one) for one in models], weights=weights.tolist())
    with open_model(model) as sums:
        form = sums.manifest.encryption
        assert form.polynomials == (1 if sites <= ckks.SEEDS_FORWARDED else 2)
    found = opened(crypto, model)
    assert PUBLIC.error >= HALF_STEP
    for number in range(len(shapes)):
        mean = sum(w * one[number] for w, one in zip(weights, models, strict=True)) / sites
        assert found[f"t{number}"].shape == shapes[number]
        assert np.abs(found[f"t{number}"] - mean).max(initial=0) <= HALF_STEP * 1.001


def test_a_variance_that_grows_within_a_round_is_reported_and_then_fits(
    crypto: Crypto, tmp_path: Path
) -> None:
    """As a moving variance does that starts at 1: features are not scaled, or rarely vary."""
    before = floats(np.full(40, 0.5, np.float32), np.ones(4, np.float32))
    path = tmp_path / "s"
    assert sealed(crypto, before, path).exponents == (1, 2), "with two bits of headroom"
    path.unlink()
    after = floats(before[0].array, np.array([1.0, 2700.0, 0.0, 5.0], np.float32))
    for exponents in ((), (1, 2), (1, 11)):
        made = seal(
            crypto, after, path, exponents=exponents, weight=1.0, sync=False, progress=quiet
        )
        assert made == Exceeded("t1", (1, 14))
        assert list(tmp_path.iterdir()) == [], "nothing is written"
    model = community(crypto, tmp_path, [after, before], exponents=(1, 14))
    found = opened(crypto, model)["t1"]
    assert np.abs(found - (after[1].array + before[1].array) / 2).max() <= HALF_STEP * 2**14


def test_biases_that_are_zero_stay_zero_and_move_with_the_precision_of_scale_1(
    crypto: Crypto, tmp_path: Path
) -> None:
    zero, moved = np.zeros(50, np.float32), np.full(50, 3e-5, np.float32)
    assert sealed(crypto, floats(zero), tmp_path / "s").exponents == (0,)
    found = opened(crypto, community(crypto, tmp_path, [floats(zero), floats(zero)]))["t0"]
    assert not found.any()
    found = opened(crypto, community(crypto, tmp_path, [floats(zero), floats(moved)]))["t0"]
    assert np.abs(found - 1.5e-5).max() <= HALF_STEP


def test_large_embeddings_lose_what_their_scale_costs_and_others_do_not(
    crypto: Crypto, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    models = [[random.normal(0, 80, (500, 64)), random.uniform(-0.25, 0.25, 300)] for _ in range(3)]
    exponents = (11, 0)
    model = community(crypto, tmp_path, [floats(*one) for one in models], exponents=exponents)
    found = opened(crypto, model)
    for number, exponent in enumerate(exponents):
        mean = sum(one[number] for one in models) / 3
        assert np.abs(found[f"t{number}"] - mean).max() <= HALF_STEP * 2**exponent * 1.001


def test_a_site_a_hundred_times_larger_than_the_others(crypto: Crypto, tmp_path: Path) -> None:
    examples = np.array([100_000] + [1000] * 9)
    weights = (examples / examples.mean()).tolist()
    random = np.random.default_rng(3)
    models = [random.uniform(-1, 1, 5000) for _ in examples]
    models[0][:2] = 1.0, -1.0
    model = community(crypto, tmp_path, [floats(one) for one in models], weights=weights)
    found = opened(crypto, model)["t0"]
    assert np.abs(found - np.average(models, axis=0, weights=examples)).max() <= HALF_STEP * 1.001


def test_values_a_hundred_times_larger_at_one_site(crypto: Crypto, tmp_path: Path) -> None:
    small, large = np.linspace(-1, 1, 3000), np.linspace(-100, 100, 3000)
    need = {sealed(crypto, floats(small), tmp_path / "s").exponents[0]}
    made = seal(
        crypto,
        floats(large),
        tmp_path / "s",
        exponents=need.copy(),
        weight=1.0,
        sync=False,
        progress=quiet,
    )
    assert made == Exceeded("t0", (9,))
    found = opened(
        crypto, community(crypto, tmp_path, [floats(small), floats(large)], exponents=(9,))
    )["t0"]
    assert np.abs(found - (small + large) / 2).max() <= HALF_STEP * 2**9


@pytest.mark.parametrize("weight", [1e-3, 1.0, float(LEARNERS)])
def test_the_extremes_of_a_scale_are_within_it(
    crypto: Crypto, tmp_path: Path, weight: float
) -> None:
    for largest, dtype in ((65504.0, np.float16), (3.4028234e38, np.float32), (1.7e308, None)):
        array = np.array([largest, -largest, 0.0], dtype or np.float64)
        (need,) = sealed_exponents(crypto, array, tmp_path)
        model = community(
            crypto, tmp_path, [floats(array)] * 2, weights=[weight / 2] * 2, exponents=(need,)
        )
        found = opened(crypto, model)["t0"]
        assert np.isfinite(found).all()
        assert np.allclose(found.astype(float), array.astype(float), rtol=max(1e-3, 1e-5 / weight))


def sealed_exponents(crypto: Crypto, array: Any, folder: Path) -> tuple[int, ...]:
    made = seal(
        crypto,
        floats(array),
        folder / "s",
        exponents=(),
        weight=1.0,
        sync=False,
        progress=quiet,
    )
    assert isinstance(made, Exceeded)
    return made.exponents


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_encrypted(crypto: Crypto, tmp_path: Path, bad: float) -> None:
    values = np.zeros(70_000, np.float32)
    values[69_999] = bad
    with pytest.raises(UserError, match="'t1' has NaN or infinity after training; lower the"):
        sealed(crypto, floats(np.ones(3), values), tmp_path / "s", exponents=(1100, 1100))
    assert list(tmp_path.iterdir()) == []


MODELS = st.lists(
    st.tuples(
        st.sampled_from(["float16", "bfloat16", "float32", "float64", "int64", "bool", "uint8"]),
        st.integers(0, 3000),
    ),
    max_size=6,
)


@given(kinds=MODELS, seed=st.integers(0, 2**32))
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_model_comes_back_in_its_dtypes_and_shapes(
    crypto: Crypto, tmp_path: Path, kinds: list[tuple[str, int]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    tensors = []
    for number, (dtype, count) in enumerate(kinds):
        array = random.uniform(-1, 1, count).astype(BFLOAT16 if dtype == "bfloat16" else dtype)
        tensors.append(Tensor(f"t{number}", array, bool(number % 2)))
    other = [each if each.dtype_name not in FLOATS else floats(-each.array)[0] for each in tensors]
    model = community(crypto, tmp_path, [tensors, rename(other, tensors)])
    found = opened(crypto, model, others=lambda: tensors)
    for each, (dtype, _) in zip(tensors, kinds, strict=True):
        if dtype not in FLOATS:
            assert np.array_equal(found[each.name], each.array)
        else:
            assert found[each.name].dtype == each.array.dtype
            assert np.abs(found[each.name].astype(float)).max(initial=0) == 0.0
    alone = community(crypto, tmp_path, [tensors])
    found = opened(crypto, alone, others=lambda: tensors, initial=True)
    for each in tensors:
        off = np.abs(found[each.name].astype(float) - each.array.astype(float))
        precision = HALF_STEP if each.array.dtype.itemsize > 4 else 2**-8
        assert off.max(initial=0) <= (0 if each.array.dtype.kind in "biu" else precision)


PRECISION = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 0.0}


@pytest.mark.parametrize("dtype", PRECISION)
def test_small_tensors_share_ciphertexts_and_each_keeps_its_own_scale(
    crypto: Crypto, tmp_path: Path, dtype: str
) -> None:
    """With scalars, empty ones, and one that spans blocks among them."""
    random = np.random.default_rng(5)
    shapes = [(), (3, 0), (BLOCK_VALUES + 77,), (1, 1, 1)]
    shapes += [tuple(random.integers(0, 6, random.integers(0, 4))) for _ in range(300)]
    exponents = [int(exponent) for exponent in random.integers(0, 15, len(shapes))]
    weights = [0.25, 1.5, 1.25]
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    models = [
        [
            np.asarray(random.uniform(-1, 1, shape) * 2.0**exponent).astype(kind)
            for shape, exponent in zip(shapes, exponents, strict=True)
        ]
        for _ in weights
    ]
    model = community(
        crypto, tmp_path, [floats(*one) for one in models], weights=weights, exponents=exponents
    )
    found = opened(crypto, model)
    for number, exponent in enumerate(exponents):
        sums = sum(w * one[number].astype(float) for w, one in zip(weights, models, strict=True))
        off = np.abs(found[f"t{number}"].astype(float) - sums / 3)
        assert found[f"t{number}"].shape == shapes[number]
        assert found[f"t{number}"].dtype == kind
        assert off.max(initial=0) <= (HALF_STEP * 1.001 + PRECISION[dtype]) * 2.0**exponent


def rename(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        Tensor(one.name, each.array, one.trainable) for each, one in zip(tensors, like, strict=True)
    ]
