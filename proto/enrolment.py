"""How a site that nobody knows yet asks to be let in: the message `J`, and what people compare.

Rule 1: an invitation's key opens one thing, this question. A site sends `J` with the invitation's
public key and its own; the answer is `J` with a state and, if it was refused, the reason.
Rule 2: two people compare one fingerprint. It covers who the site is, its key, and the keys of both
servers: a site that was led to other servers shows another one, and so does another site.

Keys are 40 bytes in Z85 here, 32 on the wire, where any 32 bytes are a key.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from zmq.utils import z85

from metisfl.proto.errors import PeerError

__all__ = [
    "ADMITTED",
    "ENROL",
    "INVITED",
    "REFUSED",
    "WAITING",
    "Answer",
    "Ask",
    "Invitation",
    "fingerprint",
    "pack_answer",
    "pack_ask",
    "parse_answer",
    "parse_ask",
]

ENROL: Final = b"J"
INVITED: Final = "invited:"
"""What stands before the principal that an invitation is for, as the name of who uses its key."""

WAITING: Final = 1  # the operator has not admitted it yet; ask again
ADMITTED: Final = 2  # from now on its own key opens the door
REFUSED: Final = 3  # and stays refused

KEY_BYTES: Final = 32
ANSWER_BYTES_MAX: Final = 2048
FINGERPRINT_BITS: Final = 100
FINGERPRINT_GROUP: Final = 4


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the broker keeps of a one-time code, which it cannot make again from this.

    `public` is the public half of the code's key, `asked` the key of the site that used it.
    """

    principal: str
    public: bytes
    federation: str
    expires_unix_s: int
    asked: bytes | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A site's wish to be known by the key `site`, by the right of the key `invitation`."""

    invitation: bytes
    site: bytes


@dataclass(frozen=True, slots=True)
class Answer:
    state: int
    reason: str = ""


def fingerprint(principal: str, *, site: bytes, broker: bytes, controller: bytes) -> str:
    """What site and operator compare: five groups of four letters and digits, 100 bits.

    Nobody can make a key, of a site or a server, that shows the fingerprint of another: that takes
    2^100 tries. Whoever compares only two groups is protected by 2^40, which is not enough.
    """
    for key in (site, broker, controller):
        assert len(key) == 40, "keys are in Z85"
    told = b"\0".join([b"metisfl fingerprint 1", principal.encode(), site, broker, controller])
    digest = hashlib.sha256(told).digest()
    text = base64.b32encode(digest).decode()[: FINGERPRINT_BITS // 5]
    groups = range(0, len(text), FINGERPRINT_GROUP)
    return "-".join(text[at : at + FINGERPRINT_GROUP] for at in groups)


def pack_ask(ask: Ask) -> list[bytes]:
    return [ENROL, z85.decode(ask.invitation), z85.decode(ask.site)]


def parse_ask(parts: Sequence[bytes]) -> Ask:
    """Parse what came by an invitation's key. Raises PeerError for anything but an Ask."""
    kind = parts[0] if parts else b""
    if kind != ENROL:
        raise PeerError(f"an invitation allows to ask for admission only, not {kind[:8]!r}")
    if len(parts) != 3:
        raise PeerError(f"a wish for admission has {len(parts)} parts; it has exactly 3")
    for key in parts[1:]:
        if len(key) != KEY_BYTES:
            raise PeerError(f"a key has {len(key)} bytes; it has exactly {KEY_BYTES}")
    if parts[1] == parts[2]:
        raise PeerError("the invitation's key cannot be the site's; make one of its own")
    return Ask(z85.encode(parts[1]), z85.encode(parts[2]))


def pack_answer(answer: Answer) -> list[bytes]:
    return [ENROL, bytes([answer.state]), answer.reason.encode()[:ANSWER_BYTES_MAX]]


def parse_answer(parts: Sequence[bytes]) -> Answer:
    """Parse what the broker says to an Ask. Raises PeerError."""
    if len(parts) != 3 or parts[0] != ENROL or len(parts[1]) != 1:
        kind = parts[0][:8] if parts else b""
        raise PeerError(f"{kind!r} of {len(parts)} parts is no answer to a wish for admission")
    state = parts[1][0]
    if state not in (WAITING, ADMITTED, REFUSED):
        raise PeerError(
            f"the broker's answer has the state {state}, unknown here; its version is another one"
        )
    if len(parts[2]) > ANSWER_BYTES_MAX:
        raise PeerError(f"a reason has {len(parts[2])} bytes; at most {ANSWER_BYTES_MAX}")
    return Answer(state, parts[2].decode(errors="replace"))
