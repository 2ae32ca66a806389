"""ceremony.py: a manifest and what is said under it have one form, and hashes cover all of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.proto import ceremony as c
from metisfl.proto import ckks
from metisfl.proto.ceremony import Manifest
from metisfl.proto.errors import PeerError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = [z85.encode(bytes([n]) * 32).decode() for n in range(1, 40)]
DOCUMENT: dict[str, Any] = {
    "federation": "hearts",
    "number": "0123456789abcdef" * 2,
    "error": 1e-6,
    "min_contributors": 2,
    "max_share": 0.95,
    "verify": "none",
    "sites": {"bob": KEYS[1], "ada": KEYS[0], "3": KEYS[2]},
}
MANIFEST = Manifest.of(DOCUMENT)

keys = st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=31, unique=True)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True).filter(lambda name: name != "all")


@given(st.data(), keys, st.floats(1e-6, 0.1), st.sampled_from(["none", "full"]))
def test_the_text_says_all_of_a_manifest(
    data: st.DataObject, found: list[bytes], error: float, verify: str
) -> None:
    count = len(found)
    called = data.draw(st.lists(names, min_size=count, max_size=count, unique=True))
    document = {
        **DOCUMENT,
        "sites": {name: z85.encode(key).decode() for name, key in zip(called, found, strict=True)},
        "error": error,
        "min_contributors": data.draw(st.integers(1, count)),
        "max_share": data.draw(st.floats(1 / count, 1)),
        "verify": verify,
    }
    manifest = Manifest.of(document)
    again = Manifest.of(tomllib.loads(manifest.text()))
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.text() == manifest.text()


def test_sites_are_in_the_order_of_their_names_however_they_were_given() -> None:
    assert MANIFEST.names == ("3", "ada", "bob")
    turned = {**DOCUMENT, "sites": dict(reversed(DOCUMENT["sites"].items()))}
    assert Manifest.of(turned).digest == MANIFEST.digest


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation", "lungs"),
        ("number", "f" * 32),
        ("error", 2e-6),
        ("min_contributors", 3),
        ("max_share", 0.9),
        ("verify", "full"),
        ("sites", {**DOCUMENT["sites"], "ada": KEYS[5]}),
        ("sites", {"eve" if n == "ada" else n: k for n, k in DOCUMENT["sites"].items()}),
        ("sites", {"ada": KEYS[1], "bob": KEYS[0], "3": KEYS[2]}),
    ],
)
def test_every_value_is_in_the_digest_and_in_what_people_compare(key: str, value: object) -> None:
    other = Manifest.of({**DOCUMENT, key: value})
    assert other.digest != MANIFEST.digest
    assert other.told != MANIFEST.told
    assert other.ceremony != MANIFEST.ceremony


def test_people_compare_eight_groups_of_four() -> None:
    groups = MANIFEST.told.split("-")
    assert [len(group) for group in groups] == [4] * 8


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"federation": "Hearts!"}, "federation 'Hearts!': use 1 to 63 of"),
        ({"federation": 7}, "federation: 7 cannot be; allowed is a text"),
        ({"number": "xyz"}, "number: 'xyz' cannot be; allowed is 32 of 0-9 and a-f"),
        ({"number": "F" * 32}, "allowed is 32 of 0-9 and a-f"),
        ({"error": 0.2}, "error: 0.2 cannot be; allowed is a number from 1e-12 to 0.1"),
        ({"error": True}, "error: True cannot be"),
        ({"error": float("nan")}, "error: nan cannot be"),
        ({"min_contributors": 4}, "min_contributors: 4 cannot be; allowed is a whole number from"),
        ({"min_contributors": True}, "min_contributors: True cannot be"),
        ({"max_share": 0.2}, "max_share: 0.2 cannot be; allowed is a number from 0.333333 to 1"),
        ({"verify": "some"}, 'verify: \'some\' cannot be; allowed is "none" or "full"'),
        ({"verify": []}, "verify: "),
        ({"sites": {"ada": KEYS[0]}}, "sites: 1 make no joint key with an error of 1e-06"),
        ({"sites": {f"s{n}": key for n, key in enumerate(KEYS)}}, "sites: 39 make no joint key"),
        ({"sites": ["ada", "bob"]}, "allowed is a table of names and public keys"),
        ({"sites": {"ada": KEYS[0], "bob": KEYS[0]}}, "sites.bob: has the key of ada"),
        ({"sites": {"ada": KEYS[0], "Bob": KEYS[1]}}, "sites 'Bob': use 1 to 63"),
        ({"sites": {"ada": KEYS[0], "bob": KEYS[1][:-1]}}, "sites.bob: .* a public key of 40"),
        ({"sites": {"ada": KEYS[0], "bob": "#" * 40}}, "sites.bob: .* a public key of 40"),
        ({"sites": {"ada": KEYS[0], "bob": 3}}, "sites.bob: 3 cannot be"),
        ({"quorum": 3}, "'quorum': no such key; known are federation, number"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Manifest.of({**DOCUMENT, **change})


@pytest.mark.parametrize("key", DOCUMENT)
def test_nothing_may_be_missing(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: is missing"):
        Manifest.of({name: value for name, value in DOCUMENT.items() if name != key})


# ---- Bodies ------------------------------------------------------------------

bodies = st.binary(max_size=100) | st.integers(1, 3).map(lambda n: bytes([n]) + b"ada")


@given(st.integers(2, 5), st.binary(min_size=32, max_size=32))
def test_an_offer_comes_back_as_it_was(sites: int, some: bytes) -> None:
    share = some * (c.SHARE_BYTES // 32)
    boxes = tuple(bytes([n]) * c.BOX_BYTES for n in range(sites - 1))
    offer = c.Offer(share, some, boxes)
    body = c.pack_offer(offer)
    assert c.parse_offer(body, sites) == offer
    for wrong in (body[:-1], body + b"!", b""):
        with pytest.raises(PeerError, match=f"among {sites} sites it has {len(body)}"):
            c.parse_offer(wrong, sites)


def test_a_thousand_sites_say_what_fits_into_an_event() -> None:
    offer = c.Offer(bytes(c.SHARE_BYTES), bytes(32), (bytes(c.BOX_BYTES),) * ckks.LEARNERS_MAX)
    assert len(c.pack_offer(offer)) <= 128 * 1024


@given(bodies)
def test_any_body_is_a_confirmation_a_complaint_or_refused(body: bytes) -> None:
    try:
        found = c.parse_confirmation(body, MANIFEST.names)
    except PeerError:
        return
    if found.kind == c.CONFIRM:
        assert len(body) == 49
    else:
        assert c.pack_complaint(found.kind, found.site) == body


def test_a_confirmation_is_of_one_key_in_one_ceremony() -> None:
    other = replace(MANIFEST, number="f" * 32)
    found = {
        c.pack_confirmation(manifest, fingerprint * 16, mask * 32)
        for manifest in (MANIFEST, other)
        for fingerprint in (b"a", b"b")
        for mask in (b"a", b"b")
    }
    assert len(found) == 8
    assert all(c.parse_confirmation(body, ()).kind == c.CONFIRM for body in found)


# ---- Hashes ------------------------------------------------------------------


def test_a_hash_is_of_one_purpose_ceremony_site_step_and_body() -> None:
    other = replace(MANIFEST, number="f" * 32)
    hashes = [
        make(manifest, site, step, body)
        for make in (c.commitment, c.signed_bytes)
        for manifest in (MANIFEST, other)
        for site in ("ada", "bob")
        for step in (2, 4)
        for body in (b"", b"\4", b"x")
    ]
    hashes += [c.mask_commitment(m, s, b"") for m in (MANIFEST, other) for s in ("ada", "bob")]
    parts = dict.fromkeys(MANIFEST.names, bytes(32))
    hashes += [make(m, parts) for make in (c.coin, c.mask_key) for m in (MANIFEST, other)]
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("make", [c.coin, c.mask_key])
@pytest.mark.parametrize("name", MANIFEST.names)
def test_what_all_draw_together_hangs_on_each_of_them(make: Any, name: str) -> None:
    parts = dict.fromkeys(MANIFEST.names, bytes(32))
    assert make(MANIFEST, {**parts, name: b"\1" * 32}) != make(MANIFEST, parts)
