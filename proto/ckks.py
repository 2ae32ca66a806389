"""Encrypted models: what follows from the number of learners and the limb size, by arithmetic.

Rule 1: every bound here is exact or errs to the safe side. A sum within them never wraps, and the
grid always gives back the exact sum.
Rule 2: nothing here knows OpenFHE, a key or a file. Who cannot decrypt can check all of it.

The scheme: CKKS with one modulus q of k bits, depth 0, one value in each coefficient of a
polynomial of N. A learner divides a value by its tensor's scale 2^e, multiplies it by its weight
and rounds it to a multiple of 2^-g; encryption scales that by 2^p to a whole number and adds noise.
The controller adds. After decryption the sum is rounded to the grid again, which removes the noise:
every site has the same bits.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

__all__ = [
    "ERROR",
    "EXPONENT_MAX",
    "JOINT",
    "JOINT_PROFILE",
    "LEARNERS_MAX",
    "PROFILES",
    "RING_DIMENSION",
    "SEEDS_FORWARDED",
    "Parameters",
    "block_bytes",
    "block_ciphertexts",
    "bytes_per_parameter",
    "check_shares",
    "ciphertexts",
    "exponent_for",
    "exponents_digest",
    "fits",
    "form_problem",
    "joint_sites_max",
    "noise_bound",
    "parameters_for",
    "payload_bytes",
    "smallest_profile",
    "weights_fit",
]

PROFILES: Final[Mapping[str, int]] = MappingProxyType(
    {"compact": 32, "standard": 44, "fine": 48, "wide": 52}
)
"""Limb bits k by name, smallest first."""
JOINT: Final = "ckks-threshold"
"""The privacy mode in which nobody holds the whole key."""
JOINT_PROFILE: Final = "wide"
"""The one whose precision the flooding of partial decryptions leaves room in."""
RING_DIMENSION: Final = 2048
"""What 128-bit security asks for with a modulus of 27 to 54 bits (HEStd_128_classic)."""
MODULUS_GAP: Final = 1 << 20
"""q is the largest prime below 2^k that is 1 modulo 2N: of these four nearer to 2^k than this."""
LEARNERS_MAX: Final = 1000
ERROR: Final = 1e-6
"""The promised error of a mean, relative to the tensor's scale, unless another is asked for."""
EXPONENT_MAX: Final = 1100  # beyond the largest float64 with its headroom
HEADROOM_BITS: Final = 2  # a tensor may grow fourfold in a round before the round opens again
SEEDS_FORWARDED: Final = 16
"""Up to so many updates the sum travels with their seeds, which learners expand; of more the
controller expands them, and both halves travel."""

WEIGHT_ROUNDING: Final = 1e-9

SIGMA: Final = 3.2
"""Standard deviation of a fresh coefficient's noise, encrypted with the secret key (HEStd)."""
SIGMA_PUBLIC: Final = 190.0
"""The same with the public key at N = 2048, as measured; it grows with the root of N."""
SIGMA_FLOODING: Final = 2.0**20
"""That of the noise in a partial decryption: OpenFHE's NoiseFlooding::MP_SD, which is fixed."""
NOISE_DEVIATIONS: Final = 8
"""Beyond so many a Gaussian lies once in 8e14 values."""

BLOCK_BYTES_MAX: Final = 256 * 1024
BLOCK_HEADER_BYTES: Final = 64
SEED_RECORD_BYTES: Final = 20
SEEDS_MAX: Final = 1024
_ROOM_FOR_SEEDS: Final = 32 * SEED_RECORD_BYTES


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a profile comes to for a number of learners."""

    limb_bits: int
    learners: int
    """The most ciphertexts in a sum, and the largest sum of weights."""
    scaling_bits: int
    """p: a value of 1 is encrypted as 2^p."""
    grid_bits: int
    """g: values and sums are multiples of 2^-g; below 1 there is no usable grid."""

    @property
    def error(self) -> float:
        """The largest error of a mean whose weights sum to their number, relative to the scale.

        Each learner rounds by half a grid step at the most, and nothing else is lost.
        """
        return math.ldexp(1.0, -(self.grid_bits + 1))


def noise_bound(
    learners: int, *, public_key: bool = False, joint: bool = False, ring: int = RING_DIMENSION
) -> float:
    """The most that a sum of so many ciphertexts is off, in units of 2^-p.

    `joint`: under a joint key of as many sites. Its noise is that of all their public keys, and
    each site's partial decryption floods it with more.

    Fresh noise adds up like a random walk; the encoder's rounding is at most one each. With 52
    bits float64 shows in the transforms, too: a standard deviation of 3.8 was measured for one
    learner, eight of which are still within half a grid step.
    """
    public = SIGMA_PUBLIC * math.sqrt(ring / RING_DIMENSION)
    sigma = public if public_key else SIGMA
    if joint:
        sigma = math.hypot(public * math.sqrt(learners), SIGMA_FLOODING)
    return NOISE_DEVIATIONS * sigma * math.sqrt(learners) + learners


def parameters_for(
    limb_bits: int,
    learners: int,
    *,
    modulus: int = 0,
    public_key: bool = False,
    joint: bool = False,
) -> Parameters:
    """The finest scale at which no sum wraps, and the finest grid that the noise cannot cross.

    A sum of weights up to W = `learners` is at most W * 2^p, half a grid step a learner, and the
    noise; it must stay below q / 2. The step 2^(p-g) must be more than twice the noise.
    `modulus` 0: the smallest that the limb size can have.
    """
    modulus = modulus or (1 << limb_bits) - MODULUS_GAP
    noise = math.ceil(noise_bound(learners, public_key=public_key, joint=joint))
    step_bits = (2 * noise).bit_length()
    room = (modulus - 1) // 2 - noise - learners * (1 << (step_bits - 1))
    scaling_bits = max(0, (room // learners).bit_length() - 1) if room >= learners else 0
    return Parameters(limb_bits, learners, scaling_bits, scaling_bits - step_bits)


def smallest_profile(learners: int, error: float = ERROR) -> str:
    """The profile with the fewest bytes that keeps the error; "" if none does."""
    for name, limb_bits in PROFILES.items():
        parameters = parameters_for(limb_bits, learners)
        if parameters.grid_bits > 0 and parameters.error <= error:
            return name
    return ""


def joint_sites_max(error: float = ERROR) -> int:
    """The most sites whose joint key keeps the error."""
    limb_bits, sites = PROFILES[JOINT_PROFILE], 1
    while sites < LEARNERS_MAX:
        found = parameters_for(limb_bits, sites + 1, joint=True)
        if found.grid_bits < 1 or found.error > error:
            break
        sites += 1
    return sites


def weights_fit(weight_sum: float, learners: int) -> bool:
    """Whether a sum of weights is within what the scale of a key for so many learners can hold.

    Weights that sum to their number exactly may come out a rounding above it; W * 2^p is at least a
    thousandth below q / 2, since W is a whole number up to 1000.
    """
    return weight_sum <= learners * (1 + WEIGHT_ROUNDING)


# ---- Exponents ---------------------------------------------------------------


def exponent_for(largest: float) -> int:
    """The exponent that a tensor needs whose largest absolute value this is (finite, >= 0).

    The smallest power of two that holds it, with two bits of headroom, and at least 0.
    """
    if not largest:
        return 0
    fraction, exponent = math.frexp(largest)
    ceiling = exponent - 1 if fraction == 0.5 else exponent
    return max(0, ceiling + HEADROOM_BITS)


def fits(largest: float, exponent: int) -> bool:
    """Whether a value of this size is within the scale 2^exponent."""
    return math.ldexp(largest, -exponent) <= 1.0


def exponents_digest(exponents: Iterable[int], opens: bytes = b"") -> bytes:
    """The 16 bytes that stand for a set of exponents: of SHA-256 over them as little-endian i16.

    For partials also over the digest of the model that they open: those of two do not mix.
    """
    numbers = list(exponents)
    return hashlib.sha256(struct.pack(f"<{len(numbers)}h", *numbers) + opens).digest()[:16]


# ---- Blocks (native_c/metis.h has the layout) -----------------------------------


def ciphertexts(values: int, ring_dimension: int) -> int:
    """Ciphertexts that hold so many values."""
    return -(-values // ring_dimension)


def block_ciphertexts(limb_bits: int, ring_dimension: int) -> int:
    """Ciphertexts of a full block: as many as fit a chunk with both their polynomials."""
    room = BLOCK_BYTES_MAX - BLOCK_HEADER_BYTES - _ROOM_FOR_SEEDS
    return max(1, room // (2 * ring_dimension * limb_bits // 8))


def block_bytes(
    count: int, limb_bits: int, ring_dimension: int, polynomials: int, seeds: int
) -> int:
    """Bytes of a block of `count` ciphertexts."""
    limbs = count * polynomials * (ring_dimension * limb_bits // 8)
    return BLOCK_HEADER_BYTES + seeds * SEED_RECORD_BYTES + limbs


def payload_bytes(
    values: int, limb_bits: int, ring_dimension: int, polynomials: int, seeds: int
) -> int:
    """Bytes of all blocks of a model with so many values."""
    full, rest = divmod(
        ciphertexts(values, ring_dimension), block_ciphertexts(limb_bits, ring_dimension)
    )
    form = (limb_bits, ring_dimension, polynomials, seeds)
    whole = block_bytes(block_ciphertexts(limb_bits, ring_dimension), *form)
    return full * whole + (block_bytes(rest, *form) if rest else 0)


def bytes_per_parameter(limb_bits: int, polynomials: int, seeds: int) -> float:
    """Bytes of a large model's payload for each of its values."""
    count = block_ciphertexts(limb_bits, RING_DIMENSION)
    size = block_bytes(count, limb_bits, RING_DIMENSION, polynomials, seeds)
    return size / (count * RING_DIMENSION)


def form_problem(
    fingerprint: bytes, limb_bits: int, ring_dimension: int, polynomials: int, seeds: int
) -> str | None:
    """What is wrong with a foreign description of blocks; None if nothing is."""
    if len(fingerprint) != 16:
        return f"a fingerprint of {len(fingerprint)} bytes; it has 16"
    if limb_bits not in PROFILES.values():
        return f"limbs of {limb_bits} bits; known are {', '.join(map(str, PROFILES.values()))}"
    if not 1 << 10 <= ring_dimension <= 1 << 16 or ring_dimension & (ring_dimension - 1):
        return f"a ring dimension of {ring_dimension}; allowed are powers of two, 2^10 to 2^16"
    if (polynomials, bool(seeds)) not in ((1, True), (2, False)) or seeds > SEEDS_MAX:
        return (
            f"{polynomials} polynomials and {seeds} seeds; allowed are 1 with 1 to {SEEDS_MAX} "
            "seeds, or 2 with none"
        )
    most = block_ciphertexts(limb_bits, ring_dimension)
    size = block_bytes(most, limb_bits, ring_dimension, polynomials, seeds)
    if size > BLOCK_BYTES_MAX:
        return (
            f"blocks of {size} bytes, with a ring dimension of {ring_dimension}, limbs of "
            f"{limb_bits} bits, {polynomials} polynomials and {seeds} seeds; at most "
            f"{BLOCK_BYTES_MAX}"
        )
    return None


def check_shares(
    shares: Sequence[tuple[str, float]], min_contributors: int, max_share: float
) -> str:
    """Why a site must not open a sum of these learners' weights; "" if it may."""
    if len(shares) < min_contributors:
        return (
            f"it holds {len(shares)} updates; this key's sites open no model of fewer than "
            f"{min_contributors}"
        )
    total = math.fsum(weight for _, weight in shares)
    name, weight = max(shares, key=lambda share: share[1])
    if not weight <= max_share * total * (1 + WEIGHT_ROUNDING):  # NaN is refused, too
        return (
            f"{name} is {weight / total:.1%} of it; this key's sites open no model of which one "
            f"site is more than {max_share:.1%}"
        )
    return ""
