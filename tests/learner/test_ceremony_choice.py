"""Why shares are committed to: without that, whoever speaks last has the whole key alone.

The last site makes a key pair of its own, b* = -a s* + e*, and gives as its share b* minus the
shares of the others. The sum is b*: what all encrypt under is a key that it alone can decrypt with.
"""

from __future__ import annotations

import numpy as np
import pytest
from ceremony_world import manifest_of, step

from metisfl.learner import ceremony as core
from metisfl.learner.ciphertext_layout import parse_public_key
from metisfl.learner.joint_key import joint_key, make_share
from metisfl.proto import ceremony as c
from metisfl.proto.ckks_key import PublicPart

MANIFEST = manifest_of()
NAMES = MANIFEST.names
PARTS = {name: bytes([n]) * 32 for n, name in enumerate(NAMES)}


def key_of(coin: bytes, shares: dict[str, bytes], secret: bytes) -> PublicPart:
    public, _ = joint_key(
        sites=NAMES,
        error=MANIFEST.error,
        min_contributors=2,
        max_share=0.95,
        verify="none",
        coin=coin,
        shares=shares,
        secret=secret,
        mask_key=bytes(32),
    )
    return public


def first_polynomial(public: PublicPart) -> bytes:
    layout = parse_public_key(public.public_key)
    return public.public_key[layout.polynomials[0] :][: c.SHARE_BYTES]


def attack() -> tuple[core.State, list[core.Effect], bytes]:
    """What ada makes of a ceremony whose last site, cyd, looks at the shares before it gives its
    own. Also the public key whose secret cyd has alone."""
    coin = c.coin(MANIFEST, PARTS)
    made = {name: make_share(sites=NAMES, coin=coin) for name in NAMES}
    own = made["cyd"].public
    modulus = np.uint64(key_of(coin, {n: s.public for n, s in made.items()}, b"-").modulus)
    left = np.frombuffer(own, "<u8").copy()
    for name in ("ada", "bob"):
        left = (left + modulus - np.frombuffer(made[name].public, "<u8")) % modulus
    boxes = (bytes(c.BOX_BYTES),) * 2
    shares = {"ada": made["ada"].public, "bob": made["bob"].public, "cyd": left.tobytes()}
    offers = {name: c.pack_offer(c.Offer(each, bytes(32), boxes)) for name, each in shares.items()}
    bound = {**offers, "cyd": c.pack_offer(c.Offer(own, bytes(32), boxes))}

    state = core.begin(MANIFEST, "ada", PARTS["ada"])
    effects: list[core.Effect] = []

    def hear(name: str, number: int, body: bytes) -> None:
        nonlocal state
        state, told = core.handle(state, step(MANIFEST, name, number, body), lambda *_: True)
        effects.extend(told)

    for name in NAMES:
        hear(name, 1, c.commitment(MANIFEST, name, 2, PARTS[name]))
    for name in NAMES:
        hear(name, 2, PARTS[name])
    state, _ = core.handle(state, core.ShareMade(offers["ada"]), lambda *_: True)
    for name in NAMES:
        hear(name, 3, c.commitment(MANIFEST, name, 4, bound[name]))
    for name in NAMES:
        hear(name, 4, offers[name])
    return state, effects, own


def test_a_share_chosen_after_the_others_is_refused() -> None:
    state, effects, _ = attack()
    assert state.stopped is not None
    assert state.stopped.site == "cyd"
    assert not any(isinstance(effect, core.MakeKey) for effect in effects)


def test_without_commitments_the_last_site_would_choose_the_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(c, "commitment", lambda *_: bytes(32))  # nobody is bound to anything
    state, effects, own = attack()
    assert state.stopped is None
    asked = next(effect for effect in effects if isinstance(effect, core.MakeKey))
    public = key_of(asked.coin, dict(asked.shares), b"-")
    assert first_polynomial(public) == own, "the joint key is cyd's own, and cyd has its secret"
