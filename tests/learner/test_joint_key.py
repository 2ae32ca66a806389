"""A joint key is the same wherever it is put together, and as noisy as its bounds say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from joint_keys import joint_keys

from metisfl.learner.crypto import Crypto
from metisfl.learner.joint_key import joint_key, make_share
from metisfl.native_c.ckks import Fold
from metisfl.proto import ckks
from metisfl.proto.ckks_key import MASK_KEY_BYTES, PublicPart
from metisfl.proto.errors import PeerError, UserError

RING = ckks.RING_DIMENSION
SITES = ("ada", "bob", "cyd")
COIN = bytes(range(32))
SHARES = {name: make_share(sites=SITES, coin=COIN) for name in SITES}
PUBLIC_SHARES = {name: share.public for name, share in SHARES.items()}
CIPHERTEXTS = 12

ELSEWHERE = """
import json, sys
from metisfl.learner.joint_key import joint_key
said = json.load(sys.stdin)
public, _ = joint_key(
    sites=said["sites"],
    error=1e-6,
    min_contributors=2,
    max_share=0.95,
    verify="full",
    coin=bytes.fromhex(said["coin"]),
    shares={name: bytes.fromhex(share) for name, share in said["shares"].items()},
    secret=b"the share of another site",
    mask_key=bytes(32),
)
print(public.pack().hex())
"""


def together(**changes: Any) -> PublicPart:
    """The public part of SHARES, put together as ada does."""
    terms: dict[str, Any] = {
        "sites": SITES,
        "error": 1e-6,
        "min_contributors": 2,
        "max_share": 0.95,
        "verify": "full",
        "coin": COIN,
        "shares": PUBLIC_SHARES,
        "secret": SHARES["ada"].secret,
        "mask_key": os.urandom(MASK_KEY_BYTES),
    }
    public, _ = joint_key(**{**terms, **changes})
    return public


@pytest.mark.parametrize("sites", [SITES, SITES[::-1]])
def test_the_public_part_is_the_same_bytes_in_another_process(sites: tuple[str, ...]) -> None:
    said = {
        "sites": sites,
        "coin": COIN.hex(),
        "shares": {name: PUBLIC_SHARES[name].hex() for name in sites},
    }
    found = subprocess.run(
        [sys.executable, "-Ic", ELSEWHERE],
        input=json.dumps(said),
        capture_output=True,
        text=True,
        check=True,
    )
    assert bytes.fromhex(found.stdout) == together().pack()


def test_the_order_in_which_sites_are_named_changes_nothing() -> None:
    assert together(sites=SITES[::-1]).pack() == together().pack()


def test_what_was_put_together_parses_back() -> None:
    public = together()
    assert PublicPart.parse(public.pack()) == public
    assert public.sites == SITES
    assert public.privacy == "ckks-threshold"


def test_another_coin_or_share_is_another_key() -> None:
    theirs = make_share(sites=SITES, coin=COIN).public
    assert theirs != PUBLIC_SHARES["cyd"], "shares are random"
    known = {together().fingerprint, together(coin=bytes(32)).fingerprint}
    assert len(known | {together(shares={**PUBLIC_SHARES, "cyd": theirs}).fingerprint}) == 3


@pytest.mark.parametrize(
    ("share", "story"),
    [
        (b"", "the share of bob has 0 bytes; it has 16384"),
        (PUBLIC_SHARES["bob"][:-8], "the share of bob has 16376 bytes"),
        (PUBLIC_SHARES["bob"][:-8] + b"\xff" * 8, "bob has a limb of 18446744073709551615; below"),
        (together().modulus.to_bytes(8, "little") * RING, "the share of bob has a limb of"),
    ],
)
def test_what_is_no_share_is_refused_by_its_sites_name(share: bytes, story: str) -> None:
    with pytest.raises(PeerError, match=story):
        together(shares={**PUBLIC_SHARES, "bob": share})


def test_the_largest_limb_that_a_share_may_have_is_taken() -> None:
    largest = (together().modulus - 1).to_bytes(8, "little") * RING
    assert together(shares={**PUBLIC_SHARES, "bob": largest}).sites == SITES


def test_as_many_sites_as_keep_the_error_and_no_more() -> None:
    most = ckks.joint_sites_max()
    sites = [f"s{number:03}" for number in range(most + 1)]
    coarse = 2 * ckks.parameters_for(52, most, joint=True).error
    with pytest.raises(UserError, match=f"joint key of {most + 1} sites .* at most {most} sites"):
        together(sites=sites, shares=dict.fromkeys(sites, PUBLIC_SHARES["ada"]))
    with pytest.raises(UserError, match="an error of"):
        together(error=1e-12)
    made = together(
        sites=sites[:most], shares=dict.fromkeys(sites[:most], PUBLIC_SHARES["ada"]), error=coarse
    )
    assert len(made.sites) == most


def test_a_share_shows_nothing_of_its_secret() -> None:
    assert SHARES["ada"].secret.hex()[:40] not in repr(SHARES["ada"]).encode().hex()
    assert "secret" not in repr(SHARES["ada"])


@pytest.mark.parametrize("sites", [2, 3, 8])
def test_the_noise_is_within_its_bound_which_is_not_wasteful(
    sites: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In units of 2^-p: of as many updates as sites, opened by all, before the grid takes it."""
    names = [f"s{number}" for number in range(sites)]
    cryptos = [Crypto(*key) for key in joint_keys(names).values()]
    public, zeros = cryptos[0].public, np.zeros((CIPHERTEXTS, RING))
    place: dict[str, Any] = {"index": 0, "count": 1, "exponents_digest": bytes(16)}
    opens = b"p" * 16

    def fold(context: Any, blocks: list[bytearray], polynomials: int) -> bytearray:
        with Fold(context) as sums:
            digest = opens if polynomials == 1 else place["exponents_digest"]
            sums.begin(0, 1, CIPHERTEXTS, digest, polynomials)
            sums.absorb_many(blocks, [1] * len(blocks))
            out = bytearray(sums.out_bytes)
            sums.finalise(out)
        return out

    terms: dict[str, Any] = {"ciphertexts": CIPHERTEXTS, "partials_digest": opens, **place}
    model = fold(cryptos[0].context, [one.encrypt_block(zeros, **place) for one in cryptos], 2)
    partials = [one.partial_block(model, **terms) for one in cryptos]
    added = fold(cryptos[0].partial_context, partials, 1)
    monkeypatch.setattr(Crypto, "to_grid", lambda self, values: None)
    noise = cryptos[0].decrypt_jointly(model, added, **terms) * 2.0**public.scaling_bits
    bound = ckks.noise_bound(sites, joint=True)
    sigma = (bound - sites) / ckks.NOISE_DEVIATIONS
    assert np.abs(noise).max() <= bound
    assert sigma / 2 <= noise.std() <= sigma * 1.02, "24,576 values tell it to half a percent"
