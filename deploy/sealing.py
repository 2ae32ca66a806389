"""A key's secret part on its way to another site: sealed to that site's identity.

Rule: libsodium's sealed box (X25519, XSalsa20-Poly1305) and nothing of our own. The identity's
CURVE key is such a key, so whoever was let into the federation can be sent a secret, too. A box
does not say who made it: what it holds counts because its fingerprint is that of public.ckks.
"""

from __future__ import annotations

from types import ModuleType

from zmq.utils import z85

from metisfl.deploy.keys import Identity, check_principal, is_public_key
from metisfl.proto.ckks_key import FILE_BYTES_MAX, SEALED_MAGIC, SecretPart
from metisfl.proto.errors import MachineError, PeerError, UserError

__all__ = ["box_for", "content_of", "open_box", "recipient", "seal_to"]


def recipient(text: str) -> tuple[str, bytes]:
    """The learner's name, "" if it is not told, and the public key (Z85) that `text` gives.

    `text` is a key of 40 characters or a line `learner:NAME KEY`; lines that are comments do not
    count. Raises UserError for what is neither, and for anybody who is no learner.
    """
    lines = [line.split() for line in text.splitlines() if not line.lstrip().startswith("#")]
    words = [word for line in lines for word in line]
    key = words[-1].encode() if len(words) in (1, 2) else b""
    if not is_public_key(key):
        raise UserError(
            f"{text[:80]!r} is no public key: give the line that `metisfl keys show` prints at the "
            "other site, in quotes"
        )
    role, _, name = check_principal(words[0]).partition(":") if len(words) == 2 else ("", "", "")
    if role not in ("", "learner"):
        raise UserError(
            f"{words[0]} must never hold the secret part of a key: it could read every site's "
            "updates; allowed is the public line of a learner"
        )
    return name, key


def seal_to(public: bytes, secret: SecretPart) -> bytes:
    """The secret part, readable with the secret key of `public` (Z85) alone.

    Raises UserError for a share of a joint key, which is its site's alone, and for a public key
    that nobody can have the secret of; MachineError.
    """
    if secret.mask_key:
        raise UserError(
            "this is a share of a joint key, and never leaves its site: with it another could open "
            "what all sites have to open together. For other sites make another key, with all of "
            "them in its list: metisfl keys ceremony"
        )
    return SEALED_MAGIC + box_for(public, secret.pack())


def box_for(public: bytes, content: bytes) -> bytes:
    """`content` in a box of 48 bytes more. Raises as `seal_to` does."""
    nacl = _nacl()
    box = nacl.public.SealedBox(nacl.public.PublicKey(z85.decode(public)))
    try:
        return bytes(box.encrypt(content))
    except nacl.exceptions.CryptoError:  # a point of small order, such as zero
        raise UserError(
            f"{public.decode()} is no key that can be sealed to: take the line that `metisfl keys "
            "show` prints at the other site"
        ) from None


def open_box(sealed: bytes, identity: Identity) -> SecretPart:
    """Open what was sealed to this identity. Raises UserError for what is not, or is damaged."""
    if not sealed.startswith(SEALED_MAGIC) or len(sealed) > FILE_BYTES_MAX:
        raise UserError(
            f"this is no sealed key: `metisfl keys seal` makes them, and they begin with "
            f"{SEALED_MAGIC.decode()} and have up to {FILE_BYTES_MAX} bytes"
        )
    content = content_of(sealed[len(SEALED_MAGIC) :], identity)
    if content is None:
        raise UserError(
            f"it is damaged, or was sealed to another key than that of this site; have it sealed "
            f"again, to: {identity.public_line}"
        )
    try:
        return SecretPart.parse(content)
    except PeerError as error:
        raise UserError(f"what was sealed is no key: {error}; have it sealed again") from None


def content_of(box: bytes, identity: Identity) -> bytes | None:
    """What is in a box for this identity; None if it is damaged or for another."""
    nacl = _nacl()
    opener = nacl.public.SealedBox(nacl.public.PrivateKey(z85.decode(identity.secret)))
    try:
        return bytes(opener.decrypt(box))
    except nacl.exceptions.CryptoError:
        return None


def _nacl() -> ModuleType:
    try:
        import nacl.exceptions
        import nacl.public
    except ImportError as error:
        raise MachineError(
            f"sealing needs PyNaCl, which cannot be loaded ({error}); install it with "
            "`pip install metisfl[fhe]`"
        ) from None
    return nacl
