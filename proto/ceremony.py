"""How sites make a joint key together: the manifest that they agree on, and what they say.

Rule 1: whoever takes part in a ceremony has the same manifest, byte for byte: every hash and every
signature covers its digest. People compare its fingerprint by telephone.
Rule 2: a body has one encoding and one length, and a hash covers what it is for, who said it and in
which ceremony, so that nothing can be said again by another or elsewhere.

The steps of each site; none is said before all sites have said the one before it:
    1  the hash of step 2
    2  32 random bytes; those of all sites are the coin, from which the common polynomial is made
    3  the hash of step 4
    4  its share of the public key; the hash of its part of the mask key; and that part in a sealed
       box for each other site
    5  that it holds the same key as all others, or whose share or box is wrong

Without steps 1 and 3 whoever speaks last would choose the sum, and so the key, to be its own.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import msgpack
from zmq.utils import z85

from metisfl.proto import ckks
from metisfl.proto.ckks_key import MASK_KEY_BYTES, VERIFY
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.limits import CEREMONY_BODY_BYTES_MAX, CEREMONY_BYTES
from metisfl.proto.topics import check_name

__all__ = [
    "BOX",
    "BOX_BYTES",
    "COIN_PART_BYTES",
    "CONFIRM",
    "HASH_BYTES",
    "SHARE",
    "SHARE_BYTES",
    "Confirmation",
    "Manifest",
    "Offer",
    "coin",
    "commitment",
    "mask_commitment",
    "mask_key",
    "pack_complaint",
    "pack_confirmation",
    "pack_offer",
    "parse_confirmation",
    "parse_offer",
    "signed_bytes",
]

HASH_BYTES: Final = 32
COIN_PART_BYTES: Final = 32
NUMBER_BYTES: Final = 16
SHARE_BYTES: Final = 8 * ckks.RING_DIMENSION
BOX_BYTES: Final = MASK_KEY_BYTES + 48
"""libsodium adds the public key of one use (32) and the tag (16)."""
assert SHARE_BYTES + HASH_BYTES + ckks.LEARNERS_MAX * BOX_BYTES <= CEREMONY_BODY_BYTES_MAX

CONFIRM: Final = 1
BOX: Final = 2
SHARE: Final = 3

TOLD_BITS: Final = 160
TOLD_GROUP: Final = 4

HEADING: Final = """\
# The sites that make a joint key together, and on which terms. Every site gets this file,
# unchanged, and runs `metisfl keys ceremony`, which shows its fingerprint: compare all of that by
# telephone.
"""


@dataclass(frozen=True)
class Manifest:
    """Who makes a joint key, and on which terms. `sites`: name and public key (Z85), by name."""

    federation: str
    number: str
    """16 random bytes in hex, so that every ceremony is another one."""
    sites: tuple[tuple[str, bytes], ...]
    error: float
    min_contributors: int
    max_share: float
    verify: str

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.sites)

    @cached_property
    def keys(self) -> Mapping[str, bytes]:
        return dict(self.sites)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: what hashes and signatures cover."""
        told = [self.federation, self.number, self.sites]
        terms = [self.error, self.min_contributors, self.max_share, self.verify]
        return _hash(b"manifest", msgpack.packb([*told, *terms]))

    @property
    def ceremony(self) -> bytes:
        """16 bytes: what its events are known by."""
        return self.digest[:CEREMONY_BYTES]

    @property
    def told(self) -> str:
        """What people compare: eight groups of four letters and digits, 160 bits.

        More than of a site's admission: whoever writes a manifest can try many for two that show
        the same, which takes 2^80 tries here.
        """
        text = base64.b32encode(self.digest).decode()[: TOLD_BITS // 5]
        return "-".join(text[at : at + TOLD_GROUP] for at in range(0, len(text), TOLD_GROUP))

    def text(self) -> str:
        """The file, as TOML."""
        sites = "".join(f'{name} = "{key.decode()}"\n' for name, key in self.sites)
        return (
            f'{HEADING}federation = "{self.federation}"\nnumber = "{self.number}"\n'
            f"error = {self.error!r}\nmin_contributors = {self.min_contributors}\n"
            f'max_share = {self.max_share!r}\nverify = "{self.verify}"\n\n[sites]\n{sites}'
        )

    @classmethod
    def of(cls, document: Mapping[str, object]) -> Manifest:
        """Check what a file says. Raises UserError with key, value and bound."""
        for key in document:
            if key not in _KEYS:
                raise UserError(f"{key[:40]!r}: no such key; known are {', '.join(_KEYS)}")
        if missing := [key for key in _KEYS if key not in document]:
            raise UserError(f"{missing[0]}: is missing; take the file as it was written")
        sites = document["sites"]
        if not isinstance(sites, dict):
            raise _refused("sites", sites, "a table of names and public keys")
        error = _number("error", document["error"], 1e-12, 0.1)
        most = ckks.joint_sites_max(error)
        if not 2 <= len(sites) <= most:
            raise UserError(
                f"sites: {len(sites)} make no joint key with an error of {error:g}; allowed are 2 "
                f"to {most}"
            )
        least = document["min_contributors"]
        if type(least) is not int or not 1 <= least <= len(sites):
            raise _refused("min_contributors", least, f"a whole number from 1 to {len(sites)}")
        return cls(
            check_name(_text("federation", document["federation"]), "federation"),
            _hex(document["number"]),
            _sites(sites),
            error,
            least,
            _number("max_share", document["max_share"], 1 / len(sites), 1.0),
            _verify(document["verify"]),
        )


_KEYS: Final = (
    *("federation", "number", "error", "min_contributors", "max_share", "verify"),
    "sites",
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What step 4 says: `boxes` are for the other sites, in the order of their names."""

    share: bytes
    mask_commitment: bytes
    boxes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What step 5 says: CONFIRM, or BOX or SHARE, of which `site` gave a wrong one."""

    kind: int
    site: str = ""


# ---- Bodies ------------------------------------------------------------------


def pack_offer(offer: Offer) -> bytes:
    assert len(offer.share) == SHARE_BYTES, f"a share of {len(offer.share)} bytes"
    assert all(len(box) == BOX_BYTES for box in offer.boxes), "boxes of one length"
    return offer.share + offer.mask_commitment + b"".join(offer.boxes)


def parse_offer(body: bytes, sites: int) -> Offer:
    """Read a body of step 4 among so many sites. Raises PeerError for another length."""
    first = SHARE_BYTES + HASH_BYTES
    length = first + (sites - 1) * BOX_BYTES
    if len(body) != length:
        raise PeerError(f"{len(body)} bytes; among {sites} sites it has {length}")
    boxes = (body[at : at + BOX_BYTES] for at in range(first, length, BOX_BYTES))
    return Offer(body[:SHARE_BYTES], body[SHARE_BYTES:first], tuple(boxes))


def pack_confirmation(manifest: Manifest, fingerprint: bytes, mask: bytes) -> bytes:
    """That this site holds the public part with this fingerprint, and this mask key."""
    return bytes([CONFIRM]) + fingerprint + _hash(b"confirmation", manifest.digest, mask)


def pack_complaint(kind: int, site: str) -> bytes:
    """That `site` gave a wrong BOX or SHARE."""
    return bytes([kind]) + site.encode()


def parse_confirmation(body: bytes, names: Sequence[str]) -> Confirmation:
    """Read a body of step 5 among these sites. Raises PeerError."""
    kind = body[0] if body else 0
    if kind == CONFIRM and len(body) == 1 + 16 + HASH_BYTES:
        return Confirmation(kind)
    site = body[1:].decode(errors="replace")
    if kind in (BOX, SHARE) and site in names:
        return Confirmation(kind, site)
    raise PeerError(f"{len(body)} bytes of the kind {kind} are no confirmation and no complaint")


# ---- Hashes ------------------------------------------------------------------


def commitment(manifest: Manifest, site: str, step: int, body: bytes) -> bytes:
    """What `site` says in step - 1, by which it is held to `body` in `step`."""
    return _hash(b"commitment", manifest.digest, site.encode(), bytes([step]), body)


def coin(manifest: Manifest, parts: Mapping[str, bytes]) -> bytes:
    """32 bytes that no site could choose, from the part of each."""
    return _hash(b"coin", manifest.digest, *(parts[name] for name in manifest.names))


def mask_commitment(manifest: Manifest, site: str, part: bytes) -> bytes:
    """By this all sites know that `site` gave the same part of the mask key to each of them."""
    return _hash(b"mask part", manifest.digest, site.encode(), part)


def mask_key(manifest: Manifest, parts: Mapping[str, bytes]) -> bytes:
    """32 bytes that only the sites know, from the part of each."""
    return _hash(b"mask key", manifest.digest, *(parts[name] for name in manifest.names))


def signed_bytes(manifest: Manifest, site: str, step: int, body: bytes) -> bytes:
    """What a site signs when it says `body` in `step`."""
    return _joined(b"step", manifest.digest, site.encode(), bytes([step]), body)


def _hash(purpose: bytes, *parts: bytes) -> bytes:
    return hashlib.sha256(_joined(purpose, *parts)).digest()


def _joined(purpose: bytes, *parts: bytes) -> bytes:
    """With the length before each part: no two lists of parts are the same bytes."""
    told = (len(part).to_bytes(4, "little") + part for part in (purpose, *parts))
    return b"metisfl ceremony 1\0" + b"".join(told)


# ---- Values of a file --------------------------------------------------------


def _sites(table: Mapping[str, object]) -> tuple[tuple[str, bytes], ...]:
    found: dict[bytes, str] = {}
    for name in sorted(table):
        check_name(name, "sites")
        key = _key(f"sites.{name}", table[name])
        if key in found:
            raise UserError(f"sites.{name}: has the key of {found[key]}; each site has its own")
        found[key] = name
    return tuple((name, key) for key, name in found.items())


def _key(path: str, value: object) -> bytes:
    allowed = "a public key of 40 characters, as `metisfl keys show` prints it"
    text = _text(path, value).encode()
    try:
        raw = z85.decode(text) if len(text) == 40 and set(text) <= z85.Z85MAP.keys() else b""
    except struct.error:  # five characters can stand for more than 32 bits
        raw = b""
    if len(raw) != 32:
        raise _refused(path, value, allowed)
    return text


def _hex(value: object) -> str:
    text = _text("number", value)
    if len(text) != 2 * NUMBER_BYTES or not set(text) <= set("0123456789abcdef"):
        raise _refused("number", value, f"{2 * NUMBER_BYTES} of 0-9 and a-f")
    return text


def _verify(value: object) -> str:
    if value not in VERIFY:
        raise _refused("verify", value, " or ".join(f'"{each}"' for each in VERIFY))
    return str(value)


def _number(path: str, value: object, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise _refused(path, value, f"a number from {least:g} to {most:g}")
    return float(value)  # type: ignore[arg-type]


def _text(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refused(path, value, "a text")
    return value


def _refused(path: str, value: Any, allowed: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return UserError(f"{path}: {shown} cannot be; allowed is {allowed}")
