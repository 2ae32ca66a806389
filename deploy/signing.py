"""What a site says, signed with its identity: whoever has its public line can tell that it said so.

Rule: XEdDSA as Signal specifies it (https://signal.org/docs/specifications/xeddsa/), over
libsodium's Ed25519. A CURVE key is an X25519 key, so that no second key has to be handed round. A
signature tells nothing of the key, and there is none for a key that is not in its one encoding, or
that has nobody's secret behind it.

Keys are in Z85; a signature has 64 bytes.
"""

from __future__ import annotations

import hashlib
import os
from types import ModuleType
from typing import Final

from zmq.utils import z85

from metisfl.deploy.keys import Identity
from metisfl.proto.errors import MachineError

__all__ = ["SIGNATURE_BYTES", "is_signed", "sign"]

SIGNATURE_BYTES: Final = 64
PRIME: Final = 2**255 - 19
HASH1: Final = (2**256 - 2).to_bytes(32, "little")
"""What stands before what XEdDSA calls hash1: no encoding of a point."""


def sign(identity: Identity, message: bytes) -> bytes:
    """Sign `message`. Two signatures of one message differ. Raises MachineError."""
    sodium = _sodium()
    secret, point = _edwards_pair(sodium, z85.decode(identity.secret))
    nonce = _scalar(sodium, HASH1, secret, message, os.urandom(64))
    commitment = sodium.crypto_scalarmult_ed25519_base_noclamp(nonce)
    challenge = _scalar(sodium, commitment, point, message)
    product = sodium.crypto_core_ed25519_scalar_mul(challenge, secret)
    answer: bytes = sodium.crypto_core_ed25519_scalar_add(nonce, product)
    return bytes(commitment) + answer


def is_signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether the holder of `public` (Z85) has signed `message`. Raises MachineError."""
    sodium = _sodium()
    point = _edwards_point(z85.decode(public))
    if point is None or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        sodium.crypto_sign_open(signature + message, point)
    except _bad_signature():
        return False
    return True


def _edwards_pair(sodium: ModuleType, x25519: bytes) -> tuple[bytes, bytes]:
    """The scalar and the point with an even x whose secret and public key these are."""
    clamped = bytes([x25519[0] & 248]) + x25519[1:31] + bytes([x25519[31] & 127 | 64])
    secret = sodium.crypto_core_ed25519_scalar_reduce(clamped + bytes(32))
    point = sodium.crypto_scalarmult_ed25519_base_noclamp(secret)
    if point[31] & 128:
        secret = sodium.crypto_core_ed25519_scalar_negate(secret)
        point = point[:31] + bytes([point[31] & 127])
    return secret, point


def _edwards_point(x25519: bytes) -> bytes | None:
    """The same point from the public key alone: y = (u - 1) / (u + 1). None: there is none."""
    u = int.from_bytes(x25519, "little")
    if u >= PRIME - 1:  # not the one encoding; or -1, where y is not defined
        return None
    return ((u - 1) * pow(u + 1, -1, PRIME) % PRIME).to_bytes(32, "little")


def _scalar(sodium: ModuleType, *parts: bytes) -> bytes:
    digest = hashlib.sha512(b"".join(parts)).digest()
    scalar: bytes = sodium.crypto_core_ed25519_scalar_reduce(digest)
    return scalar


def _bad_signature() -> type[Exception]:
    import nacl.exceptions

    return nacl.exceptions.BadSignatureError


def _sodium() -> ModuleType:
    try:
        import nacl.bindings
    except ImportError as error:
        raise MachineError(
            f"signing needs PyNaCl, which cannot be loaded ({error}); install it with "
            "`pip install metisfl[fhe]`"
        ) from None
    return nacl.bindings
