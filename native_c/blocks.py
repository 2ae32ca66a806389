"""One block of CKKS ciphertexts: its kind, its length, and what a site makes of it.

Rule: this file decides nothing. metis.h states what a block is and how seeds become limbs; C
enforces it. What is wrong with a block becomes a BlockError: the caller knows whose block it was.
What is wrong with the call is an ArgumentError, a defect of ours. Use it through ckks.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metisfl.native_c import ArgumentError, Buffer, WritableBuffer, _borrow, _size
from metisfl.native_c._ffi import ffi, lib

__all__ = [
    "BLOCK_SEEDS_MAX",
    "SEED_BYTES",
    "BlockError",
    "Context",
    "block_bytes",
    "check",
    "context_in_c",
    "expand",
    "open_block",
    "range_in_c",
    "reseed",
    "seal_block",
]

SEED_BYTES = int(lib.METIS_SEED_BYTES)
BLOCK_SEEDS_MAX = int(lib.METIS_BLOCK_SEEDS_MAX)
"""The most seeds that one block can carry."""

_TARGET_BYTES = 2**18
"""A full block of two polynomials and 32 seeds stays within this: one transport chunk."""
_TARGET_SEEDS = 32

_CODES: dict[int, str] = {
    lib.METIS_BLOCK_MAGIC: "magic",
    lib.METIS_BLOCK_VERSION: "version",
    lib.METIS_BLOCK_FINGERPRINT: "fingerprint",
    lib.METIS_BLOCK_LIMB_BITS: "limb_bits",
    lib.METIS_BLOCK_RING: "ring",
    lib.METIS_BLOCK_POLYNOMIALS: "polynomials",
    lib.METIS_BLOCK_EXPONENTS: "exponents",
    lib.METIS_BLOCK_INDEX: "index",
    lib.METIS_BLOCK_COUNT: "count",
    lib.METIS_BLOCK_LENGTH: "length",
    lib.METIS_BLOCK_SEEDS: "seeds",
    lib.METIS_BLOCK_CHECKSUM: "checksum",
    lib.METIS_BLOCK_DUPLICATE: "duplicate",
    lib.METIS_BLOCK_WEIGHT: "weight",
}


class BlockError(ValueError):
    """A block is damaged or of another kind: the fault of whoever made or moved it.

    `code` is one of magic, version, fingerprint, limb_bits, ring, polynomials, exponents, index,
    count, length, seeds, checksum, duplicate, weight. `source` is the position of the block among
    those that the call was given. No sum and no output was changed.
    """

    def __init__(self, text: str, code: str, source: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.source = source


@dataclass(frozen=True, slots=True)
class Context:
    """The kind of ciphertext. Any call with it raises ArgumentError for values out of bounds."""

    fingerprint: bytes
    """Of the key's public part: 16 bytes."""
    limb_bits: int
    """32, 44, 48 or 52."""
    ring_dimension: int
    """Limbs of a polynomial: a power of two, 2^10 to 2^16."""
    modulus: int
    """Odd, of exactly `limb_bits` bits."""

    @property
    def poly_bytes(self) -> int:
        """The bytes of one packed polynomial."""
        return self.ring_dimension * self.limb_bits // 8

    @property
    def block_ciphertexts(self) -> int:
        """Ciphertexts of a full block, the same for blocks of one polynomial and of two."""
        header = int(lib.METIS_BLOCK_HEADER_BYTES) + _TARGET_SEEDS * (SEED_BYTES + 4)
        return max(1, (_TARGET_BYTES - header) // (2 * self.poly_bytes))


def block_bytes(context: Context, ciphertexts: int, polynomials: int, seeds: int) -> int:
    """The length of a block of 1 to 1024 ciphertexts.

    One polynomial comes with 1 to BLOCK_SEEDS_MAX seeds, two come with none. Raises ArgumentError.
    """
    out = ffi.new("size_t *")
    check(
        lib.metis_ckks_block_bytes(
            context_in_c(context),
            _u32("ciphertexts", ciphertexts),
            _u32("polynomials", polynomials),
            _u32("seeds", seeds),
            out,
        )
    )
    return int(out[0])


def seal_block(
    context: Context,
    *,
    index: int,
    count: int,
    exponents_digest: bytes,
    c0: NDArray[np.uint64],
    c1: NDArray[np.uint64] | None = None,
    seed: bytes | None = None,
    out: WritableBuffer,
) -> None:
    """Writes block `index` of `count` from the limbs `c0`, (ciphertexts, ring dimension).

    With `seed` (16 bytes) it has one polynomial; with `c1`, shaped like `c0`, it has two. `out`
    has exactly `block_bytes`. Raises ArgumentError, also for a limb that is not below the modulus.
    """
    if (c1 is None) == (seed is None):
        raise ArgumentError("a block is sealed with either a seed or c1")
    if c1 is not None and c1.shape != c0.shape:
        raise ArgumentError(f"c1 has shape {c1.shape}, c0 has {c0.shape}")
    polynomials = 1 if c1 is None else 2
    place = range_in_c(index, count, _rows("c0", c0, context), exponents_digest, polynomials)
    with _borrow("out", out, writable=True) as target:
        status = lib.metis_ckks_seal_block(
            context_in_c(context),
            place,
            _limbs("c0", c0),
            ffi.NULL if c1 is None else _limbs("c1", c1),
            c0.size,
            ffi.NULL if seed is None else _seed(seed),
            target,
            len(target),
        )
    check(status)


def open_block(
    context: Context,
    block: Buffer,
    *,
    index: int,
    count: int,
    exponents_digest: bytes,
    c0: NDArray[np.uint64],
    c1: NDArray[np.uint64],
) -> None:
    """Checks a block and writes its limbs to `c0` and `c1`, (ciphertexts, ring dimension) each.

    c1 is unpacked, or rebuilt from the seeds. Every limb is below the modulus. Raises BlockError,
    ArgumentError; then neither array has changed.
    """
    if c1.shape != c0.shape:
        raise ArgumentError(f"c1 has shape {c1.shape}, c0 has {c0.shape}")
    place = range_in_c(index, count, _rows("c0", c0, context), exponents_digest, 0)
    with _borrow("block", block) as source:
        status = lib.metis_ckks_open_block(
            context_in_c(context),
            place,
            source,
            len(source),
            _limbs("c0", c0, writable=True),
            _limbs("c1", c1, writable=True),
            c0.size,
        )
    check(status)


def reseed(
    context: Context,
    c0: NDArray[np.uint64],
    c1: NDArray[np.uint64],
    secret: NDArray[np.uint64],
    seed: bytes,
    first_ciphertext: int = 0,
) -> None:
    """Replaces the uniform half of encryptions under the secret key by what `seed` expands to.

    In place, for each row j: c0 += (c1 - expand(seed, first_ciphertext + j)) * secret, modulo q.
    `c0`, `c1`: (ciphertexts, ring dimension); `secret`: (ring dimension,); all limbs in EVALUATION
    format, below the modulus. The new c1 is the expansion. Raises ArgumentError.
    """
    if c1.shape != c0.shape:
        raise ArgumentError(f"c1 has shape {c1.shape}, c0 has {c0.shape}")
    _rows("c0", c0, context)
    if secret.shape != (context.ring_dimension,):
        raise ArgumentError(f"secret has shape {secret.shape}, not ({context.ring_dimension},)")
    check(
        lib.metis_ckks_reseed(
            context_in_c(context),
            _limbs("c0", c0, writable=True),
            _limbs("c1", c1),
            c0.size,
            _limbs("secret", secret),
            _seed(seed),
            _size("first_ciphertext", first_ciphertext),
        )
    )


def expand(context: Context, seed: bytes, ciphertext: int) -> NDArray[np.uint64]:
    """The uniform polynomial, (ring dimension,), that `seed` stands for in this ciphertext.

    `ciphertext` counts inside a block, from 0. Raises ArgumentError.
    """
    out = np.empty(context.ring_dimension, np.uint64)
    check(
        lib.metis_ckks_expand(
            context_in_c(context),
            _seed(seed),
            _size("ciphertext", ciphertext),
            _limbs("out", out, writable=True),
            out.size,
        )
    )
    return out


def context_in_c(context: Context) -> Any:
    """Raises ArgumentError for what C has no room for; the bounds themselves are C's."""
    return ffi.new(
        "metis_ckks_context *",
        {
            "fingerprint": _exact("fingerprint", context.fingerprint, 16),
            "modulus": _size("modulus", context.modulus),
            "limb_bits": _u32("limb_bits", context.limb_bits),
            "ring_dimension": _u32("ring_dimension", context.ring_dimension),
        },
    )


def range_in_c(
    index: int, count: int, ciphertexts: int, exponents_digest: bytes, polynomials: int
) -> Any:
    """Likewise."""
    return ffi.new(
        "metis_ckks_range *",
        {
            "exponents_digest": _exact("exponents_digest", exponents_digest, 16),
            "index": _u32("index", index),
            "count": _u32("count", count),
            "ciphertexts": _u32("ciphertexts", ciphertexts),
            "polynomials": _u32("polynomials", polynomials),
        },
    )


def _seed(seed: bytes) -> Any:
    return ffi.new("uint8_t[]", _exact("seed", seed, SEED_BYTES))


def _limbs(name: str, limbs: NDArray[np.uint64], *, writable: bool = False) -> Any:
    """The array as C takes it; it lives as long as the caller's own reference."""
    if limbs.dtype != np.uint64 or not limbs.flags.aligned:
        raise ArgumentError(f"{name} has dtype {limbs.dtype}, allowed: aligned uint64")
    with _borrow(name, limbs, writable=writable) as memory:
        return ffi.cast("uint64_t *", memory)


def _rows(name: str, limbs: NDArray[np.uint64], context: Context) -> int:
    """How many polynomials the array holds."""
    if limbs.ndim != 2 or limbs.shape[1] != context.ring_dimension:
        raise ArgumentError(
            f"{name} has shape {limbs.shape}, allowed: (ciphertexts, {context.ring_dimension})"
        )
    return int(limbs.shape[0])


def _exact(name: str, value: bytes, length: int) -> bytes:
    if len(value) != length:
        raise ArgumentError(f"{name} has {len(value)} bytes, expected {length}")
    return bytes(value)


def _u32(name: str, value: int) -> int:
    if not 0 <= value < 2**32:
        raise ArgumentError(f"{name} is {value}, outside 0 to 2^32 - 1")
    return value


def check(status: int) -> None:
    """Raises what a status of C stands for."""
    if status == lib.METIS_OK:
        return
    text: str = ffi.string(lib.metis_error_text()).decode("utf-8", "replace")
    if status == lib.METIS_ERR_BLOCK:
        source = ffi.new("size_t *")
        code = _CODES[int(lib.metis_block_fault_last(source))]
        raise BlockError(text, code, int(source[0]))
    raise MemoryError(text) if status == lib.METIS_ERR_MEMORY else ArgumentError(text)
