"""One encrypted block: sealed and opened, seeds and what they stand for, refusals, kernels."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from metisfl.native_c import ArgumentError, bench_limb_pass, crc32c
from metisfl.native_c.ckks import (
    BlockError,
    Context,
    Fold,
    block_bytes,
    expand,
    open_block,
    reseed,
    seal_block,
)

RING = 1024
FINGERPRINT = b"0123456789abcdef"
EXPONENTS = b"exponents digest"
STANDARD = Context(FINGERPRINT, 44, RING, 2**44 - 16383)

Limbs = NDArray[np.uint64]

contexts = st.sampled_from([32, 44, 48, 52]).flatmap(
    lambda bits: st.sampled_from([2 ** (bits - 1) + 11, 2**bits - 1, 2**bits - 16383]).map(
        lambda modulus: Context(FINGERPRINT, bits, RING, modulus)
    )
)


def random_limbs(context: Context, rows: int, number: int) -> Limbs:
    return np.random.default_rng(number).integers(0, context.modulus, (rows, RING), np.uint64)


def sealed(context: Context, c0: Limbs, **half: Any) -> bytearray:
    polynomials = 2 if "c1" in half else 1
    block = bytearray(block_bytes(context, len(c0), polynomials, 2 - polynomials))
    seal_block(context, index=2, count=5, exponents_digest=EXPONENTS, c0=c0, out=block, **half)
    return block


def opened(context: Context, block: bytes | bytearray, rows: int = 1) -> tuple[Limbs, Limbs]:
    c0, c1 = np.zeros((2, rows, RING), np.uint64)
    open_block(context, block, index=2, count=5, exponents_digest=EXPONENTS, c0=c0, c1=c1)
    return c0, c1


# ---- seal and open -------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(contexts, st.integers(1, 3), st.integers(0, 2**32))
def test_opening_undoes_sealing(context: Context, rows: int, number: int) -> None:
    c0, c1 = random_limbs(context, rows, number), random_limbs(context, rows, number + 1)
    c0[0, :3] = 0, context.modulus - 1, 1
    found = opened(context, sealed(context, c0, c1=c1), rows)
    assert (found[0] == c0).all()
    assert (found[1] == c1).all()
    seed = struct.pack("<QQ", number, 7)
    found = opened(context, sealed(context, c0, seed=seed), rows)
    assert (found[0] == c0).all()
    assert all((found[1][row] == expand(context, seed, row)).all() for row in range(rows))


def test_a_block_lies_as_the_header_file_says() -> None:
    """All of it, put together here by other means."""
    seed = bytes(range(16))
    c0 = random_limbs(STANDARD, 2, 1)
    limbs = sum(int(limb) << 44 * place for place, limb in enumerate(c0.ravel()))
    payload = seed + struct.pack("<I", 1) + limbs.to_bytes(2 * RING * 44 // 8, "little")
    header = struct.pack("<4s4B16s16sIIHHI", b"MFCB", 1, 44, 10, 1, FINGERPRINT, EXPONENTS, 2, 5, 2,
                         1, len(payload)) + struct.pack("<I", crc32c(payload))  # fmt: skip
    assert sealed(STANDARD, c0, seed=seed) == header + struct.pack("<I", crc32c(header)) + payload


def test_a_limb_at_or_above_the_modulus_stands_for_its_residue() -> None:
    context = Context(FINGERPRINT, 32, RING, 2**31 + 11)
    block = sealed(context, random_limbs(context, 1, 1), c1=random_limbs(context, 1, 2))
    block[64:72] = struct.pack("<II", 2**32 - 1, 2**31 + 11)
    block[56:60] = struct.pack("<I", crc32c(block[64:]))
    block[60:64] = struct.pack("<I", crc32c(block[:60]))
    assert opened(context, block)[0][0, :2].tolist() == [2**31 - 12, 0]


def test_a_full_block_fills_a_chunk() -> None:
    """The largest number of ciphertexts whose block of two polynomials is within 256 KiB."""
    fulls = {bits: Context(FINGERPRINT, bits, 2048, 0) for bits in (32, 44, 48, 52)}
    assert {bits: full.block_ciphertexts for bits, full in fulls.items()} == {
        32: 15,
        44: 11,
        48: 10,
        52: 9,
    }
    assert fulls[44].poly_bytes == 11_264
    assert Context(FINGERPRINT, 52, 2**16, 0).block_ciphertexts == 1


# ---- seeds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "modulus", "ciphertext", "digest"),
    [
        (32, 2**32 - 12287, 0, "864f88014908d48b0912facc51ac092b6f4267ad123c2efac453df05966a482e"),
        (44, 2**44 - 16383, 0, "7e6301c4255aabadfcf3eba261733d16c5edba60ce56e235d9451006ff90e09c"),
        (48, 2**48 - 16383, 0, "375efd6b8c791b41bd5d13de56898ebbf77c01099a8466a9a87f143ac5dca564"),
        (52, 2**52 - 16383, 0, "8184033b65eb8c912b87bade67b838bc16dffe4e080786c31ea77bfc797c00b0"),
        (32, 2**31 + 11, 7, "e45cc76759c05c931622ddbcf551a48f165ae1d7a2970e37f7477ebe841f1d11"),
        (52, 2**51 + 21, 7, "facf15d3f7f675747b314653b2924a8756efefd0d1a0da15d4284b8712171ce8"),
    ],
)
def test_seeds_expand_to_what_openssl_says(
    bits: int, modulus: int, ciphertext: int, digest: str
) -> None:
    """SHA-256 of the 2,048 limbs as little-endian u64; in the last two, half the words are out."""
    context = Context(FINGERPRINT, bits, 2048, modulus)
    limbs = expand(context, bytes(range(16)), ciphertext)
    assert hashlib.sha256(limbs.astype("<u8").tobytes()).hexdigest() == digest


@settings(max_examples=30, deadline=None)
@given(contexts, st.integers(0, 2**32), st.integers(0, 2**64 - 4))
def test_reseeding_keeps_what_decrypts(context: Context, number: int, first: int) -> None:
    """c0' + a * s == c0 + c1 * s modulo q, with a from the seed: the same plaintext and noise."""
    c0, c1 = random_limbs(context, 3, number), random_limbs(context, 3, number + 1)
    secret = random_limbs(context, 1, number + 2)[0]
    c1[0, 0], secret[0] = context.modulus - 1, context.modulus - 1
    seed = struct.pack("<QQ", number, 3)
    after = c0.copy()
    reseed(context, after, c1, secret, seed, first)
    assert (after < context.modulus).all()
    a = np.array([expand(context, seed, first + row) for row in range(3)])
    s = secret.astype(object)
    before = c0.astype(object) + c1.astype(object) * s
    assert ((before - after.astype(object) - a.astype(object) * s) % context.modulus == 0).all()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "at", "value", "text"),
    [
        ("magic", 0, b"X", "58 46 43 42, not with MFCB"),
        ("version", 4, b"\2", "version 2, known: 1"),
        ("limb_bits", 5, b"\x34", "limbs of 52 bits, expected: 44"),
        ("ring", 6, b"\x0b", "2^11, expected: 1024"),
        ("polynomials", 7, b"\3", "3 polynomials a ciphertext, expected: 1"),
        ("fingerprint", 8, b"\xff", "key ff313233..., expected: 30313233..."),
        ("exponents", 24, b"\xff", "digest ff78..., expected: 6578..."),
        ("index", 40, b"\4", "block 4 came where block 2 was expected"),
        ("count", 44, b"\6", "one of 6, expected: one of 5"),
        ("length", 48, b"\2", "2 ciphertexts, expected: 1"),
        ("seeds", 50, b"\0", "0 seeds, allowed with 1 polynomials: 1 to 1024"),
        ("length", 52, b"\0", "declares"),
        ("weight", 80, b"\0", "seed 0 of a block has weight 0"),
    ],
)
def test_what_is_wrong_with_a_block_is_named(code: str, at: int, value: bytes, text: str) -> None:
    good = sealed(STANDARD, random_limbs(STANDARD, 1, 1), seed=bytes(16))
    other = sealed(STANDARD, random_limbs(STANDARD, 1, 2), seed=b"x" * 16)
    bad = good.copy()
    bad[at : at + len(value)] = value
    bad[56:60] = struct.pack("<I", crc32c(bad[64:]))
    bad[60:64] = struct.pack("<I", crc32c(bad[:60]))
    with Fold(STANDARD) as fold:
        fold.begin(2, 5, 1, EXPONENTS, 1)
        with pytest.raises(BlockError) as refused:
            fold.absorb_many([other, bad], [1, 1])
        assert (refused.value.code, refused.value.source) == (code, 1)
        assert text in str(refused.value)
        fold.absorb(good)  # nothing of the refused call has stayed
        out = bytearray(fold.out_bytes)
        fold.finalise(out)
    assert out == good
    if code != "polynomials":
        with pytest.raises(BlockError) as refused:
            opened(STANDARD, bad)
        assert refused.value.code == code


BLOCK = sealed(STANDARD, random_limbs(STANDARD, 1, 1), seed=bytes(16))
LIMBS = np.zeros((1, RING), np.uint64)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Fold(Context(b"short", 44, RING, STANDARD.modulus)), "fingerprint has 5 bytes"),
        (lambda: Fold(Context(FINGERPRINT, 40, RING, STANDARD.modulus)), "limbs of 40 bits"),
        (lambda: Fold(Context(FINGERPRINT, 44, -1, STANDARD.modulus)), "ring_dimension is -1"),
        (lambda: Fold(Context(FINGERPRINT, 44, RING, 2**64)), "modulus is 18446744073709551616"),
        (lambda: block_bytes(STANDARD, 0, 1, 1), "0 ciphertexts"),
        (lambda: block_bytes(STANDARD, 1, 2, 1), "1 seeds with 2 polynomials"),
        (lambda: expand(STANDARD, b"short", 0), "seed has 5 bytes, expected 16"),
        (lambda: expand(STANDARD, bytes(16), -1), "ciphertext is -1"),
        (lambda: sealed(STANDARD, LIMBS, seed=bytes(16), c1=LIMBS), "either a seed or c1"),
        (lambda: sealed(STANDARD, LIMBS), "either a seed or c1"),
        (lambda: sealed(STANDARD, LIMBS, c1=LIMBS[:, :9]), "c1 has shape (1, 9)"),
        (lambda: sealed(STANDARD, LIMBS.astype(np.int64), seed=bytes(16)), "dtype int64"),
        (lambda: sealed(STANDARD, LIMBS.astype(">u8"), seed=bytes(16)), "dtype >u8"),
        (lambda: sealed(STANDARD, LIMBS[:, ::2], seed=bytes(16)), "shape (1, 512)"),
        (lambda: sealed(STANDARD, np.zeros((RING, 2), np.uint64).T[:1], seed=bytes(16)), "c0: "),
        (lambda: sealed(STANDARD, LIMBS + 2**63, seed=bytes(16)), "limb 0 of c0"),
        (lambda: opened(STANDARD, bytearray(0), 0), "0 ciphertexts"),
        (lambda: reseed(STANDARD, LIMBS, LIMBS[:0], LIMBS[0], bytes(16)), "c1 has shape (0, 1024)"),
        (lambda: reseed(STANDARD, LIMBS, LIMBS, LIMBS[0, 1:], bytes(16)), "secret has shape"),
        (lambda: bench_limb_pass(LIMBS, LIMBS[:, 1:]), "8184 bytes of limbs for 8192 bytes"),
    ],
)
def test_a_bad_argument_is_named(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        call()
    assert text in str(refused.value)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda fold: fold.begin(5, 5, 1, EXPONENTS, 1), "block 5 of 5"),
        (lambda fold: fold.begin(0, 1, 1, b"", 1), "exponents_digest has 0 bytes"),
        (lambda fold: fold.absorb(BLOCK, 0), "weight of 0 is outside 1 to 2^32 - 1"),
        (lambda fold: fold.absorb(BLOCK, 2**32), "weight of 4294967296"),
        (lambda fold: fold.absorb_many([BLOCK], []), "1 blocks but 0 weights"),
        (lambda fold: fold.absorb_many([BLOCK, BLOCK], [1, 0]), "weight of 0"),
        (lambda fold: fold.absorb_many([BLOCK, np.ones((4, 4))[:, 1]], [1, 1]), "block: "),
        (lambda fold: fold.retract(BLOCK), "was not absorbed with a weight of 1"),
        (lambda fold: fold.finalise(bytearray(1)), "room for 1 bytes"),
        (lambda fold: fold.finalise(bytes(1)), "out: "),
    ],
)
def test_a_bad_argument_of_a_fold_is_named_and_changes_nothing(
    call: Callable[[Fold], None], text: str
) -> None:
    other = sealed(STANDARD, random_limbs(STANDARD, 1, 2), seed=b"x" * 16)
    out = bytearray(len(other))
    with Fold(STANDARD) as fold:
        fold.begin(2, 5, 1, EXPONENTS, 1)
        fold.absorb(other)
        with pytest.raises(ArgumentError) as refused:
            call(fold)
        fold.finalise(out)
    assert text in str(refused.value)
    assert out == other


def test_closed_is_closed() -> None:
    fold = Fold(STANDARD)
    fold.close()
    fold.close()
    calls: list[Callable[[], object]] = [
        lambda: fold.begin(0, 1, 1, EXPONENTS, 1),
        lambda: fold.absorb(BLOCK),
        lambda: fold.absorb_many([BLOCK], [1]),
        lambda: fold.retract(BLOCK),
        lambda: fold.out_bytes,
        lambda: fold.finalise(bytearray(4)),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="closed"):
            call()


# ---- kernels -------------------------------------------------------------------------------------

DIGEST = """
import hashlib, random
import numpy as np
from metisfl import native_c
from metisfl.native_c import ckks
source = np.random.default_rng(7)
digest = hashlib.sha256()
for bits in (32, 44, 48, 52):
    context = ckks.Context(bytes(16), bits, 1024, 2**bits - 16383)
    blocks = []
    for polynomials in (1, 2, 1, 1, 2):
        c0, c1 = source.integers(0, context.modulus, (2, 3, 1024), np.uint64)
        block = bytearray(ckks.block_bytes(context, 3, polynomials, 2 - polynomials))
        half = {"c1": c1} if polynomials == 2 else {"seed": source.bytes(16)}
        ckks.seal_block(context, index=0, count=1, exponents_digest=bytes(16), c0=c0, out=block,
                        **half)
        blocks.append(block)
    with ckks.Fold(context) as fold:
        fold.begin(0, 1, 3, bytes(16), 2)
        fold.absorb_many(blocks, [1, 2**32 - 1, 1, 5000, 1])
        fold.retract(blocks[3], 5000)
        out = bytearray(fold.out_bytes)
        fold.finalise(out)
        digest.update(out)
    ckks.open_block(context, out, index=0, count=1, exponents_digest=bytes(16), c0=c0, c1=c1)
    ckks.reseed(context, c0, c1, c0[1], b"sixteen byte seed"[:16])
    digest.update(c0)
print(native_c.kernel(), digest.hexdigest())
"""


def test_the_portable_kernels_give_the_same_bits() -> None:
    printed = {}
    for kernel in ("", "portable"):
        ran = subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "METIS_KERNEL": kernel},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        printed[kernel] = ran.stdout.split()
    assert printed["portable"][0] == "portable"
    assert printed[""][1] == printed["portable"][1], printed
