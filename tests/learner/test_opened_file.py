"""Opened models: the same bits everywhere, in little memory, and nothing that breaks the policy."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sealed_models import (
    BFLOAT16,
    BLOCK_VALUES,
    HALF_STEP,
    LEARNERS,
    PUBLIC,
    SECRET,
    community,
    floats,
    no_others,
    opened,
    quiet,
)

from metisfl.deploy.ckks_keys import write_new_key
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.sealed_file import open_sealed, seal
from metisfl.proto import ckks
from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.model_file import open_model
from metisfl.proto.tensors import Tensor


@pytest.fixture(scope="module")
def crypto() -> Crypto:
    return Crypto(PUBLIC, SECRET)


# ---- The same bits everywhere ----------------------------------------------------


OPEN = """
import sys
from pathlib import Path
from metisfl.learner.crypto import Crypto
from metisfl.learner.sealed_file import open_sealed
from metisfl.native_c import kernel
from metisfl.proto.model_file import open_model
keys, model, plain = map(Path, sys.argv[1:])
with open_model(model) as sums:
    open_sealed(Crypto.load(keys), sums, plain, others=list, progress=lambda _: None)
print(kernel())
"""


@pytest.mark.parametrize("sites", [3, ckks.SEEDS_FORWARDED + 1])
def test_every_site_that_opens_a_model_gets_the_same_bits(
    crypto: Crypto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: int
) -> None:
    """With one thread or two, with any kernel, and whatever the noise of the encryption was."""
    random = np.random.default_rng(7)
    models = [
        floats(
            random.uniform(-1, 1, BLOCK_VALUES + 500).astype(np.float32),
            random.uniform(-1, 1, 100).astype(BFLOAT16),
        )
        for _ in range(sites)
    ]
    weights = random.uniform(0.1, 1, sites).tolist()
    digests = set()
    for turn, processors in (("a", 1), ("b", 2)):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        folder = tmp_path / turn
        folder.mkdir()
        model = community(Crypto(PUBLIC, SECRET), folder, models, weights=weights)
        opened(Crypto(PUBLIC, SECRET), model)
        digests.add(hashlib.sha256((folder / "plain").read_bytes()).digest())
    write_new_key(tmp_path / "keys", PUBLIC, SECRET)
    ran = subprocess.run(
        [sys.executable, "-Ic", OPEN, tmp_path / "keys", model, tmp_path / "plain"],
        env={**os.environ, "METIS_KERNEL": "portable", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "portable\n", ran.stderr
    digests.add(hashlib.sha256((tmp_path / "plain").read_bytes()).digest())
    assert len(digests) == 1


def test_memory_does_not_grow_with_the_model(crypto: Crypto, tmp_path: Path) -> None:
    peaks = []
    for blocks in (2, 2, 12):
        tensors = floats(np.full(blocks * BLOCK_VALUES, 0.25, np.float16))
        tracemalloc.start()
        model = community(crypto, tmp_path, [tensors] * 2)
        with open_model(model) as sums:
            open_sealed(
                crypto, sums, tmp_path / "plain", others=no_others, progress=quiet, initial=True
            )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1], peaks


def test_integers_are_this_sites_own_and_asked_for_only_if_there_are_any(
    crypto: Crypto, tmp_path: Path
) -> None:
    tensors = [
        Tensor("flag", np.array([True, False]), False),
        Tensor("w", np.full(9, 0.5, np.float32), True),
        Tensor("steps", np.array(17), False),
        Tensor("none", np.zeros((0, 3), np.int32), False),
    ]
    theirs = [*tensors[:2], Tensor("steps", np.array(99), False), tensors[3]]
    model = community(crypto, tmp_path, [theirs, theirs])
    found = opened(crypto, model, others=lambda: tensors)
    assert found["steps"] == 17
    assert found["flag"].tolist() == [True, False]
    assert (found["w"] == 0.5).all()
    for fewer in (tensors[:3], []):
        with pytest.raises(UserError, match=r"another model: tensor '.*' exists in the federation"):
            opened(crypto, model, others=lambda: fewer)  # noqa: B023


def test_a_model_without_any_value_is_a_model(crypto: Crypto, tmp_path: Path) -> None:
    for tensors in ([], [Tensor("steps", np.array(3), False)], floats(np.zeros((0, 4)))):
        model = community(crypto, tmp_path, [tensors] * 2)
        found = opened(crypto, model, others=lambda: tensors)  # noqa: B023
        assert len(found) == len(tensors)


# ---- What is refused --------------------------------------------------------------


def small(crypto: Crypto, folder: Path, **fields: Any) -> Path:
    return community(crypto, folder, [floats(np.full(5000, 0.9))] * 2, **fields)


def test_a_model_of_another_key_is_not_opened(crypto: Crypto, tmp_path: Path) -> None:
    model = small(crypto, tmp_path)
    for profile in ("standard", "wide"):
        other = Crypto(*generate(profile, max_learners=LEARNERS))
        with pytest.raises(PeerError, match=f"the key {PUBLIC.fingerprint.hex()}; this site has"):
            opened(other, model)


@pytest.mark.parametrize(
    ("sites", "claimed", "initial", "words"),
    [
        (1, (), False, "it holds 1 updates; this key's sites open no model of fewer than 2"),
        (2, (1.0, 20.0), True, "is the sum of 2 updates with a weight of 21; .* for up to 20"),
        (2, (0.4, 9.6), False, "s001 is 96.0% of it; .* more than 95.0%"),
        (2, (0.4, 9.6), True, "s001 is 96.0% of it"),
        (21, (0.9,) * 21, False, "is the sum of 21 updates with a weight of 18.9;"),
        (2, (0.5, 0.5), False, "holds a sum beyond 1, the most that its weights allow"),
        (21, (), False, "is the sum of 21 updates"),
        (21, (0.9,) * 21, False, "is the sum of 21 updates with a weight of 18.9; .* for up to 20"),
    ],
)
def test_a_sum_that_breaks_the_keys_policy_is_not_opened(
    crypto: Crypto,
    tmp_path: Path,
    sites: int,
    claimed: tuple[float, ...],
    initial: bool,
    words: str,
) -> None:
    models = [floats(np.full(50, 0.9))] * sites
    model = community(crypto, tmp_path, models, claimed=claimed)
    with pytest.raises(PeerError, match=words) as refused:
        opened(crypto, model, initial=initial)
    assert "1.8" not in str(refused.value), "what was decrypted is not the controller's to know"
    assert not (tmp_path / "plain").exists()
    assert not (tmp_path / "plain.partial").exists()


def test_the_initial_model_may_be_one_sites_with_a_share_or_without(
    crypto: Crypto, tmp_path: Path
) -> None:
    values = np.linspace(-1, 1, 999)
    model = community(crypto, tmp_path, [floats(values)])
    for path in (model, tmp_path / "s000"):
        found = opened(crypto, path, initial=True)["t0"]
        assert np.abs(found - values).max() <= HALF_STEP
        with pytest.raises(PeerError):
            opened(crypto, path)


def test_as_many_sites_as_the_key_allows_may_round_their_weights(
    crypto: Crypto, tmp_path: Path
) -> None:
    """The weights are n / mean: their sum can be the next number above that of the sites."""
    weights = [1.0] * (LEARNERS - 1) + [1.0 + 1e-13]
    model = community(crypto, tmp_path, [floats(np.ones(20))] * LEARNERS, weights=weights)
    assert opened(crypto, model)["t0"] == pytest.approx(np.ones(20), abs=1e-12)


def test_a_weight_between_two_grid_steps_does_not_carry_a_value_out_of_range(
    crypto: Crypto, tmp_path: Path
) -> None:
    weights = [1 / 4 + 2 * HALF_STEP * 0.75] * 4  # times 1 it is rounded up
    model = community(crypto, tmp_path, [floats(np.ones(20))] * 4, weights=weights)
    found = opened(crypto, model)["t0"]
    assert (found > 1).all()
    assert found == pytest.approx(np.ones(20), abs=4 * HALF_STEP)


@pytest.mark.parametrize("where", [4096, 4096 + 61, 4096 + 90, -1])
def test_a_damaged_file_is_this_machines_fault(crypto: Crypto, tmp_path: Path, where: int) -> None:
    model = small(crypto, tmp_path)
    data = bytearray(model.read_bytes())
    data[where] ^= 4
    model.write_bytes(data)
    with pytest.raises(MachineError, match=r"is damaged in block 0: .*; delete it and fetch it"):
        opened(crypto, model)
    assert not (tmp_path / "plain.partial").exists()


def test_a_block_at_the_wrong_place_is_the_senders_fault(crypto: Crypto, tmp_path: Path) -> None:
    values = floats(np.linspace(-1, 1, 2 * BLOCK_VALUES))
    model = community(crypto, tmp_path, [values] * 2)
    data = model.read_bytes()
    half = (len(data) - 4096) // 2
    model.write_bytes(data[:4096] + data[4096 + half :] + data[4096 : 4096 + half])
    with pytest.raises(PeerError, match="block 0 of the model is not as its manifest says"):
        opened(crypto, model)


def test_work_that_is_ended_leaves_nothing(crypto: Crypto, tmp_path: Path) -> None:
    tensors = floats(np.full(2 * BLOCK_VALUES + 1, 0.5))
    told: list[float] = []

    def end(fraction: float) -> None:
        told.append(fraction)
        if len(told) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        seal(crypto, tensors, tmp_path / "s", exponents=(), weight=1.0, sync=False, progress=end)
    assert list(tmp_path.iterdir()) == []
    model = community(crypto, tmp_path, [tensors] * 2)
    told.clear()
    with pytest.raises(InterruptedError), open_model(model) as sums:
        open_sealed(crypto, sums, tmp_path / "plain", others=no_others, progress=end)
    assert told == pytest.approx([1 / 3, 2 / 3])
    assert not list(tmp_path.glob("plain*"))
