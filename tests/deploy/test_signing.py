"""signing.py: an identity's holder alone can sign, and nothing else passes for its signature."""

from __future__ import annotations

import sys

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.deploy import signing
from metisfl.deploy.keys import Identity
from metisfl.deploy.signing import PRIME, SIGNATURE_BYTES, is_signed, sign
from metisfl.proto.errors import MachineError

ORDER = 2**252 + 27742317777372353535851937790883648493


def identity(name: str) -> Identity:
    return Identity(f"learner:{name}", *zmq.curve_keypair())


NORTH, SOUTH = identity("north"), identity("south")
MESSAGE = b"what north says"
SIGNED = sign(NORTH, MESSAGE)


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32))
def test_what_a_key_signs_is_its_own(message: bytes, secret: bytes) -> None:
    text = z85.encode(secret)
    one = Identity("learner:one", zmq.curve_public(text), text)
    signature = sign(one, message)
    assert len(signature) == SIGNATURE_BYTES
    assert is_signed(one.public, message, signature)
    assert not is_signed(NORTH.public, message, signature)
    assert not is_signed(one.public, message + b"!", signature)


def test_two_signatures_of_one_message_differ() -> None:
    """Each has a nonce of its own: one nonce for two messages would give the key away."""
    again = sign(NORTH, MESSAGE)
    assert again[:32] != SIGNED[:32]
    assert is_signed(NORTH.public, MESSAGE, again)


@given(st.integers(0, 8 * SIGNATURE_BYTES - 1))
def test_no_bit_of_a_signature_can_be_changed(bit: int) -> None:
    changed = bytearray(SIGNED)
    changed[bit // 8] ^= 1 << bit % 8
    assert not is_signed(NORTH.public, MESSAGE, bytes(changed))


@given(st.integers(0, 8 * len(MESSAGE) - 1))
def test_no_bit_of_a_message_can_be_changed(bit: int) -> None:
    changed = bytearray(MESSAGE)
    changed[bit // 8] ^= 1 << bit % 8
    assert not is_signed(NORTH.public, bytes(changed), SIGNED)


@given(st.integers(0, 255))
def test_no_bit_of_a_key_can_be_changed(bit: int) -> None:
    """The highest, too: X25519 ignores it, so that a key would have two names."""
    changed = bytearray(z85.decode(NORTH.public))
    changed[bit // 8] ^= 1 << bit % 8
    assert not is_signed(z85.encode(bytes(changed)), MESSAGE, SIGNED)


def test_a_signature_has_one_form() -> None:
    """Whoever adds the order of the group to the scalar must not have another signature."""
    scalar = int.from_bytes(SIGNED[32:], "little") + ORDER
    assert not is_signed(NORTH.public, MESSAGE, SIGNED[:32] + scalar.to_bytes(32, "little"))


@pytest.mark.parametrize("length", [0, 1, 32, 63, 65, 128])
def test_a_signature_has_one_length(length: int) -> None:
    assert not is_signed(NORTH.public, MESSAGE, (SIGNED * 2)[:length])


@given(st.binary(max_size=100), st.binary(min_size=32, max_size=32))
def test_any_bytes_and_any_key_are_refused(signature: bytes, key: bytes) -> None:
    assert not is_signed(z85.encode(key), MESSAGE, signature)


def small_order() -> list[int]:
    """u of the points of order 1, 2, 4 and 8 of the curve and of its twist."""
    return [
        0,
        1,
        PRIME - 1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    ]


@pytest.mark.parametrize("u", [*small_order(), *(u + PRIME for u in (0, 1, 9, 18)), 2**256 - 1])
def test_there_is_no_signature_for_a_key_that_is_nobodys(u: int) -> None:
    """With a key of small order, R = 0 and s = 0 would do for every message or every eighth."""
    key = z85.encode(u.to_bytes(32, "little"))
    neutral = (1).to_bytes(32, "little") + bytes(32)
    for message in (MESSAGE, *(bytes([n]) for n in range(32))):
        assert not is_signed(key, message, neutral)
        assert not is_signed(key, message, bytes(64))
        assert not is_signed(key, message, SIGNED)


def test_a_key_in_another_encoding_has_signed_nothing() -> None:
    """9 is the base point, whose secret is 1. As 9 + p, or with the bit that X25519 ignores, it is
    the same point under another name."""
    sodium = signing._sodium()
    one = (1).to_bytes(32, "little")
    point = sodium.crypto_scalarmult_ed25519_base_noclamp(one)
    nonce = (7).to_bytes(32, "little")
    commitment = sodium.crypto_scalarmult_ed25519_base_noclamp(nonce)
    challenge = signing._scalar(sodium, commitment, point, MESSAGE)
    signature = commitment + sodium.crypto_core_ed25519_scalar_add(nonce, challenge)
    for u, signed in ((9, True), (9 + PRIME, False), (9 + 2**255, False)):
        assert is_signed(z85.encode(u.to_bytes(32, "little")), MESSAGE, signature) is signed


def test_the_secret_is_not_in_the_signature() -> None:
    secret = z85.decode(NORTH.secret)
    assert secret not in SIGNED
    assert secret[:8] not in SIGNED


def test_without_pynacl_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nacl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nacl", None)
    for attempt in (
        lambda: sign(NORTH, MESSAGE),
        lambda: is_signed(NORTH.public, MESSAGE, SIGNED),
    ):
        with pytest.raises(MachineError, match=r"signing needs PyNaCl.*pip install metisfl\[fhe\]"):
            attempt()
