"""Masks over partial decryptions: the controller adds what it cannot read, a site takes them off.

Rule 1: a mask is drawn under a key that only the sites have, with a nonce of its own for each
block, from the operating system. A sum of masked partials is as good as random to whoever lacks the
key.
Rule 2: a masked partial travels as a block of one polynomial, its nonce in the place of a seed. So
the fold carries the nonces along, and refuses one that comes twice.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from metisfl.native_c import ckks as native
from metisfl.proto.ckks import BLOCK_HEADER_BYTES
from metisfl.proto.errors import PeerError

__all__ = ["hide", "reveal"]

Limbs = NDArray[np.uint64]

_SEEDS: Final = struct.Struct("<H")  # their number in a block's header, as native_c/metis.h says
_SEEDS_AT: Final = 50
_RECORD: Final = struct.Struct("<16sI")
_DOMAIN: Final = b"metisfl mask"


def hide(context: native.Context, limbs: Limbs, mask_key: bytes, **place: Any) -> bytearray:
    """A block of masked partials. `limbs`, (ciphertexts, N), are below the modulus."""
    nonce = os.urandom(native.SEED_BYTES)
    masked = (limbs + _mask(context, mask_key, nonce, limbs.shape)) % np.uint64(context.modulus)
    block = bytearray(native.block_bytes(context, len(limbs), 1, 1))
    native.seal_block(context, c0=masked, c1=None, seed=nonce, out=block, **place)
    return block


def reveal(
    context: native.Context,
    block: bytes | bytearray | memoryview,
    mask_key: bytes,
    *,
    ciphertexts: int,
    **place: Any,
) -> tuple[Limbs, int]:
    """The sum of partials in a block, (ciphertexts, N), and how many they are.

    Raises BlockError, and PeerError for one that was weighted.
    """
    shape = ciphertexts, context.ring_dimension
    sums, unused = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    native.open_block(context, block, c0=sums, c1=unused, **place)
    (count,) = _SEEDS.unpack_from(block, _SEEDS_AT)
    modulus = np.uint64(context.modulus)
    for position in range(count):
        nonce, weight = _RECORD.unpack_from(block, BLOCK_HEADER_BYTES + position * _RECORD.size)
        if weight != 1:
            raise PeerError(f"a partial was added {weight} times; it may be once")
        sums += modulus - _mask(context, mask_key, nonce, shape)
        sums %= modulus
    return sums, count


def _mask(context: native.Context, mask_key: bytes, nonce: bytes, shape: tuple[int, ...]) -> Limbs:
    """AES-128 in counter mode, cut into limbs below the modulus as native_c/metis.h says."""
    seed = hmac.digest(mask_key, _DOMAIN + nonce, hashlib.sha256)[: native.SEED_BYTES]
    return np.stack([native.expand(context, seed, row) for row in range(shape[0])])
