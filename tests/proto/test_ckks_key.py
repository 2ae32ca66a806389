"""A key's parts: what is read is what was written, and anything else is refused by name."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from fractions import Fraction
from typing import Any

import msgpack
import pytest
from example_key import FOUND, PUBLIC, public_part, secret_of
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto import ckks, ckks_key
from metisfl.proto.ckks_key import PublicPart, SecretPart
from metisfl.proto.errors import PeerError

SECRET = secret_of(PUBLIC)

WRONG: list[tuple[str, Any, str]] = [
    ("profile", "tiny", "profile is 'tiny'; allowed is compact or standard or fine or wide"),
    ("profile", "compact", "profile compact with limbs of 44 bits"),
    ("profile", b"standard", "profile is 8 bytes"),
    ("limb_bits", 31, "limb_bits is 31; allowed is 32 to 52"),
    ("limb_bits", 48, "profile standard with limbs of 48 bits"),
    ("limb_bits", True, "limb_bits is True"),
    ("ring_dimension", 1024, "ring_dimension is 1024; allowed is 2048 to 16384"),
    ("ring_dimension", 32768, "ring_dimension is 32768; allowed is 2048 to 16384"),
    ("ring_dimension", 3000, "ring dimension 3000; it must be a power of two"),
    ("modulus", -1, "modulus is -1"),
    ("modulus", (1 << 43) - 4095, "modulus 8796093018113; it must have 44 bits"),
    ("modulus", (1 << 44) + 1, "modulus 17592186044417; it must have 44 bits"),
    ("modulus", (1 << 44) - 4093, "it must have 44 bits and be 1 modulo 4096"),
    ("scaling_bits", 13, "scaling_bits is 13; allowed is 14 to 59"),
    ("scaling_bits", 60, "scaling_bits is 60; allowed is 14 to 59"),
    (
        "scaling_bits",
        FOUND.scaling_bits + 1,
        f"scaling bits {FOUND.scaling_bits + 1}; with 10 learners sums wrap above "
        f"{FOUND.scaling_bits}",
    ),
    ("grid_bits", 0, "grid_bits is 0; allowed is 1 to 59"),
    (
        "grid_bits",
        FOUND.grid_bits + 1,
        f"grid bits {FOUND.grid_bits + 1}; with 10 learners the noise crosses a grid finer than "
        f"{FOUND.grid_bits}",
    ),
    ("max_learners", 0, "max_learners is 0; allowed is 1 to 1000"),
    ("max_learners", 1001, "max_learners is 1001; allowed is 1 to 1000"),
    ("max_learners", 11.0, "max_learners is 11.0"),
    ("max_learners", 1000, "with 1000 learners sums wrap above"),
    ("error", 0.0, "error is 0.0; allowed is above 0 up to 1"),
    ("error", float("nan"), "error is nan"),
    ("error", float("inf"), "error is inf"),
    ("error", 1, "error is 1; allowed"),
    ("error", 1e-12, "error 1e-12; with grid bits"),
    ("min_contributors", 0, "min_contributors is 0; allowed is 1 to 1000"),
    ("max_share", 0.0, "max_share is 0.0; allowed is above 0 up to 1"),
    ("max_share", 1.5, "max_share is 1.5; allowed is above 0 up to 1"),
    ("verify", "some", "verify is 'some'; allowed is none or full"),
    ("verify", None, "verify is None"),
    ("site_names", None, "site_names is None; allowed is up to 64000 characters"),
    ("site_names", "a" * 64_001, "allowed is up to 64000 characters"),
    ("site_names", "ada", "1 sites of a joint key for 10 learners; it has 2 or more"),
    ("site_names", "ada bob", "2 sites of a joint key for 10 learners"),
    *(
        ("site_names", wrong, "site names; each is there once, in order, with a space between")
        for wrong in (
            "bob ada",
            "ada ada",
            "ada  bob",
            " ada bob",
            "ada bob ",
            "ada\tbob",
            "../x y",
        )
    ),
    ("site_names", " ".join("abcdefghij"), "profile standard of a joint key; it is wide"),
    ("context", b"", "context is 0 bytes; allowed is 1 to 1048576 bytes"),
    ("context", "text", "context is 'text'"),
    ("public_key", b"", "public_key is 0 bytes"),
]


def packed(values: Any, magic: bytes = ckks_key.PUBLIC_MAGIC) -> bytes:
    return magic + bytes(msgpack.packb(values))


@pytest.mark.parametrize("profile", ckks.PROFILES)
@pytest.mark.parametrize("learners", [1, 10, 1000])
def test_a_public_part_of_every_profile_comes_back(profile: str, learners: int) -> None:
    bits = ckks.PROFILES[profile]
    found = ckks.parameters_for(bits, learners)
    part = public_part(
        profile=profile,
        limb_bits=bits,
        modulus=(1 << bits) - 4095,
        scaling_bits=found.scaling_bits,
        grid_bits=found.grid_bits,
        max_learners=learners,
        error=found.error,
    )
    assert PublicPart.parse(part.pack()) == part


@given(
    st.sampled_from(sorted(ckks.PROFILES)),
    st.integers(1, ckks.LEARNERS_MAX) | st.integers(900, ckks.LEARNERS_MAX),
    st.integers(-2, 1),
    st.integers(-2, 1) | st.integers(-50, 1),
)
def test_a_key_is_read_exactly_when_sums_do_not_wrap_and_noise_does_not_show(
    profile: str, learners: int, finer_scale: int, finer_grid: int
) -> None:
    bits = ckks.PROFILES[profile]
    finest = ckks.parameters_for(bits, learners)
    scaling_bits = finest.scaling_bits + finer_scale
    grid_bits = max(1, finest.grid_bits + finer_grid)
    part = public_part(
        profile=profile,
        limb_bits=bits,
        modulus=(1 << bits) - 4095,
        scaling_bits=scaling_bits,
        grid_bits=grid_bits,
        max_learners=learners,
        error=1.0,
    )
    noise = math.ceil(ckks.noise_bound(learners))
    step = Fraction(2) ** (scaling_bits - grid_bits)
    wraps = learners * (2**scaling_bits + step / 2) + noise > (part.modulus - 1) // 2
    if wraps or step <= 2 * noise:
        with pytest.raises(PeerError, match=r"(scaling|grid) bits .* learners "):
            PublicPart.parse(part.pack())
    else:
        assert PublicPart.parse(part.pack()) == part


def joint_part(sites: int, **changes: Any) -> PublicPart:
    """The public part of a joint key, with the finest grid that its noise leaves."""
    found = ckks.parameters_for(52, sites, joint=True)
    names = [f"s{number:03}" for number in range(sites)]
    part = public_part(
        profile="wide",
        limb_bits=52,
        modulus=(1 << 52) - 4095,
        scaling_bits=found.scaling_bits,
        grid_bits=found.grid_bits,
        max_learners=sites,
        error=found.error,
        site_names=" ".join(names),
    )
    return replace(part, **changes)


@pytest.mark.parametrize("sites", [2, 3, ckks.joint_sites_max()])
def test_the_public_part_of_a_joint_key_comes_back(sites: int) -> None:
    part = joint_part(sites)
    assert PublicPart.parse(part.pack()) == part
    assert (part.is_joint, part.privacy, len(part.sites)) == (True, "ckks-threshold", sites)
    assert (PUBLIC.is_joint, PUBLIC.privacy, PUBLIC.sites) == (False, "ckks", ())


@pytest.mark.parametrize(
    "change", [{"scaling_bits": 1}, {"grid_bits": 1}, {"max_learners": 1}, {"max_learners": -1}]
)
def test_a_joint_key_whose_noise_would_show_or_that_is_for_others_too_is_refused(
    change: dict[str, int],
) -> None:
    part = joint_part(3)
    wrong = {name: getattr(part, name) + by for name, by in change.items()}
    with pytest.raises(PeerError, match=r"bits .* with 3 learners|3 sites of a joint key for"):
        PublicPart.parse(replace(part, **wrong).pack())  # type: ignore[arg-type]


def test_a_grid_that_flooding_would_cross_is_fine_enough_for_a_shared_key() -> None:
    part = joint_part(3)
    finer = replace(part, grid_bits=part.grid_bits + 1)
    with pytest.raises(PeerError, match="the noise crosses a grid finer than"):
        PublicPart.parse(finer.pack())
    shared = replace(finer, site_names="")
    assert PublicPart.parse(shared.pack()) == shared


def test_updates_and_partials_of_a_joint_key_are_never_taken_for_one_another() -> None:
    part, opens = joint_part(3), b"m" * 32
    update, partial = part.update_form([0, 3]), part.partial_form([0, 3], opens)
    assert (update.polynomials, update.seeds, update.opens) == (2, 0, b"")
    assert (partial.polynomials, partial.seeds, partial.opens) == (1, 1, opens)
    assert update.fingerprint == part.fingerprint != partial.fingerprint
    assert len(partial.fingerprint) == 16
    assert (PUBLIC.update_form([]).polynomials, PUBLIC.update_form([]).seeds) == (1, 1)


def test_the_secret_part_of_a_joint_key_comes_back_and_is_shown_nowhere() -> None:
    secret = SecretPart(joint_part(2).fingerprint, b"share", b"k" * ckks_key.MASK_KEY_BYTES)
    assert SecretPart.parse(secret.pack()) == secret
    assert "k" * 32 not in repr(secret)


def test_a_secret_part_comes_back() -> None:
    assert SecretPart.parse(SECRET.pack()) == SECRET


@pytest.mark.parametrize(("name", "value", "story"), WRONG)
def test_every_wrong_field_is_refused_by_its_name(name: str, value: object, story: str) -> None:
    with pytest.raises(PeerError) as raised:
        PublicPart.parse(packed({**asdict(PUBLIC), name: value}))
    assert story in str(raised.value)


@pytest.mark.parametrize("name", [field.name for field in fields(PublicPart)])
def test_a_field_of_another_type_is_refused_by_its_name(name: str) -> None:
    for value in (None, True, 2048, 0.5, "none", b"bytes", [], {}, msgpack.ExtType(1, b"x")):
        if type(value) is type(getattr(PUBLIC, name)):
            continue
        with pytest.raises(PeerError, match=f"^public part: {name} is .*; allowed is "):
            PublicPart.parse(packed({**asdict(PUBLIC), name: value}))


def test_no_field_goes_unchecked() -> None:
    assert {name for name, _, _ in WRONG} == {field.name for field in fields(PublicPart)}


@pytest.mark.parametrize(
    ("change", "story"),
    [
        ({"fingerprint": b"short"}, "secret part: fingerprint is 5 bytes; allowed is 16 to 16"),
        ({"fingerprint": "0" * 16}, "secret part: fingerprint is '0000"),
        ({"secret_key": b""}, "secret part: secret_key is 0 bytes"),
        ({"secret_key": None}, "secret part: secret_key is None"),
        ({"mask_key": b"k" * 31}, "secret part: mask_key is 31 bytes; allowed is 0 or 32 bytes"),
        ({"mask_key": None}, "secret part: mask_key is None"),
        ({"more": 1}, "it must hold fingerprint, secret_key"),
    ],
)
def test_a_wrong_secret_part_is_refused_by_the_name_of_the_field(
    change: dict[str, object], story: str
) -> None:
    with pytest.raises(PeerError) as raised:
        SecretPart.parse(packed({**asdict(SECRET), **change}, ckks_key.SECRET_MAGIC))
    assert story in str(raised.value)


@pytest.mark.parametrize(
    ("data", "story"),
    [
        (b"", "this is no public part of a key: it does not begin with MFCKPUB1"),
        (SECRET.pack(), "this is no public part of a key"),
        (ckks_key.PUBLIC_MAGIC, "it is no msgpack"),
        (PUBLIC.pack() + b"\0", "it is no msgpack"),
        (PUBLIC.pack()[:-1], "it is no msgpack"),
        (packed([1, 2]), "it must hold profile, limb_bits"),
        (packed({}), "it must hold profile, limb_bits"),
        (packed(dict(reversed(asdict(PUBLIC).items()))), "it must hold profile, limb_bits"),
        (PUBLIC.pack() + bytes(1 << 20), "at most 1048576"),
    ],
)
def test_what_is_no_public_part_is_refused(data: bytes, story: str) -> None:
    with pytest.raises(PeerError) as raised:
        PublicPart.parse(data)
    assert story in str(raised.value)


def test_one_key_has_one_encoding() -> None:
    """Else two files of one fingerprint could differ."""
    short = PUBLIC.pack()
    long = short.replace(b"\xa7context\xc4\x11", b"\xa7context\xc5\0\x11")
    assert len(long) == len(short) + 1
    with pytest.raises(PeerError, match="canonical"):
        PublicPart.parse(long)


@given(st.data())
def test_changed_bytes_are_a_key_of_their_own_or_a_peers_error(data: st.DataObject) -> None:
    changed = bytearray(PUBLIC.pack())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 4)))
        changed[start:stop] = data.draw(st.binary(max_size=6))
    try:
        part = PublicPart.parse(bytes(changed))
    except PeerError:
        return
    assert part.pack() == changed
    assert (part == PUBLIC) == (part.fingerprint == PUBLIC.fingerprint)


@given(st.binary(max_size=100), st.sampled_from([b"", ckks_key.PUBLIC_MAGIC]))
def test_garbage_is_the_peers_error_and_nothing_else(data: bytes, magic: bytes) -> None:
    with pytest.raises(PeerError):
        PublicPart.parse(magic + data)


@pytest.mark.parametrize(
    "change",
    [
        *({"max_learners": 9}, {"error": 1e-5}, {"min_contributors": 3}, {"max_share": 0.5}),
        *({"verify": "full"}, {"context": b"another"}, {"public_key": b"another"}),
        *({"grid_bits": 1}, {"scaling_bits": FOUND.scaling_bits - 1}),
        {"site_names": "ada bob"},
    ],
)
def test_the_fingerprint_covers_every_field(change: dict[str, Any]) -> None:
    assert len(PUBLIC.fingerprint) == 16
    assert replace(PUBLIC, **change).fingerprint != PUBLIC.fingerprint


def test_a_key_is_shown_nowhere() -> None:
    secret = SecretPart(PUBLIC.fingerprint, b"top secret")
    assert "top secret" not in repr(secret) + repr([secret]) + str(secret)
    assert "openfhe" not in repr(PUBLIC)
    broken = secret.pack().replace(b"secret_key", b"secret_kex")
    with pytest.raises(PeerError) as raised:
        SecretPart.parse(broken)
    assert "top secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("beginning", "secret"),
    [
        (SECRET.pack()[:8], True),
        (SECRET.pack(), True),
        (ckks_key.SEALED_MAGIC, True),
        (PUBLIC.pack(), False),
        (SECRET.pack()[:7], False),
        (b"", False),
    ],
)
def test_a_secret_is_known_by_its_first_bytes(beginning: bytes, secret: bool) -> None:
    assert ckks_key.is_secret(beginning) == secret
