"""A key for encrypted updates: its public part, which everybody has, and its secret part.

Rule 1: the fingerprint covers every byte of the public part, so that sites that name the same one
have the same key, parameters and policy.
Rule 2: whoever holds the secret part can read every update. It never prints itself, and its first
bytes say what it is, so that it can be found where it must not be.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import msgpack

from metisfl.proto import ckks
from metisfl.proto.errors import PeerError
from metisfl.proto.model_pb2 import Encryption
from metisfl.proto.topics import NAME

__all__ = [
    "CEREMONY_MAGIC",
    "FILE_BYTES_MAX",
    "MASK_KEY_BYTES",
    "PUBLIC_MAGIC",
    "SEALED_MAGIC",
    "SECRET_MAGIC",
    "VERIFY",
    "PublicPart",
    "SecretPart",
    "is_secret",
]

PUBLIC_MAGIC: Final = b"MFCKPUB1"
SECRET_MAGIC: Final = b"MFCKSEC1"
SEALED_MAGIC: Final = b"MFCKBOX1"
CEREMONY_MAGIC: Final = b"MFCKCER1"
FILE_BYTES_MAX: Final = 1 << 20
VERIFY: Final = ("none", "full")
MASK_KEY_BYTES: Final = 32
FIELDS_READ_MAX: Final = 32  # of a part that may be of another release


@dataclass(frozen=True, slots=True)
class PublicPart:
    """What everybody knows of a key. `context` and `public_key` are OpenFHE's own bytes."""

    profile: str
    limb_bits: int
    ring_dimension: int
    modulus: int
    scaling_bits: int
    grid_bits: int
    max_learners: int
    """Also the largest sum of weights."""
    error: float
    """That was promised, relative to a tensor's scale."""
    min_contributors: int
    max_share: float
    verify: str
    site_names: str
    """Of those who made a joint key, with a space between; "" for a key that is shared."""
    context: bytes = field(repr=False)
    public_key: bytes = field(repr=False)

    @property
    def fingerprint(self) -> bytes:
        """16 bytes."""
        return hashlib.sha256(_packed(asdict(self))).digest()[:16]

    @property
    def partial_fingerprint(self) -> bytes:
        """What blocks of partial decryptions name, so that they are never taken for updates."""
        return hashlib.sha256(b"partial" + self.fingerprint).digest()[:16]

    @property
    def sites(self) -> tuple[str, ...]:
        """Who made a joint key, sorted: only all of them together open a model. Else none."""
        return tuple(self.site_names.split())

    @property
    def is_joint(self) -> bool:
        return bool(self.site_names)

    @property
    def privacy(self) -> str:
        """The privacy mode of a federation with this key."""
        return ckks.JOINT if self.is_joint else "ckks"

    @property
    def parameters(self) -> ckks.Parameters:
        """The finest that are possible with this modulus for so many learners."""
        return ckks.parameters_for(
            self.limb_bits, self.max_learners, modulus=self.modulus, joint=self.is_joint
        )

    def update_form(self, exponents: Sequence[int]) -> Encryption:
        """How a site encrypts an update, and what a controller admits, with these exponents.

        Seeded under a secret key; both polynomials under a joint one.
        """
        return Encryption(
            fingerprint=self.fingerprint,
            limb_bits=self.limb_bits,
            ring_dimension=self.ring_dimension,
            polynomials=2 if self.is_joint else 1,
            seeds=0 if self.is_joint else 1,
            exponents=exponents,
        )

    def partial_form(self, exponents: Sequence[int], opens: bytes) -> Encryption:
        """How a site gives its partial of the model with the digest `opens` and these exponents.

        One polynomial, and in the place of a seed the nonce of its mask.
        """
        return Encryption(
            fingerprint=self.partial_fingerprint,
            limb_bits=self.limb_bits,
            ring_dimension=self.ring_dimension,
            polynomials=1,
            seeds=1,
            exponents=exponents,
            opens=opens,
        )

    def pack(self) -> bytes:
        """The content of public.ckks."""
        return PUBLIC_MAGIC + _packed(asdict(self))

    @classmethod
    def parse(cls, data: bytes) -> PublicPart:
        """Check and read it. Raises PeerError with the field, its value and its bound."""
        found = _unpacked(data, PUBLIC_MAGIC, "public part", _PUBLIC_CHECKS)
        part = cls(**found)
        if part.pack() != data:
            raise PeerError("the public part is not in its canonical encoding")
        if problem := _parameter_problem(part):
            raise PeerError(f"public part: {problem}")
        return part


@dataclass(frozen=True, slots=True)
class SecretPart:
    """OpenFHE's secret key of the public part with this fingerprint."""

    fingerprint: bytes
    secret_key: bytes = field(repr=False)
    mask_key: bytes = field(default=b"", repr=False)
    """Of a joint key: 32 bytes that all its sites have, under which they hide their partials."""

    def pack(self) -> bytes:
        """The content of secret.ckks."""
        return SECRET_MAGIC + _packed(asdict(self))

    @classmethod
    def parse(cls, data: bytes) -> SecretPart:
        """Check and read it. Raises PeerError, which shows nothing of the key."""
        return cls(**_unpacked(data, SECRET_MAGIC, "secret part", _SECRET_CHECKS))


def is_secret(beginning: bytes) -> bool:
    """Whether a file that begins so is a secret part, sealed to a site or not, or becomes one."""
    return beginning.startswith((SECRET_MAGIC, SEALED_MAGIC, CEREMONY_MAGIC))


def _packed(values: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(values)
    return packed


def _parameter_problem(part: PublicPart) -> str | None:
    if ckks.PROFILES[part.profile] != part.limb_bits:
        return f"profile {part.profile} with limbs of {part.limb_bits} bits"
    if part.ring_dimension & (part.ring_dimension - 1):
        return f"ring dimension {part.ring_dimension}; it must be a power of two"
    half = 1 << (part.limb_bits - 1)
    if not half < part.modulus < 2 * half or part.modulus % (2 * part.ring_dimension) != 1:
        return (
            f"modulus {part.modulus}; it must have {part.limb_bits} bits and be 1 modulo "
            f"{2 * part.ring_dimension}"
        )
    if problem := _sites_problem(part):
        return problem
    most = part.parameters
    if part.scaling_bits > most.scaling_bits:
        return (
            f"scaling bits {part.scaling_bits}; with {part.max_learners} learners sums wrap above "
            f"{most.scaling_bits}"
        )
    step_bits = most.scaling_bits - most.grid_bits
    if part.grid_bits > part.scaling_bits - step_bits:
        return (
            f"grid bits {part.grid_bits}; with {part.max_learners} learners the noise crosses a "
            f"grid finer than {part.scaling_bits - step_bits}"
        )
    half_step = 1 << (part.scaling_bits - part.grid_bits - 1)
    noise = math.ceil(ckks.noise_bound(part.max_learners, joint=part.is_joint))
    largest = part.max_learners * ((1 << part.scaling_bits) + half_step) + noise
    if largest > (part.modulus - 1) // 2:
        return (
            f"grid bits {part.grid_bits}; with {part.max_learners} learners that round to so "
            f"coarse a grid sums wrap with scaling bits {part.scaling_bits}"
        )
    if part.error < 2.0 ** -(part.grid_bits + 1):
        return (
            f"error {part.error:g}; with grid bits {part.grid_bits} a key can promise "
            f"{2.0 ** -(part.grid_bits + 1):g}"
        )
    return None


def _sites_problem(part: PublicPart) -> str | None:
    names = part.sites
    in_order = " ".join(sorted(set(names))) == part.site_names
    if not in_order or not all(NAME.fullmatch(name) for name in names):
        return "site names; each is there once, in order, with a space between"
    if not names:
        return None
    if len(names) < 2 or part.max_learners != len(names):
        return (
            f"{len(names)} sites of a joint key for {part.max_learners} learners; it has 2 or more"
        )
    if part.profile != ckks.JOINT_PROFILE:
        return f"profile {part.profile} of a joint key; it is {ckks.JOINT_PROFILE}"
    return None


Check = Callable[[Any], bool]


def _whole(least: int, most: int) -> tuple[Check, str]:
    return (lambda v: type(v) is int and least <= v <= most), f"{least} to {most}"


def _number(least: float, most: float) -> tuple[Check, str]:
    return (lambda v: type(v) is float and least < v <= most), f"above {least:g} up to {most:g}"


def _choice(*allowed: str) -> tuple[Check, str]:
    return (lambda v: type(v) is str and v in allowed), " or ".join(allowed)


def _text(most: int) -> tuple[Check, str]:
    return (lambda v: type(v) is str and len(v) <= most), f"up to {most} characters"


def _bytes(least: int, most: int) -> tuple[Check, str]:
    return (lambda v: type(v) is bytes and least <= len(v) <= most), f"{least} to {most} bytes"


def _bytes_or_none(count: int) -> tuple[Check, str]:
    return (lambda v: type(v) is bytes and len(v) in (0, count)), f"0 or {count} bytes"


_PUBLIC_CHECKS: Final[dict[str, tuple[Check, str]]] = {
    "profile": _choice(*ckks.PROFILES),
    "limb_bits": _whole(32, 52),
    # Below, 52 bits are not 128-bit secure; above, a block does not fit a chunk.
    "ring_dimension": _whole(ckks.RING_DIMENSION, 1 << 14),
    "modulus": _whole(1 << 31, (1 << 52) - 1),
    "scaling_bits": _whole(14, 59),
    "grid_bits": _whole(1, 59),
    "max_learners": _whole(1, ckks.LEARNERS_MAX),
    "error": _number(0, 1),
    "min_contributors": _whole(1, ckks.LEARNERS_MAX),
    "max_share": _number(0, 1),
    "verify": _choice(*VERIFY),
    "site_names": _text(64 * ckks.LEARNERS_MAX),
    "context": _bytes(1, FILE_BYTES_MAX),
    "public_key": _bytes(1, FILE_BYTES_MAX),
}
_SECRET_CHECKS: Final[dict[str, tuple[Check, str]]] = {
    "fingerprint": _bytes(16, 16),
    "secret_key": _bytes(1, FILE_BYTES_MAX),
    "mask_key": _bytes_or_none(MASK_KEY_BYTES),
}
assert list(_PUBLIC_CHECKS) == [each.name for each in fields(PublicPart)]


def _unpacked(
    data: bytes, magic: bytes, what: str, checks: dict[str, tuple[Check, str]]
) -> dict[str, Any]:
    if len(data) > FILE_BYTES_MAX:
        raise PeerError(f"{what} of {len(data)} bytes; at most {FILE_BYTES_MAX}")
    if not data.startswith(magic):
        raise PeerError(f"this is no {what} of a key: it does not begin with {magic.decode()}")

    wrong = PeerError(f"the {what} is damaged: it must hold {', '.join(checks)}")

    # At once: a file of nothing but empty maps would take 64 times its size.
    def fields_only(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if pairs and [name for name, _ in pairs] != list(checks):
            raise wrong
        return dict(pairs)

    def no_list(values: list[Any]) -> list[Any]:
        if values:
            raise wrong
        return values

    try:
        found = msgpack.unpackb(
            data[len(magic) :],
            object_pairs_hook=fields_only,
            list_hook=no_list,
            max_map_len=FIELDS_READ_MAX,
            max_array_len=FIELDS_READ_MAX,
        )
    except (msgpack.UnpackException, ValueError):
        raise PeerError(f"the {what} is damaged: it is no msgpack") from None
    if not isinstance(found, dict) or list(found) != list(checks):
        raise wrong
    for name, (check, allowed) in checks.items():
        if not check(found[name]):
            value = found[name]
            shown = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)[:60]
            raise PeerError(f"{what}: {name} is {shown}; allowed is {allowed}")
    return found
