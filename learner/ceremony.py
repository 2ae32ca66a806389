"""A site's part in making a joint key: what it says when, and whom it stops for.

Rule 1: all sites read the same records in the same order, and judge by nothing else. So when one
breaks the rules, all the others stop at the same record, for the same reason, and for good.
Rule 2: a step is said when all sites have said the one before it, and never otherwise than before.
Rule 3: a site is blamed for what it has signed, never for what the broker says that it said.
Rule 4: MakeShare and MakeKey are answered before the next record is heard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from metisfl.proto import ceremony as c
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ceremony import Manifest
from metisfl.proto.errors import PeerError
from metisfl.proto.limits import CEREMONY_STEPS

__all__ = [
    "Doubted",
    "Effect",
    "Event",
    "Finish",
    "Heard",
    "IsSigned",
    "KeyMade",
    "KeyWrong",
    "MakeKey",
    "MakeShare",
    "Say",
    "ShareMade",
    "State",
    "Stopped",
    "begin",
    "handle",
    "resume",
    "with_share",
]

HASHES: Final = (1, 3)
COIN, OFFER, CONFIRMATION = 2, 4, 5
OVER: Final = CEREMONY_STEPS + 1

IsSigned = Callable[[bytes, bytes, bytes], bool]
"""Of a public key (Z85), a message and a signature."""

# ---- Events ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heard:
    """A record of the log; `publisher` is whom the broker takes its sender for."""

    publisher: str
    step: pb.CeremonyStep


@dataclass(frozen=True, slots=True)
class ShareMade:
    """`body` of step 4, which is on disk and stays as it is."""

    body: bytes


@dataclass(frozen=True, slots=True)
class KeyMade:
    fingerprint: bytes
    mask_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class KeyWrong:
    """There is no key, since what `site` gave is wrong: `kind` is c.BOX or c.SHARE."""

    kind: int
    site: str


Event = Heard | ShareMade | KeyMade | KeyWrong

# ---- Effects -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Say:
    """Sign and publish this, once the state is on disk."""

    step: int
    body: bytes


@dataclass(frozen=True, slots=True)
class MakeShare:
    coin: bytes


@dataclass(frozen=True, slots=True)
class MakeKey:
    """`boxes`: those for this site. `mask_commitments`: what the content of each is held to."""

    coin: bytes
    shares: Mapping[str, bytes]
    boxes: Mapping[str, bytes]
    mask_commitments: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Finish:
    """All sites hold the key that was made last."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """This ceremony makes no key, because of what `site` did."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class Doubted:
    """A record is not by this site although the broker says so; it does not count."""

    site: str


Effect = Say | MakeShare | MakeKey | Finish | Stopped | Doubted

# ---- State -------------------------------------------------------------------

Bodies = Mapping[tuple[int, str], bytes]


@dataclass(frozen=True, slots=True)
class State:
    """`own`: by step, what this site says. `heard`: by step and site, what counts."""

    manifest: Manifest
    name: str
    own: Mapping[int, bytes] = field(repr=False)
    heard: Bodies = MappingProxyType({})
    doubted: frozenset[str] = frozenset()
    stopped: Stopped | None = None

    @property
    def step(self) -> int:
        """The one that is not complete; OVER when all are."""
        return next((s for s in range(1, OVER) if self._lacks(s)), OVER)

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Who has not said what the step lacks."""
        return self._lacks(self.step)

    def _lacks(self, step: int) -> tuple[str, ...]:
        if step == OVER:
            return ()
        return tuple(name for name in self.manifest.names if (step, name) not in self.heard)

    def said(self, step: int) -> dict[str, bytes]:
        """What each site has said in a complete step."""
        return {name: self.heard[step, name] for name in self.manifest.names}


def begin(manifest: Manifest, name: str, coin_part: bytes) -> State:
    """The state of a site before it has heard anything. `coin_part`: 32 random bytes."""
    committed = c.commitment(manifest, name, COIN, coin_part)
    return State(manifest, name, {1: committed, COIN: coin_part})


def with_share(state: State, body: bytes) -> State:
    """The state of a site that has its share; `body` is that of step 4."""
    committed = c.commitment(state.manifest, state.name, OFFER, body)
    return replace(state, own={**state.own, 3: committed, OFFER: body})


def handle(state: State, event: Event, is_signed: IsSigned) -> tuple[State, tuple[Effect, ...]]:
    """Return the state after an event and what to do."""
    if isinstance(event, Heard):
        return _heard(state, event, is_signed)
    if isinstance(event, ShareMade):
        state = with_share(state, event.body)
    else:
        state = replace(state, own={**state.own, CONFIRMATION: _verdict(state, event)})
    return state, resume(state)


def _verdict(state: State, event: KeyMade | KeyWrong) -> bytes:
    if isinstance(event, KeyMade):
        return c.pack_confirmation(state.manifest, event.fingerprint, event.mask_key)
    return c.pack_complaint(event.kind, event.site)


def resume(state: State) -> tuple[Effect, ...]:
    """What a state calls for, also after a restart. To say something again does no harm."""
    if state.stopped is not None:
        return (state.stopped,)
    step = min(state.step, CONFIRMATION)
    if step in state.own:
        return (Finish(),) if state.step == OVER else (Say(step, state.own[step]),)
    if step == CONFIRMATION:
        return (_make_key(state),)
    assert step == 3, f"step {step} is said from the beginning on"
    return (MakeShare(_coin(state)),)


def _coin(state: State) -> bytes:
    return c.coin(state.manifest, state.said(COIN))


def _make_key(state: State) -> MakeKey:
    names = state.manifest.names
    offers = {name: c.parse_offer(body, len(names)) for name, body in state.said(OFFER).items()}
    return MakeKey(
        _coin(state),
        {name: offer.share for name, offer in offers.items()},
        {
            name: offer.boxes[[other for other in names if other != name].index(state.name)]
            for name, offer in offers.items()
            if name != state.name
        },
        {name: offer.mask_commitment for name, offer in offers.items()},
    )


# ---- What is heard -------------------------------------------------------------


def _heard(state: State, event: Heard, is_signed: IsSigned) -> tuple[State, tuple[Effect, ...]]:
    said, manifest = event.step, state.manifest
    site, key = said.learner, (said.step, said.learner)
    about_it = said.ceremony == manifest.ceremony and site in manifest.keys
    if not about_it or event.publisher != f"learner:{site}" or state.heard.get(key) == said.body:
        return state, ()
    if state.stopped is not None or state.step == OVER:
        return state, ()
    signed = c.signed_bytes(manifest, site, said.step, said.body)
    if not is_signed(manifest.keys[site], signed, said.signature):
        if site in state.doubted:
            return state, ()
        return replace(state, doubted=state.doubted | {site}), (Doubted(site),)
    if reason := _broken(state, said):
        stopped = Stopped(site, f"{site} {reason}")
        return replace(state, stopped=stopped), (stopped,)
    before = state.step
    state = replace(state, heard={**state.heard, key: said.body})
    return state, resume(state) if state.step != before else ()


def _broken(state: State, said: pb.CeremonyStep) -> str:
    """Which rule of the ceremony a signed step breaks; "" if none."""
    step, site, body = said.step, said.learner, said.body
    if (step, site) in state.heard:
        return f"has said two different things in step {step}"
    if step > state.step:
        waited = ", ".join(state.waits_for)
        return f"has said step {step} before its time: step {state.step} of {waited} was not there"
    if site == state.name and state.own[step] != body:
        return (
            f"is this site, and has said in step {step} what it does not know any more: its "
            "secrets of this ceremony are lost, or two processes speak for it"
        )
    try:
        return _wrong_body(state, step, site, body)
    except PeerError as error:
        return f"has said in step {step} what cannot be read: {error}"


def _wrong_body(state: State, step: int, site: str, body: bytes) -> str:
    """What is wrong with a body whose time it is. Raises PeerError for what cannot be read."""
    manifest = state.manifest
    if step == CONFIRMATION:
        return _wrong_confirmation(state, body)
    if step == OFFER:
        c.parse_offer(body, len(manifest.names))
    elif len(body) != c.HASH_BYTES:
        raise PeerError(f"{len(body)} bytes; it has {c.HASH_BYTES}")
    if step in HASHES or c.commitment(manifest, site, step, body) == state.heard[step - 1, site]:
        return ""
    return f"has said in step {step} another thing than it was bound to by step {step - 1}"


def _wrong_confirmation(state: State, body: bytes) -> str:
    found = c.parse_confirmation(body, state.manifest.names)
    if found.kind == c.BOX:
        return (
            f"says that its box of {found.site} does not hold what {found.site} is bound to; one "
            "of these two is wrong, and nobody else can tell which"
        )
    if found.kind == c.SHARE:
        return f"says that the share of {found.site} is no part of a key"
    own = state.own[CONFIRMATION]
    if own[0] == c.CONFIRM and own != body:
        return "confirms another key than all shares and boxes give"
    return ""
