"""invitation_code.py: a code is whole or refused in words, whatever happened to it on its way."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.deploy import invitation_code
from metisfl.deploy.invitation_code import Code, format_code, parse_code
from metisfl.proto.errors import UserError

KEYS = st.binary(min_size=32, max_size=32).map(z85.encode)
NAMES = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name != "all")
ENDPOINTS = st.builds(
    "tcp://{}:{}".format,
    st.sampled_from(["fed.example.org", "192.0.2.7", "[2001:db8::1]"]),
    st.integers(1, 65535),
)
CODES = st.builds(
    Code,
    principal=st.builds("{}:{}".format, st.sampled_from(["learner", "driver"]), NAMES),
    federation=NAMES,
    ingress=ENDPOINTS,
    live=ENDPOINTS,
    bulk=ENDPOINTS,
    broker=KEYS,
    controller=KEYS,
    expires_unix_s=st.integers(0, 2**40),
    token=st.binary(min_size=16, max_size=16),
)
ADA = Code(
    "learner:ada",
    "penguins",
    "tcp://fed.example.org:5570",
    "tcp://fed.example.org:5571",
    "tcp://fed.example.org:5572",
    z85.encode(bytes(32)),
    z85.encode(bytes([1] * 32)),
    1_764_000_000,
    bytes(range(16)),
)
WORD = format_code(ADA)


@given(CODES)
def test_a_code_says_what_it_was_made_of(code: Code) -> None:
    assert parse_code(format_code(code)) == code


def test_a_code_is_one_word_of_letters_and_digits() -> None:
    assert WORD.replace("_", "").isalnum()
    assert len(WORD) < 330, "it is still one paragraph of a mail"


@pytest.mark.parametrize(
    "mailed",
    [f"  {WORD}\n", WORD.upper(), "\n".join(WORD[at : at + 60] for at in range(0, len(WORD), 60))],
)
def test_white_space_and_case_do_not_matter(mailed: str) -> None:
    assert parse_code(mailed) == ADA


def test_the_token_is_not_shown_by_accident() -> None:
    assert "token" not in repr(ADA)


def test_a_token_has_one_key_pair_and_another_token_another() -> None:
    public, secret = ADA.key_pair()
    assert zmq.curve_public(secret) == public
    assert ADA.key_pair() == (public, secret)
    assert replace(ADA, token=bytes(16)).key_pair()[0] != public
    assert public == b"OgHW&G@?FBS&]blQdI[}WVQ(0k.Uq)AutC.N88)3", "old codes would open nothing"


@st.composite
def mutated(draw: Any) -> str:
    """A code with up to three characters replaced, left out, put in, or two exchanged."""
    letters = list(WORD)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(letters) - 2))
        what = draw(st.sampled_from(["replace", "leave out", "put in", "exchange"]))
        other = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789_-é\0"))
        if what == "replace":
            letters[at] = other
        elif what == "leave out":
            del letters[at]
        elif what == "put in":
            letters.insert(at, other)
        else:
            letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


@given(mutated())
def test_a_code_with_a_slip_in_it_is_refused(word: str) -> None:
    if word != WORD:
        with pytest.raises(UserError):
            parse_code(word)


@given(st.integers(0, len(WORD) - 1))
def test_a_code_that_is_cut_off_is_refused_and_says_so(length: int) -> None:
    with pytest.raises(UserError) as raised:
        parse_code(WORD[:length])
    if length > len("metisfl1_"):
        assert "is cut off" in str(raised.value)
        assert "copy all of it" in str(raised.value)


@given(st.text() | st.text().map(lambda text: "metisfl1_" + text))
def test_any_text_is_a_code_or_a_user_error(text: str) -> None:
    with pytest.raises(UserError):
        parse_code(text)


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("hello", "'hello' is no code: those of `metisfl invite` begin with metisfl"),
        ("", "'' is no code"),
        (WORD.replace("metisfl1_", "metisfl2_"), r"version 2, and metisfl .* here reads version 1"),
        (WORD + "a", r"has something behind it: \d+ characters instead of \d+"),
        (WORD[:-1], r"is cut off: \d+ characters instead of \d+"),
        (WORD[:40] + "!" + WORD[41:], r"damaged: '!' \(character 41\) cannot be in it"),
        (WORD[:40] + ("b" if WORD[40] == "a" else "a") + WORD[41:], "damaged: one or more"),
        ("metisfl1_" + "a" * 5000, "5009 characters are no code"),
        ("metisfl1_aaaa", "has something behind it"),
    ],
)
def test_what_is_wrong_is_named(word: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        parse_code(word)


def forged(texts: bytes) -> str:
    """A code with a right checksum around `texts`."""
    fixed = struct.pack("<HQ16s32s32s", 94 + len(texts), 0, bytes(16), bytes(32), bytes(32))
    body = fixed + texts
    body += struct.pack("<I", zlib.crc32(body))
    return f"metisfl1_{invitation_code._base32(body)}"


def texts_of(*texts: bytes) -> bytes:
    return b"".join(bytes([len(text)]) + text for text in texts)


GOOD = [b"learner:a", b"f", b"tcp://a:1", b"tcp://a:2", b"tcp://a:3"]


def test_the_forgery_is_one_only_by_its_texts() -> None:
    assert parse_code(forged(texts_of(*GOOD))).principal == "learner:a"


@pytest.mark.parametrize(
    "texts",
    [
        b"",
        b"\xff",
        texts_of(*GOOD[:4]),
        texts_of(*GOOD, b"more"),
        texts_of(*GOOD) + b"\x05abc",
        texts_of(b"learner:../a", *GOOD[1:]),
        texts_of(b"invited:learner:a", *GOOD[1:]),
        texts_of(b"controller", *GOOD[1:]),
        texts_of(GOOD[0], b"f f", *GOOD[2:]),
        texts_of(*GOOD[:4], b"tcp://a:1\nMETISFL_APP=evil:Evil"),
        texts_of(*GOOD[:4], b"ipc:///tmp/x"),
        texts_of(*GOOD[:4], b"\xff\xfe"),
    ],
)
def test_a_code_that_was_made_by_hand_cannot_say_more_than_a_code_may(texts: bytes) -> None:
    """What it says goes into a file of settings, so it must not bring a line of its own."""
    with pytest.raises(UserError):
        parse_code(forged(texts))
