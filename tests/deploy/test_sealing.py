"""sealing.py: one site alone can open what was sealed to it, and damage never passes for a key."""

from __future__ import annotations

import sys

import pytest
import zmq
from example_key import PUBLIC, secret_of
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.deploy.keys import Identity
from metisfl.deploy.sealing import open_box, recipient, seal_to
from metisfl.proto.ckks_key import FILE_BYTES_MAX, SEALED_MAGIC, SecretPart, is_secret
from metisfl.proto.errors import MachineError, UserError


def identity(name: str) -> Identity:
    return Identity(f"learner:{name}", *zmq.curve_keypair())


NORTH, SOUTH = identity("north"), identity("south")
SECRET = secret_of(PUBLIC, b"top secret")
SEALED = seal_to(NORTH.public, SECRET)
NO_BOX = r"^it is damaged, or was sealed to another key|^this is no sealed key"
KEY = NORTH.public.decode()

secrets = st.builds(
    SecretPart, st.binary(min_size=16, max_size=16), st.binary(min_size=1, max_size=300)
)


@given(secrets)
def test_what_was_sealed_to_a_site_opens_there_and_nowhere_else(secret: SecretPart) -> None:
    sealed = seal_to(NORTH.public, secret)
    assert open_box(sealed, NORTH) == secret
    with pytest.raises(UserError, match="was sealed to another key than that of this site"):
        open_box(sealed, SOUTH)


def test_a_box_is_known_as_a_secret_and_shows_nothing_of_it() -> None:
    assert is_secret(SEALED)
    assert b"top secret" not in SEALED
    assert seal_to(NORTH.public, SECRET) != SEALED, "two boxes do not show that they hold the same"


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_one_changed_byte_closes_a_box_for_good(place: int, change: int) -> None:
    damaged = bytearray(SEALED)
    damaged[place] ^= change
    with pytest.raises(UserError, match=NO_BOX):
        open_box(bytes(damaged), NORTH)


@given(st.binary(max_size=200) | st.integers(0, len(SEALED) - 1).map(lambda end: SEALED[:end]))
def test_what_is_no_box_is_the_users_error(content: bytes) -> None:
    for sealed in (content, SEALED_MAGIC + content):
        with pytest.raises(UserError, match=NO_BOX):
            open_box(sealed, NORTH)


@given(st.binary(max_size=100))
def test_a_box_of_something_else_is_refused(content: bytes) -> None:
    """Whoever knows a site's public key can seal to it."""
    import nacl.public

    box = nacl.public.SealedBox(nacl.public.PublicKey(z85.decode(NORTH.public)))
    with pytest.raises(UserError, match=r"^what was sealed is no key: "):
        open_box(SEALED_MAGIC + bytes(box.encrypt(content)), NORTH)


def test_a_box_has_a_size_limit() -> None:
    with pytest.raises(UserError, match=f"this is no sealed key.*up to {FILE_BYTES_MAX} bytes"):
        open_box(SEALED + bytes(FILE_BYTES_MAX), NORTH)


def test_the_largest_secret_part_that_loads_can_travel() -> None:
    most = FILE_BYTES_MAX - len(SecretPart(PUBLIC.fingerprint, b"").pack()) - 100
    secret = secret_of(PUBLIC, bytes(most))
    assert open_box(seal_to(NORTH.public, secret), NORTH) == secret


def test_what_a_site_is_told_shows_no_key() -> None:
    with pytest.raises(UserError) as raised:
        open_box(SEALED, SOUTH)
    assert SOUTH.public_line in str(raised.value), "to what it must be sealed"
    assert SOUTH.secret.decode() not in str(raised.value)


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_nothing_is_sealed_to_a_point_that_anybody_could_open(point: bytes) -> None:
    with pytest.raises(UserError, match="is no key that can be sealed to"):
        seal_to(z85.encode(point), SECRET)


@pytest.mark.parametrize("missing", ["nacl", "nacl.public"])
def test_without_pynacl_the_remedy_is_told(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nacl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for attempt in (lambda: seal_to(NORTH.public, SECRET), lambda: open_box(SEALED, NORTH)):
        with pytest.raises(MachineError, match=r"sealing needs PyNaCl.*pip install metisfl\[fhe\]"):
            attempt()


# ---- For whom ------------------------------------------------------------------

public_keys = st.binary(min_size=32, max_size=32).map(z85.encode)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True).filter(lambda name: name != "all")


@given(names, public_keys, st.sampled_from(["", "\n", "\n# public.ckks:\n#   profile compact\n"]))
def test_a_learners_line_tells_its_name_and_its_key(name: str, key: bytes, more: str) -> None:
    assert recipient(f"learner:{name} {key.decode()}{more}") == (name, key)


@given(public_keys)
def test_a_bare_key_tells_no_name_and_never_looks_like_a_comment(key: bytes) -> None:
    assert recipient(key.decode()) == ("", key)


@given(st.text(max_size=60))
def test_any_text_is_a_learners_key_or_a_user_error(text: str) -> None:
    for words in (text, f"{text} {KEY}"):
        try:
            name, key = recipient(words)
        except UserError:
            continue
        assert len(z85.decode(key)) == 32
        assert "/" not in name, "a file is called by it"
