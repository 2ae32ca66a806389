"""What OpenFHE encrypts here and C adds, OpenFHE decrypts here: exactly, on the grid."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from metisfl.deploy.ckks_keys import SECRET_FILE, write_new_key
from metisfl.learner.crypto import Crypto, generate
from metisfl.native_c.ckks import BlockError, Fold
from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import UserError

Floats = NDArray[np.float64]
DIGEST = ckks.exponents_digest([0])
PLACE = {"index": 0, "count": 1, "exponents_digest": DIGEST}
RING = ckks.RING_DIMENSION
PUBLIC, SECRET = generate("standard", max_learners=4)
PROMISES_NOTHING = 1.0  # 64 learners are too many for the promise of the smallest profile


@pytest.fixture(scope="module")
def crypto() -> Crypto:
    return Crypto(PUBLIC, SECRET)


def fold(crypto: Crypto, blocks: Sequence[bytearray], polynomials: int) -> bytearray:
    with Fold(crypto.context) as sums:
        sums.begin(0, 1, 1, DIGEST, polynomials)
        for block in blocks:
            sums.absorb(block)
        out = bytearray(sums.out_bytes)
        sums.finalise(out)
    return out


def updates(crypto: Crypto, learners: int) -> Floats:
    """What learners encrypt, (learners, 1, N): weights that sum to their number, one 100 times
    the others, and values of every kind, among them the largest at all of them at once."""
    random = np.random.default_rng(learners)
    weights = np.ones(learners)
    weights[0] = 100.0
    weights *= learners / weights.sum()
    values = random.uniform(-1, 1, (learners, 1, RING))
    values[..., : RING // 2] = np.clip(random.normal(0, 0.05, (learners, 1, RING // 2)), -1, 1)
    values[..., :2] = 1.0, -1.0
    values[..., 2:4] = 0.0
    values *= weights[:, None, None]
    crypto.to_grid(values)
    return values


@pytest.mark.parametrize("learners", [2, 3, 16, 17, 64])
@pytest.mark.parametrize("profile", ckks.PROFILES)
def test_openfhe_decrypts_what_c_folded(profile: str, learners: int) -> None:
    crypto = Crypto(*generate(profile, max_learners=learners, error=PROMISES_NOTHING))
    public = crypto.public
    sent = updates(crypto, learners)
    exact = sent.sum(axis=0)
    blocks = [crypto.encrypt_block(values, **PLACE) for values in sent]
    for polynomials in (1, 2):  # the seeds forwarded, and expanded
        found = crypto.decrypt_block(fold(crypto, blocks, polynomials), ciphertexts=1, **PLACE)
        assert np.array_equal(found, exact), "the grid takes the noise away"
    blocks = [crypto.encrypt_block(values, public_key=True, **PLACE) for values in sent]
    found = crypto.decrypt_block(fold(crypto, blocks, 2), ciphertexts=1, **PLACE)
    noise = ckks.noise_bound(learners, public_key=True) * 2.0**-public.scaling_bits
    half_step = 2.0 ** -(public.grid_bits + 1)
    repeatable = noise < half_step
    assert np.abs(found - exact).max() <= (0.0 if repeatable else noise + half_step)


@pytest.mark.parametrize("public_key", [False, True])
def test_the_order_of_the_fold_changes_no_bit(crypto: Crypto, public_key: bool) -> None:
    blocks = [
        crypto.encrypt_block(values, public_key=public_key, **PLACE)
        for values in updates(crypto, 4)
    ]
    found = {
        crypto.decrypt_block(fold(crypto, some, 2), ciphertexts=1, **PLACE).tobytes()
        for some in permutations(blocks)
    }
    assert len(found) == 1


@pytest.mark.parametrize("profile", ckks.PROFILES)
def test_the_mean_is_within_the_promised_error(profile: str) -> None:
    learners = 10
    crypto = Crypto(*generate(profile, max_learners=learners, error=1e-6))
    values = np.clip(np.random.default_rng(0).normal(0, 0.05, (learners, 1, RING)), -1, 1)
    sent = values.copy()
    crypto.to_grid(sent)
    blocks = [crypto.encrypt_block(one, **PLACE) for one in sent]
    found = crypto.decrypt_block(fold(crypto, blocks, 1), ciphertexts=1, **PLACE) / learners
    promised = ckks.parameters_for(crypto.public.limb_bits, learners).error
    assert promised <= 1e-6
    assert np.abs(found - values.mean(axis=0)).max() <= promised


@pytest.mark.parametrize("public_key", [False, True])
def test_blocks_of_several_ciphertexts_come_back_row_by_row(
    crypto: Crypto, public_key: bool
) -> None:
    values = np.random.default_rng(1).uniform(-4, 4, (5, RING))
    crypto.to_grid(values)
    place = {"index": 6, "count": 9, "exponents_digest": ckks.exponents_digest([3, 0])}
    block = crypto.encrypt_block(values, public_key=public_key, **place)
    found = crypto.decrypt_block(block, ciphertexts=5, **place)
    assert np.abs(found - values).max() <= (1e-5 if public_key else 0.0)
    for wrong in ({"index": 5}, {"count": 10}, {"exponents_digest": DIGEST}):
        with pytest.raises(BlockError):
            crypto.decrypt_block(block, ciphertexts=5, **{**place, **wrong})
    with pytest.raises(BlockError):
        crypto.decrypt_block(block[:-1], ciphertexts=5, **place)


def test_each_block_has_its_own_seed_from_the_operating_system(
    crypto: Crypto, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[bytes] = []
    urandom = os.urandom

    def noted(count: int) -> bytes:
        drawn.append(urandom(count))
        return drawn[-1]

    monkeypatch.setattr(os, "urandom", noted)
    values = np.zeros((2, RING))
    blocks = [crypto.encrypt_block(values, **PLACE) for _ in range(3)]
    seeds = [bytes(block[64:80]) for block in blocks]
    assert seeds == drawn
    assert len(set(seeds)) == 3
    crypto.encrypt_block(values, public_key=True, **PLACE)
    assert len(drawn) == 3, "with the public key there is nothing to rebuild"


def test_two_encryptions_of_the_same_values_have_nothing_in_common(crypto: Crypto) -> None:
    values = np.zeros((1, RING))
    one, other = (np.frombuffer(crypto.encrypt_block(values, **PLACE), "u1")[84:] for _ in "ab")
    assert (one == other).mean() < 0.01


def test_the_number_of_threads_changes_no_bit(
    crypto: Crypto, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(2).uniform(-1, 1, (7, RING))
    crypto.to_grid(values)
    block = crypto.encrypt_block(values, **PLACE)
    found = []
    for processors in (1, 2, 64):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        other = Crypto(PUBLIC, SECRET)
        assert other.threads == min(4, processors)
        found.append(other.decrypt_block(block, ciphertexts=7, **PLACE).tobytes())
    assert set(found) == {values.tobytes()}


# ---- Keys ----------------------------------------------------------------------


@pytest.mark.parametrize("profile", ckks.PROFILES)
@pytest.mark.parametrize("learners", [1, 2, 10, 1000])
def test_a_key_is_made_for_what_was_asked(profile: str, learners: int) -> None:
    public, secret = generate(
        profile,
        max_learners=learners,
        error=PROMISES_NOTHING,
        min_contributors=3,
        max_share=0.5,
        verify="full",
    )
    assert PublicPart.parse(public.pack()) == public, "every bound of a public part is kept"
    assert (public.profile, public.limb_bits) == (profile, ckks.PROFILES[profile])
    assert public.ring_dimension == RING
    assert public.modulus % (2 * RING) == 1
    assert (public.min_contributors, public.max_share, public.verify) == (3, 0.5, "full")
    assert secret.fingerprint == public.fingerprint
    assert len({public.fingerprint, generate(profile, max_learners=1)[0].fingerprint}) == 2


def test_a_profile_that_cannot_keep_the_error_makes_no_key() -> None:
    with pytest.raises(UserError, match=r"compact with 64 learners .* take profile standard, or"):
        generate("compact", max_learners=64)
    with pytest.raises(UserError, match="take a key for fewer learners, or promise less"):
        generate("wide", max_learners=1000, error=1e-12)


def test_a_key_is_loaded_from_its_folder(tmp_path: Path) -> None:
    public, secret = generate("compact", max_learners=2)
    with pytest.raises(UserError, match=r"public.ckks does not exist; copy it from the site"):
        Crypto.load(tmp_path)
    write_new_key(tmp_path / "keys", public, secret)
    loaded = Crypto.load(tmp_path / "keys")
    assert loaded.public == public
    values = np.full((1, RING), 0.5)
    block = Crypto(public, secret).encrypt_block(values, **PLACE)
    assert np.array_equal(loaded.decrypt_block(block, ciphertexts=1, **PLACE), values)


def test_parts_of_two_keys_are_not_used_together(tmp_path: Path) -> None:
    public, secret = generate("standard", max_learners=4)
    with pytest.raises(UserError, match="another key"):
        Crypto(PUBLIC, secret)
    write_new_key(tmp_path, public, secret)
    (tmp_path / SECRET_FILE).write_bytes(SECRET.pack())
    with pytest.raises(UserError, match="must be of one key"):
        Crypto.load(tmp_path)


def test_a_site_without_the_right_secret_reads_nothing(crypto: Crypto) -> None:
    values = np.zeros((1, RING))
    block = crypto.encrypt_block(values, **PLACE)
    public, secret = generate("standard", max_learners=4)
    thief = Crypto(public, secret)
    with pytest.raises(BlockError, match="sealed under the key"):
        thief.decrypt_block(block, ciphertexts=1, **PLACE)
    thief.context = crypto.context
    found = thief.decrypt_block(block, ciphertexts=1, **PLACE)
    range_of_noise = PUBLIC.modulus * 2.0**-PUBLIC.scaling_bits / 2
    assert np.abs(found).mean() == pytest.approx(range_of_noise / 2, rel=0.1), "anything at all"


def test_no_sum_within_the_rounding_of_weights_wraps() -> None:
    for limb_bits in ckks.PROFILES.values():
        smallest = (1 << limb_bits) - ckks.MODULUS_GAP
        for learners in range(1, ckks.LEARNERS_MAX + 1):
            found = ckks.parameters_for(limb_bits, learners)
            steps = found.scaling_bits - found.grid_bits
            largest = learners * (1 + ckks.WEIGHT_ROUNDING) * 2**found.scaling_bits
            rest = ckks.noise_bound(learners) + learners * 2 ** (steps - 1)
            assert math.ceil(largest + rest) < smallest // 2
