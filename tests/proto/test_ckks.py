"""The arithmetic of encrypted models: no sum wraps, noise never shows, promises are kept."""

from __future__ import annotations

import hashlib
import math
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from metisfl.native_c import ckks as native
from metisfl.proto import ckks

LIMB_BITS = tuple(ckks.PROFILES.values())
EVERY_NUMBER = range(1, ckks.LEARNERS_MAX + 1)

limb_bits = st.sampled_from(LIMB_BITS)
learners = st.integers(1, ckks.LEARNERS_MAX)
finite = st.floats(0, allow_nan=False, allow_infinity=False)


def is_prime(n: int) -> bool:
    """Miller and Rabin's test, whose twelve first primes decide below 2^64."""
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(
        pow(base, odd, n) == 1 or any(pow(base, odd << i, n) == n - 1 for i in range(twos))
        for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    )


def modulus_of(bits: int) -> int:
    """The largest prime below 2^bits that is 1 modulo 2N."""
    step = 2 * ckks.RING_DIMENSION
    return next(q for q in range((1 << bits) - step + 1, 0, -step) if is_prime(q))


def largest_sum(found: ckks.Parameters, scaling_bits: int, public_key: bool) -> int:
    """With all weights, every learner's rounding, and the noise, in units of 2^-p."""
    half_step = 1 << (found.scaling_bits - found.grid_bits - 1)
    noise = math.ceil(ckks.noise_bound(found.learners, public_key=public_key))
    return found.learners * ((1 << scaling_bits) + half_step) + noise


@pytest.mark.parametrize("public_key", [False, True])
@pytest.mark.parametrize("bits", LIMB_BITS)
def test_the_largest_sum_never_wraps_and_no_finer_scale_would_do(
    bits: int, public_key: bool
) -> None:
    smallest = (1 << bits) - ckks.MODULUS_GAP
    assert smallest < modulus_of(bits) < 1 << bits
    for number in EVERY_NUMBER:
        found = ckks.parameters_for(bits, number, public_key=public_key)
        assert largest_sum(found, found.scaling_bits, public_key) <= (smallest - 1) // 2
        assert largest_sum(found, found.scaling_bits + 1, public_key) > (smallest - 1) // 2


@pytest.mark.parametrize("bits", LIMB_BITS)
def test_with_the_scale_of_the_secret_key_sums_of_the_public_key_do_not_wrap(bits: int) -> None:
    """One key serves both forms."""
    for number in EVERY_NUMBER:
        found = ckks.parameters_for(bits, number)
        assert largest_sum(found, found.scaling_bits, True) < (1 << bits - 1) - ckks.MODULUS_GAP


@given(limb_bits, learners)
def test_a_scale_is_taken_with_no_room_to_spare_and_not_with_one_unit_less(
    bits: int, number: int
) -> None:
    found = ckks.parameters_for(bits, number)
    least = 2 * largest_sum(found, found.scaling_bits, False) + 1  # the modulus that just holds it
    assert ckks.parameters_for(bits, number, modulus=least) == found
    assert ckks.parameters_for(bits, number, modulus=least - 2).scaling_bits < found.scaling_bits


@pytest.mark.parametrize("bits", LIMB_BITS)
def test_every_profile_has_a_grid_for_every_number_of_learners(bits: int) -> None:
    for number in EVERY_NUMBER:
        found = ckks.parameters_for(bits, number)
        assert 14 <= found.scaling_bits <= 59
        assert found.grid_bits > 0
        step = 1 << (found.scaling_bits - found.grid_bits)
        assert step > 2 * ckks.noise_bound(number)
        assert step // 2 <= 2 * math.ceil(ckks.noise_bound(number)), "a finer grid would do"


@given(limb_bits, learners, st.booleans(), st.data())
def test_rounding_to_the_grid_recovers_the_exact_sum(
    bits: int, number: int, public_key: bool, data: st.DataObject
) -> None:
    found = ckks.parameters_for(bits, number, public_key=public_key)
    assume(found.grid_bits > 0)
    step = 1 << (found.scaling_bits - found.grid_bits)
    most = (number << found.grid_bits) + number // 2  # each rounds up by half a step
    exact = data.draw(st.integers(-most, most) | st.sampled_from([-most, most]))
    bound = math.ceil(ckks.noise_bound(number, public_key=public_key))
    noise = data.draw(st.integers(-bound, bound) | st.sampled_from([-bound, bound]))
    modulus = (1 << bits) - ckks.MODULUS_GAP
    residue = (exact * step + noise) % modulus
    centred = residue - modulus if residue > modulus // 2 else residue
    assert (centred + step // 2) // step == exact


@pytest.mark.parametrize("number", [1, 2, 10, 64, 1000])
@pytest.mark.parametrize("bits", LIMB_BITS)
def test_a_mean_is_as_near_as_promised(bits: int, number: int) -> None:
    """Encoding, noise, sum, reduction and decoding as sites do them, with weights to the limit."""
    random = np.random.default_rng(bits * number)
    found = ckks.parameters_for(bits, number)
    weights = random.uniform(0.01, 1.0, number)
    weights *= number / math.fsum(weights)
    values = random.uniform(-1, 1, (number, 256))
    values[:, :2] = 1, -1
    total = np.zeros(256, np.int64)
    for weight, row in zip(weights, values, strict=True):
        on_grid = np.rint(np.ldexp(weight * row, found.grid_bits)).astype(np.int64)
        noise = np.rint(random.normal(0, ckks.SIGMA, 256)).astype(np.int64)
        total += (on_grid << (found.scaling_bits - found.grid_bits)) + noise
    modulus = modulus_of(bits)
    total %= modulus
    total[total > modulus // 2] -= modulus
    found_sum = np.rint(np.ldexp(total.astype(np.float64), found.grid_bits - found.scaling_bits))
    mean = np.ldexp(found_sum, -found.grid_bits) / math.fsum(weights)
    exact = weights @ values / math.fsum(weights)
    assert np.abs(mean - exact).max() <= found.error * (1 + 1e-9) + 1e-12


@given(learners, st.floats(1e-12, 0.1) | st.integers(4, 39).map(lambda bits: 2.0**-bits))
def test_the_smallest_profile_is_the_first_that_keeps_the_error(number: int, error: float) -> None:
    chosen = ckks.smallest_profile(number, error)
    keeps = [n for n, k in ckks.PROFILES.items() if ckks.parameters_for(k, number).error <= error]
    assert chosen == (keeps[0] if keeps else "")


def test_ten_learners_get_the_compact_profile_and_more_learners_a_larger_one() -> None:
    assert ckks.smallest_profile(10) == "compact"
    assert ckks.smallest_profile(1000) == "standard"
    assert ckks.smallest_profile(1000, 1e-12) == ""


@given(limb_bits, learners)
def test_noise_of_the_public_key_costs_grid_and_never_range(bits: int, number: int) -> None:
    ours, public = (ckks.parameters_for(bits, number, public_key=key) for key in (False, True))
    assert public.grid_bits < ours.grid_bits
    assert public.scaling_bits <= ours.scaling_bits


def test_a_modulus_too_small_for_the_learners_has_no_grid() -> None:
    assert ckks.parameters_for(32, 1000, modulus=4097).grid_bits < 1


# ---- Joint keys ----------------------------------------------------------------

SITES = range(2, 201)


def test_sums_under_a_joint_key_do_not_wrap_and_its_noise_never_crosses_the_grid() -> None:
    bits = ckks.PROFILES[ckks.JOINT_PROFILE]
    half = ((1 << bits) - ckks.MODULUS_GAP - 1) // 2
    for number in SITES:
        found = ckks.parameters_for(bits, number, joint=True)
        step = 1 << (found.scaling_bits - found.grid_bits)
        noise = math.ceil(ckks.noise_bound(number, joint=True))
        largest = number * ((1 << found.scaling_bits) + step // 2) + noise
        assert largest <= half < largest + (number << found.scaling_bits)
        assert 2 * noise < step <= 4 * noise, "a finer grid would do"


def test_the_noise_of_a_joint_key_is_that_of_all_its_public_keys_and_the_flooding_of_all() -> None:
    for number in SITES:
        each = 8 * math.hypot(ckks.SIGMA_PUBLIC * number**0.5, ckks.SIGMA_FLOODING)
        assert ckks.noise_bound(number, joint=True) == pytest.approx(each * number**0.5 + number)


@given(st.floats(1e-9, 1e-3))
def test_a_joint_key_has_as_many_sites_as_keep_the_error(error: float) -> None:
    most = ckks.joint_sites_max(error)
    errors = [
        ckks.parameters_for(ckks.PROFILES[ckks.JOINT_PROFILE], number, joint=True).error
        for number in (most, most + 1)
    ]
    assert most in (1, ckks.LEARNERS_MAX) or errors[0] <= error
    assert most == ckks.LEARNERS_MAX or errors[1] > error


def test_the_usual_error_is_kept_by_more_sites_than_most_federations_have() -> None:
    assert ckks.joint_sites_max() >= 20


def test_partials_of_two_models_have_two_digests_and_updates_the_old_one() -> None:
    digests = {ckks.exponents_digest([0, 3], opens) for opens in (b"", b"a" * 32, b"b" * 32)}
    assert len(digests) == 3
    assert ckks.exponents_digest([0, 3]) in digests


# ---- Exponents ---------------------------------------------------------------


@given(finite)
def test_an_exponent_holds_its_value_with_headroom_and_none_smaller_would(largest: float) -> None:
    exponent = ckks.exponent_for(largest)
    assert 0 <= exponent <= ckks.EXPONENT_MAX
    assert Fraction(largest) * 2**ckks.HEADROOM_BITS <= Fraction(2) ** exponent
    if exponent:
        assert Fraction(largest) * 2**ckks.HEADROOM_BITS > Fraction(2) ** (exponent - 1)


@given(finite, st.integers(0, ckks.EXPONENT_MAX))
def test_a_value_fits_exactly_when_it_is_within_the_scale(largest: float, exponent: int) -> None:
    assert ckks.fits(largest, exponent) == (Fraction(largest) <= Fraction(2) ** exponent)


@pytest.mark.parametrize("exponent", [0, 1, 52, 1023])
def test_the_scale_itself_fits_and_the_next_float_does_not(exponent: int) -> None:
    scale = math.ldexp(1.0, exponent)
    assert ckks.fits(scale, exponent)
    assert not ckks.fits(math.nextafter(scale, math.inf), exponent)


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [(0.0, 0), (5e-324, 0), (0.25, 0), (0.26, 1), (1.0, 2), (2700.0, 14), (1.7976e308, 1026)],
)
def test_exponents_of_known_values(largest: float, exponent: int) -> None:
    assert ckks.exponent_for(largest) == exponent


def test_the_exponents_digest_is_of_their_little_endian_bytes() -> None:
    data = bytes([0, 0, 3, 0, 0x4C, 4])
    assert ckks.exponents_digest([0, 3, 1100]) == hashlib.sha256(data).digest()[:16]


@given(*[st.lists(st.integers(0, ckks.EXPONENT_MAX), max_size=5)] * 2)
def test_two_sets_of_exponents_share_a_digest_exactly_when_they_are_the_same(
    one: list[int], other: list[int]
) -> None:
    same = ckks.exponents_digest(one) == ckks.exponents_digest(other)
    assert same == (one == other)
    assert ckks.exponents_digest([*one, 0]) != ckks.exponents_digest(one)
    swapped = ckks.exponents_digest(one[::-1]) == ckks.exponents_digest(one)
    assert swapped == (one[::-1] == one)


# ---- Blocks --------------------------------------------------------------------


@pytest.mark.parametrize(("polynomials", "seeds"), [(1, 1), (1, 16), (2, 0)])
@pytest.mark.parametrize("ring", [1024, 2048, 8192])
@pytest.mark.parametrize("bits", LIMB_BITS)
def test_payloads_are_what_the_c_library_writes(
    bits: int, ring: int, polynomials: int, seeds: int
) -> None:
    context = native.Context(bytes(16), bits, ring, (1 << bits) - 2 * ring + 1)
    full = context.block_ciphertexts
    assert ckks.block_ciphertexts(bits, ring) == full
    for count in (1, full - 1, full, full + 1, 3 * full + 2):
        blocks = [min(full, count - start) for start in range(0, count, full)]
        wanted = sum(
            native.block_bytes(context, each, polynomials, seeds) for each in blocks if each
        )
        for values in (count * ring, (count - 1) * ring + 1):
            assert ckks.payload_bytes(values, bits, ring, polynomials, seeds) == wanted
    assert ckks.payload_bytes(0, bits, ring, polynomials, seeds) == 0


@pytest.mark.parametrize("bits", LIMB_BITS)
def test_a_full_block_fits_a_chunk_in_every_form_that_is_forwarded(bits: int) -> None:
    full = ckks.block_ciphertexts(bits, ckks.RING_DIMENSION)
    for form in ((1, 1), (1, ckks.SEEDS_FORWARDED), (2, 0)):
        size = ckks.block_bytes(full, bits, ckks.RING_DIMENSION, *form)
        assert size <= ckks.BLOCK_BYTES_MAX
        assert ckks.form_problem(bytes(16), bits, ckks.RING_DIMENSION, *form) is None
    more = ckks.block_bytes(full + 1, bits, ckks.RING_DIMENSION, 2, 0)
    assert more + 32 * ckks.SEED_RECORD_BYTES > ckks.BLOCK_BYTES_MAX


@pytest.mark.parametrize(
    ("profile", "up", "down"), [("compact", 4.1, 8.2), ("standard", 5.6, 11.2)]
)
def test_a_parameter_takes_few_bytes(profile: str, up: float, down: float) -> None:
    bits = ckks.PROFILES[profile]
    assert bits / 8 <= ckks.bytes_per_parameter(bits, 1, 1) <= up
    assert ckks.bytes_per_parameter(bits, 1, ckks.SEEDS_FORWARDED) <= up
    assert bits / 4 <= ckks.bytes_per_parameter(bits, 2, 0) <= down


@pytest.mark.parametrize(
    ("change", "story"),
    [
        ({"fingerprint": b"x"}, "a fingerprint of 1 bytes; it has 16"),
        ({"limb_bits": 33}, "limbs of 33 bits; known are 32, 44, 48, 52"),
        ({"ring_dimension": 0}, "a ring dimension of 0; allowed are powers of two"),
        ({"ring_dimension": 3000}, "a ring dimension of 3000"),
        ({"ring_dimension": 1 << 17}, "a ring dimension of 131072"),
        ({"polynomials": 0}, "0 polynomials and 1 seeds; allowed are 1 with 1 to 1024"),
        ({"seeds": 0}, "1 polynomials and 0 seeds"),
        ({"seeds": 1025}, "1 polynomials and 1025 seeds"),
        ({"polynomials": 2}, "2 polynomials and 1 seeds"),
        ({"ring_dimension": 1 << 16}, "blocks of 360532 bytes.*; at most 262144"),
    ],
)
def test_a_wrong_form_is_named(change: dict[str, int | bytes], story: str) -> None:
    good = {
        "fingerprint": bytes(16),
        "limb_bits": 44,
        "ring_dimension": 2048,
        "polynomials": 1,
        "seeds": 1,
    }
    assert ckks.form_problem(**good) is None  # type: ignore[arg-type]
    problem = ckks.form_problem(**{**good, **change})  # type: ignore[arg-type]
    assert problem is not None
    assert re.search(story, problem), problem


# ---- Shares --------------------------------------------------------------------

shares = st.dictionaries(
    st.sampled_from("abcdefgh"), st.floats(1e-6, 1000, allow_nan=False), min_size=1
).map(lambda found: sorted(found.items()))


@given(shares, st.integers(1, 8), st.floats(0.01, 1))
def test_a_site_opens_only_sums_of_enough_sites_without_a_giant(
    held: list[tuple[str, float]], fewest: int, most: float
) -> None:
    refused = ckks.check_shares(held, fewest, most)
    total = math.fsum(weight for _, weight in held)
    giant = max(held, key=lambda share: share[1])
    if len(held) < fewest:
        assert f"{len(held)} updates" in refused
        assert f"fewer than {fewest}" in refused
    elif giant[1] > most * total:
        assert refused.startswith(f"{giant[0]} is ")
    else:
        assert not refused


def test_a_site_that_is_the_whole_sum_is_refused_unless_the_key_allows_it() -> None:
    assert "b is 99.0% of it" in ckks.check_shares([("a", 1.0), ("b", 99.0)], 2, 0.95)
    assert "0 updates" in ckks.check_shares([], 1, 1.0)
    assert ckks.check_shares([("a", 3.0)], 1, 1.0) == ""
