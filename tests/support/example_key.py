"""A key for tests that need none of its cryptography."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart, SecretPart

FOUND = ckks.parameters_for(44, 10)
PUBLIC = PublicPart(
    profile="standard",
    limb_bits=44,
    ring_dimension=ckks.RING_DIMENSION,
    modulus=(1 << 44) - 4095,  # 1 modulo 4096; nobody computes with it here
    scaling_bits=FOUND.scaling_bits,
    grid_bits=FOUND.grid_bits,
    max_learners=10,
    error=1e-6,
    min_contributors=2,
    max_share=0.95,
    verify="none",
    site_names="",
    context=b"openfhe's context",
    public_key=b"openfhe's public key",
)


def public_part(**changes: Any) -> PublicPart:
    """PUBLIC with other fields."""
    return replace(PUBLIC, **changes)


def secret_of(public: PublicPart, key: bytes = b"openfhe's secret key") -> SecretPart:
    return SecretPart(public.fingerprint, key)
