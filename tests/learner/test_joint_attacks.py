"""What a joint key keeps from all its sites but one, and what it would not if it were made, masked
or opened in another way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from joint_models import SITES, JointSites
from number_ring import NumberRing
from numpy.typing import NDArray
from sealed_models import floats

from metisfl.learner.crypto import Crypto
from metisfl.learner.joint_key import joint_key, make_share
from metisfl.learner.partials import reveal
from metisfl.native_c.ckks import Fold, block_bytes, open_block, seal_block
from metisfl.proto import ckks
from metisfl.proto.ckks_key import SecretPart
from metisfl.proto.model_file import open_model

Limbs = NDArray[np.uint64]
Floats = NDArray[np.float64]

RING = ckks.RING_DIMENSION
DIGEST, OPENS = ckks.exponents_digest([0]), b"o" * 16
PLACE: dict[str, Any] = {"index": 0, "count": 1, "exponents_digest": DIGEST}
OPENED: dict[str, Any] = {**PLACE, "exponents_digest": OPENS}
COIN, MASK_KEY = b"c" * 32, b"k" * 32
UNIFORM = 12**-0.5


class World:
    """Three sites that have encrypted one polynomial each, and what the controller has of it."""

    def __init__(self) -> None:
        self.sites = JointSites()
        self.public = self.sites.public
        self.ring = NumberRing(RING, self.public.modulus)
        self.values = np.random.default_rng(7).uniform(-1, 1, (3, RING))
        for crypto, row in zip(self.sites.cryptos.values(), self.values, strict=True):
            crypto.to_grid(row)
        self.cryptos = list(self.sites.cryptos.values())
        self.shares = [one._secret for one in self.cryptos]
        self.mask_key = self.cryptos[0]._mask_key
        self.updates = [
            one.encrypt_block(row[None], **PLACE)
            for one, row in zip(self.cryptos, self.values, strict=True)
        ]
        self.model = self.fold(self.updates, partials=False)
        self.partials = [
            one.partial_block(self.model, ciphertexts=1, partials_digest=OPENS, **PLACE)
            for one in self.cryptos
        ]

    def fold(self, blocks: list[bytearray], *, partials: bool) -> bytearray:
        context = self.cryptos[0].partial_context if partials else self.cryptos[0].context
        with Fold(context) as sums:
            sums.begin(0, 1, 1, OPENS if partials else DIGEST, 1 if partials else 2)
            sums.absorb_many(blocks, [1] * len(blocks))
            out = bytearray(sums.out_bytes)
            sums.finalise(out)
        return out

    def halves(self, block: bytearray, crypto: Crypto | None = None) -> tuple[Limbs, Limbs]:
        c0, c1 = np.empty((1, RING), np.uint64), np.empty((1, RING), np.uint64)
        open_block((crypto or self.cryptos[0]).context, block, c0=c0, c1=c1, **PLACE)
        return c0[0], c1[0]

    def unmasked(self, block: bytearray, mask_key: bytes) -> Limbs:
        context = self.cryptos[0].partial_context
        return reveal(context, block, mask_key, ciphertexts=1, **OPENED)[0][0]

    def off(self, found: Limbs, values: Floats) -> Floats:
        """How far these limbs are from those values, as a part of the modulus."""
        exact = np.rint(np.ldexp(values, self.public.scaling_bits)).astype(np.int64)
        left = self.ring.minus(found, self.ring.limbs(exact))
        return (self.ring.coefficients(left) / self.public.modulus).astype(np.float64)

    def product(self, c1: Limbs, *shares: Limbs) -> Limbs:
        return self.ring.plus(*(self.ring.times(c1, share) for share in shares))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def says_nothing(off: Floats) -> bool:
    """Whether an error is spread evenly over all that the modulus allows."""
    return bool(np.abs(off).max() > 0.49 and abs(off.std() - UNIFORM) < 0.02)


def read(world: World, off: Floats) -> bool:
    """Whether nothing but noise is left."""
    return bool(np.abs(off).max() * world.public.modulus <= ckks.noise_bound(3, joint=True))


# ---- What it keeps ---------------------------------------------------------------------


def test_all_sites_but_one_and_the_controller_cannot_read_the_update_of_that_one(
    world: World,
) -> None:
    """Not with the mask key either, nor with the partial of the sum that the one has given."""
    ada, bob, cyd = world.shares
    c0, c1 = world.halves(world.updates[2])
    theirs = world.unmasked(world.partials[2], world.mask_key)
    known = world.product(c1, ada, bob)
    for guess in (world.ring.plus(c0, known), world.ring.plus(c0, known, theirs)):
        assert says_nothing(world.off(guess, world.values[2]))
    assert read(
        world, world.off(world.ring.plus(c0, known, world.product(c1, cyd)), world.values[2])
    )


def test_a_sum_stays_closed_until_the_last_site_has_given_its_partial(world: World) -> None:
    c0, _ = world.halves(world.model)
    given = [world.unmasked(one, world.mask_key) for one in world.partials]
    total = world.values.sum(axis=0)
    assert says_nothing(world.off(world.ring.plus(c0, *given[:2]), total))
    assert read(world, world.off(world.ring.plus(c0, *given), total))


@pytest.mark.parametrize("mask_key", [b"", bytes(32)], ids=["none", "another"])
def test_the_controller_cannot_open_a_sum_with_the_partials_of_all(
    world: World, mask_key: bytes
) -> None:
    """It lacks the mask key; with it, from one site, it reads the sum."""
    c0, _ = world.halves(world.model)
    added = world.fold(world.partials, partials=True)
    total = world.values.sum(axis=0)
    bare = np.empty((1, RING), np.uint64)
    open_block(world.cryptos[0].partial_context, added, c0=bare, c1=np.empty_like(bare), **OPENED)
    guess = world.unmasked(added, mask_key) if mask_key else bare[0]
    assert says_nothing(world.off(world.ring.plus(c0, guess), total))
    assert read(world, world.off(world.ring.plus(c0, world.unmasked(added, world.mask_key)), total))


# ---- Other ways, and who wins then -------------------------------------------------------


def joint(shares: dict[str, bytes], secret: bytes) -> tuple[Any, SecretPart]:
    return joint_key(
        sites=SITES,
        error=1e-6,
        min_contributors=2,
        max_share=0.95,
        verify="none",
        coin=COIN,
        shares=shares,
        secret=secret,
        mask_key=MASK_KEY,
    )


def reads_alone(world: World, crypto: Crypto) -> bool:
    """Whether what anybody encrypts under its key opens with this one share."""
    c0, c1 = world.halves(crypto.encrypt_block(world.values[:1], **PLACE), crypto)
    found = world.ring.plus(c0, world.ring.times(c1, crypto._secret))
    return read(world, world.off(found, world.values[0]))


def test_in_a_chain_of_public_keys_the_last_site_chooses_the_key(world: World) -> None:
    """`MultipartyKeyGen` of the key before: the last one may show its own, and nobody can tell."""
    made = {name: make_share(sites=SITES, coin=COIN) for name in SITES}
    shares = {name: share.public for name, share in made.items()}
    public, secret = joint(shares, made["cyd"].secret)
    honest = Crypto(public, secret)
    assert not reads_alone(world, honest)
    openfhe, context = honest._openfhe, honest._context
    first = context.MultipartyKeyGen(honest._public_key, False, True)
    second = context.MultipartyKeyGen(first.publicKey)
    for fresh in (False, True):  # adds a share to the key before, or puts one in its place
        last = context.MultipartyKeyGen(second.publicKey, False, fresh)
        chained = replace(public, public_key=openfhe.Serialize(last.publicKey, openfhe.BINARY))
        theirs = openfhe.Serialize(last.secretKey, openfhe.BINARY)
        crypto = Crypto(chained, SecretPart(chained.fingerprint, theirs, MASK_KEY))
        assert reads_alone(world, crypto) == fresh


def test_who_sees_the_shares_of_others_before_giving_its_own_chooses_the_key(world: World) -> None:
    """So all sites are bound to theirs before one is shown."""
    ada, bob, cyd = (make_share(sites=SITES, coin=COIN) for _ in SITES)
    wanted, *seen = (np.frombuffer(one.public, "<u8") for one in (cyd, ada, bob))
    late = world.ring.minus(world.ring.minus(wanted, seen[0]), seen[1]).tobytes()
    crypto = Crypto(*joint({"ada": ada.public, "bob": bob.public, "cyd": late}, cyd.secret))
    assert reads_alone(world, crypto)


def test_each_partial_of_the_same_sum_takes_away_some_of_the_flooding(world: World) -> None:
    _, c1 = world.halves(world.model)
    exact = world.product(c1, world.shares[0])
    measured = {}
    for count in (1, 16, 256):
        many = [world.cryptos[0].partials(c1[None])[0] for _ in range(count)]
        left = world.ring.minus(world.ring.plus(*many), (exact.astype(object) * count))
        measured[count] = float(np.std(world.ring.coefficients(left).astype(np.float64))) / count
    for count, sigma in measured.items():
        assert sigma == pytest.approx(ckks.SIGMA_FLOODING / count**0.5, rel=0.1)


def test_enough_partials_of_the_same_sum_give_the_share_away(world: World) -> None:
    """Of flooding that is 2^17 times narrower: as it is, 2^34 times as many would do."""
    sigma, count = 8.0, 8_000
    _, c1 = world.halves(world.model)
    share = world.shares[0]
    random = np.random.default_rng(0)
    flooding = np.rint(random.normal(0, sigma, (count, RING))).astype(np.int64)
    exact = world.product(c1, share)
    first = world.ring.plus(exact, world.ring.limbs(flooding[0]))
    total = world.ring.plus(
        exact.astype(object) * count, world.ring.limbs(flooding.sum(axis=0))
    )  # of all partials

    def guessed(seen: Limbs, of: int) -> Limbs:
        """The share, from one partial and the sum of all."""
        left = world.ring.coefficients(world.ring.minus(first.astype(object) * of, seen))
        noise = np.rint((left / of).astype(np.float64))
        return world.ring.quotient(world.ring.minus(first, world.ring.limbs(noise)), c1)

    assert np.array_equal(guessed(total, count), share)
    assert not np.array_equal(guessed(first, 1), share), "one is not enough"


def test_two_sums_of_one_round_that_differ_by_a_site_give_its_update_away(tmp_path: Path) -> None:
    """Which is why a site gives one partial a round, whatever it is asked."""
    sites = JointSites()
    random = np.random.default_rng(1)
    models = [floats(random.uniform(-1, 1, 50)) for _ in SITES]
    updates = sites.updates(tmp_path, models)
    sums = []
    for some in (updates, updates[:2]):
        path = tmp_path / f"model{len(some)}"
        digest = sites.model(some, path)
        partials = sites.partials(path, digest, updates)
        added = sites.opening(partials, tmp_path / f"partials{len(some)}")
        with open_model(sites.opened("ada", path, digest, added)) as plain:
            sums.append(plain.tensors()[0].array * len(some))
    off = np.abs(sums[0] - sums[1] - models[2][0].array).max()
    assert off <= 5 * sites.public.error, "what cyd sent, and nobody should know"


def test_a_controller_that_has_the_mask_key_reads_shares_off_a_sum_of_its_own_making(
    world: World,
) -> None:
    """Against which only `verify = "full"` helps: no site opens what is not a fold."""
    factor = 1 << 30
    block = bytearray(block_bytes(world.cryptos[0].context, 1, 2, 0))
    chosen = np.full((1, RING), factor, np.uint64)  # the polynomial that is constant
    seal_block(
        world.cryptos[0].context, c0=np.zeros_like(chosen), c1=chosen, seed=None, out=block, **PLACE
    )
    given = world.cryptos[2].partial_block(block, ciphertexts=1, partials_digest=OPENS, **PLACE)
    for mask_key, reads in ((world.mask_key, True), (bytes(32), False)):
        found = world.ring.coefficients(world.unmasked(given, mask_key))
        guess = np.rint((found / factor).astype(np.float64))
        assert np.array_equal(world.ring.limbs(guess), world.shares[2]) == reads
