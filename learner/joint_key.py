"""A key that several sites make together: each its share, and nobody the whole.

Rule 1: every share is made from the same uniform polynomial, which is drawn by all sites together.
A share of the public key is -a s + e, as good as random to whoever lacks s; their sum is the joint
public key, under which only all shares together decrypt. A key made in a chain, from one site's
public key to the next one's, would let its last site choose the key: so it is not done.
Rule 2: the same coin and shares give the same bytes of the public part, wherever they are put
together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from metisfl.learner.ciphertext_layout import parse_public_key
from metisfl.learner.openfhe_door import another_openfhe, load_openfhe, new_context
from metisfl.native_c import ckks as native
from metisfl.proto import ckks
from metisfl.proto.ckks_key import MASK_KEY_BYTES, PublicPart, SecretPart
from metisfl.proto.errors import PeerError, UserError

__all__ = ["Share", "joint_key", "make_share"]

LIMB_BITS: Final = ckks.PROFILES[ckks.JOINT_PROFILE]
TAG_CHARACTERS: Final = 32

Limbs = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Share:
    """`public`: the limbs of -a s + e, N u64 in little-endian order; `secret`: OpenFHE's s."""

    public: bytes
    secret: bytes = field(repr=False)


def make_share(*, sites: Sequence[str], coin: bytes) -> Share:
    """Make this site's share, from randomness of its own and the coin of all `sites`.

    Raises MachineError for an OpenFHE that is missing or another.
    """
    openfhe = load_openfhe()
    try:
        context = _context(openfhe, len(sites))
        common = _common(context, coin)
        base = _public_key(openfhe, context, np.zeros_like(common), common)
        pair = context.MultipartyKeyGen(base, False, True)
        share, again = _limbs(openfhe.Serialize(pair.publicKey, openfhe.BINARY))
        if not np.array_equal(again, common):
            raise another_openfhe("a share has another common polynomial")
        return Share(share.tobytes(), openfhe.Serialize(pair.secretKey, openfhe.BINARY))
    except (RuntimeError, TypeError, AttributeError, PeerError) as error:
        raise another_openfhe(error) from error


def joint_key(
    *,
    sites: Sequence[str],
    error: float,
    min_contributors: int,
    max_share: float,
    verify: str,
    coin: bytes,
    shares: Mapping[str, bytes],
    secret: bytes,
    mask_key: bytes,
) -> tuple[PublicPart, SecretPart]:
    """Put the public shares of all `sites` together; `secret` is this site's.

    Raises PeerError that names a site whose share is none, UserError if so many sites cannot keep
    the error, MachineError for another OpenFHE.
    """
    assert sorted(shares) == sorted(sites), "a share of each site"
    assert len(mask_key) == MASK_KEY_BYTES, f"a mask key of {len(mask_key)} bytes"
    found = ckks.parameters_for(LIMB_BITS, len(sites), joint=True)
    if found.grid_bits < 1 or found.error > error:
        raise UserError(
            f"a joint key of {len(sites)} sites has an error of {found.error:.1e}, above the "
            f"{error:.1e} that is promised; at most {ckks.joint_sites_max(error)} sites keep it"
        )
    openfhe = load_openfhe()
    try:
        context = _context(openfhe, len(sites))
        common, tag = _common(context, coin), _tag(coin)
        ring, modulus = len(common), context.GetModulusCKKS()
        limbs = [_checked(name, shares[name], ring, modulus) for name in sorted(sites)]
        joint, *others = (_public_key(openfhe, context, one, common) for one in limbs)
        for other in others:
            joint = context.MultiAddPubKeys(joint, other, tag)
        data = openfhe.Serialize(joint, openfhe.BINARY)
        wanted = limbs[0].copy()
        for one in limbs[1:]:
            wanted = (wanted + one) % np.uint64(modulus)
        if not all(map(np.array_equal, _limbs(data), (wanted, common))):
            raise another_openfhe("a joint key is not the sum of its shares")
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise another_openfhe(problem) from problem
    public = PublicPart(
        profile=ckks.JOINT_PROFILE,
        limb_bits=LIMB_BITS,
        ring_dimension=ring,
        modulus=modulus,
        scaling_bits=found.scaling_bits,
        grid_bits=found.grid_bits,
        max_learners=len(sites),
        error=error,
        min_contributors=min_contributors,
        max_share=max_share,
        verify=verify,
        site_names=" ".join(sorted(sites)),
        context=openfhe.Serialize(context, openfhe.BINARY),
        public_key=data,
    )
    return public, SecretPart(public.fingerprint, secret, mask_key)


def _context(openfhe: ModuleType, sites: int) -> Any:
    scaling_bits = ckks.parameters_for(LIMB_BITS, sites, joint=True).scaling_bits
    return new_context(openfhe, LIMB_BITS, scaling_bits, joint=True)


def _common(context: Any, coin: bytes) -> Limbs:
    """The uniform polynomial that the coin stands for."""
    kind = native.Context(
        bytes(16), LIMB_BITS, context.GetRingDimension(), context.GetModulusCKKS()
    )
    seed = hashlib.sha256(b"metisfl common polynomial" + coin).digest()[: native.SEED_BYTES]
    return native.expand(kind, seed, 0)


def _tag(coin: bytes) -> str:
    """The name that OpenFHE gives the key, which would be random otherwise."""
    return hashlib.sha256(b"metisfl key tag" + coin).hexdigest()[:TAG_CHARACTERS]


def _public_key(openfhe: ModuleType, context: Any, share: Limbs, common: Limbs) -> Any:
    """An object of OpenFHE with these limbs, out of one that it has made."""
    data = bytearray(openfhe.Serialize(context.KeyGen().publicKey, openfhe.BINARY))
    layout = parse_public_key(bytes(data))
    for place, limbs in zip(layout.polynomials, (share, common), strict=True):
        data[place : place + limbs.nbytes] = limbs.astype("<u8").tobytes()
    return openfhe.DeserializePublicKeyString(bytes(data), openfhe.BINARY)


def _limbs(data: bytes) -> list[Limbs]:
    layout = parse_public_key(data)
    return [np.frombuffer(data, "<u8", layout.ring_dimension, at) for at in layout.polynomials]


def _checked(name: str, share: bytes, ring: int, modulus: int) -> Limbs:
    """The limbs of a share from elsewhere."""
    if len(share) != 8 * ring:
        raise PeerError(f"the share of {name} has {len(share)} bytes; it has {8 * ring}")
    limbs = np.frombuffer(share, "<u8").astype(np.uint64)
    if (largest := int(limbs.max())) >= modulus:
        raise PeerError(f"the share of {name} has a limb of {largest}; below {modulus} it must be")
    return limbs
