"""The limbs are found wherever OpenFHE puts them, and foreign bytes never lead astray."""

from __future__ import annotations

import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openfhe_bytes import MODULUS, check_parsers, samples, serialised

from metisfl.learner.ciphertext_layout import parse_ciphertext, parse_secret_key
from metisfl.learner.crypto import generate
from metisfl.learner.openfhe_door import load_openfhe
from metisfl.proto.errors import PeerError

SAMPLES = samples()


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """Objects of OpenFHE, made with keys that were just made, and with keys that were loaded."""
    openfhe = load_openfhe()
    public, secret = generate("standard", max_learners=4)
    binary = openfhe.BINARY
    context = openfhe.DeserializeCryptoContextString(public.context, binary)
    loaded_public = openfhe.DeserializePublicKeyString(public.public_key, binary)
    loaded_secret = openfhe.DeserializePrivateKeyString(secret.secret_key, binary)
    made = context.KeyGen()
    plain = context.MakeCKKSPackedPlaintext(np.ones(1024, np.complex128))
    keys = {
        "made, public key": made.publicKey,
        "made, secret key": made.secretKey,
        "loaded, public key": loaded_public,
        "loaded, secret key": loaded_secret,
    }
    return {
        "public": public,
        "secret keys": [secret.secret_key, openfhe.Serialize(made.secretKey, binary)],
        "ciphertexts": {
            name: openfhe.Serialize(context.Encrypt(key, plain), binary)
            for name, key in keys.items()
        },
    }


KINDS = ("made, public key", "made, secret key", "loaded, public key", "loaded, secret key")


@pytest.mark.parametrize("kind", KINDS)
def test_both_polynomials_of_a_ciphertext_are_found(real: dict[str, Any], kind: str) -> None:
    data, public = real["ciphertexts"][kind], real["public"]
    layout = parse_ciphertext(data)
    assert (layout.ring_dimension, layout.modulus) == (public.ring_dimension, public.modulus)
    assert len(layout.polynomials) == 2
    for place in layout.polynomials:
        limbs = np.frombuffer(data, "<u8", layout.ring_dimension, place)
        assert limbs.max() < public.modulus
        assert 0.4 < limbs.mean() / public.modulus < 0.6, "limbs look uniform"


def test_the_place_of_the_limbs_is_no_constant(real: dict[str, Any]) -> None:
    places = {parse_ciphertext(data).polynomials for data in real["ciphertexts"].values()}
    assert len(places) > 1, "a key that was loaded writes more in between"


def test_the_polynomial_of_a_secret_key_is_found(real: dict[str, Any]) -> None:
    for data in real["secret keys"]:
        layout = parse_secret_key(data)
        (place,) = layout.polynomials
        assert np.frombuffer(data, "<u8", 2048, place).max() < real["public"].modulus
        assert layout.modulus == real["public"].modulus


def test_a_ciphertext_is_no_secret_key_and_a_secret_key_no_ciphertext(
    real: dict[str, Any],
) -> None:
    with pytest.raises(PeerError):
        parse_secret_key(real["ciphertexts"]["made, public key"])
    with pytest.raises(PeerError):
        parse_ciphertext(real["secret keys"][0])


def test_a_real_ciphertext_that_was_cut_is_refused(real: dict[str, Any]) -> None:
    data = real["ciphertexts"]["loaded, secret key"]
    for length in [*range(1200), *range(1200, len(data) - 1200, 61), *range(-1200, 0)]:
        with pytest.raises(PeerError):
            parse_ciphertext(data[:length])


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_a_cut_at_any_length_and_a_byte_too_many_are_refused(number: int) -> None:
    whole = SAMPLES[number]
    for length in range(len(whole)):
        check_parsers(whole[:length])
        with pytest.raises(PeerError):
            parse_ciphertext(whole[:length])
        with pytest.raises(PeerError):
            parse_secret_key(whole[:length])
    for parse in (parse_ciphertext, parse_secret_key):
        with pytest.raises(PeerError):
            parse(whole + b"\0")


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_a_sample_is_understood_as_what_it_is(number: int) -> None:
    check_parsers(SAMPLES[number])
    found = []
    for parse in (parse_secret_key, parse_ciphertext):
        try:
            found.append(len(parse(SAMPLES[number]).polynomials))
        except PeerError:
            found.append(0)
    assert found in ([1, 0], [0, 2])


@settings(deadline=None)
@given(
    sample=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 1 << 16),
)
def test_damage_of_any_kind_is_a_peer_error_or_harmless(
    sample: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(sample)
    for place, value in changes:
        data[place % len(data)] = value
    check_parsers(bytes(data))
    check_parsers(bytes(data[: cut % len(data)]))


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_a_peer_error(data: bytes) -> None:
    check_parsers(data)
    check_parsers(b"\x01" + struct.pack("<Q", 32) + b"0" * 32 + data)


BOTH = frozenset({0, 1})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"elements": 3}, "number of elements is 3; expected 2"),
        ({"towers": 2}, "number of towers is 2; expected 1"),
        ({"ring": 12}, "ring dimension is 12; allowed are powers of two to 65536"),
        ({"ring": 0}, "ring dimension is 0;"),
        ({"ring": 1 << 17}, "ring dimension is 131072;"),
        ({"ring": 1 << 40}, "ring dimension is 1099511627776;"),
        ({"modulus": 2}, "modulus is 2; allowed are 3 to 2^60"),
        ({"modulus": 1 << 60}, "modulus is 1152921504606846976;"),
        ({"forms": (1, 0)}, "format of a tower is 1; expected 0"),
        ({"forms": (0, 1)}, "format of an element is 1; expected 0"),
        ({"tag": b"G" * 32}, "no key tag"),
    ],
)
def test_what_is_not_understood_is_said_with_its_bound(fields: dict[str, Any], words: str) -> None:
    data = serialised(**{"elements": 2, "inlined": BOTH, **fields})
    with pytest.raises(PeerError) as refusal:
        parse_ciphertext(data)
    assert words in str(refusal.value)


def test_elements_of_different_moduli_are_refused() -> None:
    data = bytearray(serialised(2, frozenset()))
    place = data.rindex(struct.pack("<Q", MODULUS))
    data[place : place + 8] = struct.pack("<Q", MODULUS - 2)
    with pytest.raises(PeerError, match="elements of different rings"):
        parse_ciphertext(bytes(data))


@pytest.mark.parametrize("words", [5, 1 << 61])
def test_a_length_inside_the_parameters_is_checked_before_it_is_used(words: int) -> None:
    data = bytearray(serialised(1, frozenset({0})))
    one = struct.pack("<QQI", 1, MODULUS, 44)
    place = data.index(one)
    data[place : place + 8] = struct.pack("<Q", words)
    with pytest.raises(PeerError, match=f"modulus of {words} words; at most 4"):
        parse_secret_key(bytes(data))


@pytest.mark.parametrize("towers", [0, 5, 1 << 61])
def test_so_is_the_number_of_towers(towers: int) -> None:
    data = bytearray(serialised(1, frozenset({0})))
    place = data.rindex(struct.pack("<QI", 1, 0x40000000))
    data[place : place + 8] = struct.pack("<Q", towers)
    words = "behind the end" if towers == 0 else f"parameters of {towers} towers; at most 4"
    with pytest.raises(PeerError, match=words):
        parse_secret_key(bytes(data))


def test_a_context_is_as_large_as_contexts_get() -> None:
    sample = serialised(1, frozenset())
    room = (1 << 16) - sample.index(b"0123456789abcdef") - 32
    assert parse_secret_key(sample[:1] + bytes(room) + sample[1:]).ring_dimension == 8
    with pytest.raises(PeerError, match="no key tag within 65536 bytes"):
        parse_secret_key(sample[:1] + bytes(room + 1) + sample[1:])


def test_more_bytes_than_any_ciphertext_has_are_not_looked_at() -> None:
    with pytest.raises(PeerError, match="4194305 bytes; at most 4194304"):
        parse_ciphertext(bytes((4 << 20) + 1))


def test_the_parser_needs_no_openfhe() -> None:
    module = sys.modules["metisfl.learner.ciphertext_layout"]
    assert not {"openfhe", "numpy", "np"} & vars(module).keys()
