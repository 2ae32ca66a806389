"""What becomes of a site's wish to be admitted: a decision, from what is known and the time.

Laws:
1. The first key that asks with a code is bound to it; no other key is, whatever comes later.
2. To ask again is harmless and gets the same answer, until the operator has decided.
3. Nobody is admitted here. Only the list of peers, which the operator writes, makes a peer.
4. Whatever keeps a wish from being granted is told to the site in words, and what somebody else may
   have done with its code is told to the operator, too.

Pure. That the asker holds the invitation's key was shown by the handshake.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from metisfl.proto.enrolment import ADMITTED, REFUSED, WAITING, Answer, Ask, Invitation

__all__ = ["Decision", "decide", "open_invitations"]


@dataclass(frozen=True, slots=True)
class Decision:
    """`bind` is to be on disk before the answer goes out; `suspect`: the operator must know."""

    answer: Answer
    bind: Invitation | None = None
    suspect: bool = False


def open_invitations(
    invitations: Mapping[str, Invitation], now_unix_s: float
) -> dict[str, Invitation]:
    """Those of them whose codes still open the door, by principal."""
    return {who: it for who, it in invitations.items() if now_unix_s < it.expires_unix_s}


def decide(
    principal: str,
    ask: Ask,
    *,
    invitations: Mapping[str, Invitation],
    peers: Mapping[bytes, str],
    now_unix_s: float,
) -> Decision:
    """`principal` is whom the invitation in use is for; `peers`: public key -> principal."""
    owner = peers.get(ask.site)
    if owner == principal:
        return Decision(Answer(ADMITTED))
    if owner is not None:
        return _refused(
            f"this key is {owner}'s already; each has a key of its own: give another --home"
        )
    if principal in peers.values():
        return _refused(
            f"{principal} is admitted already, with another key. If this site is to take its place,"
            f" the operator runs `metisfl expel` for it and invites it again"
        )
    invitation = invitations.get(principal)
    if invitation is None:
        return _refused(
            f"there is no invitation for {principal} any more; ask the operator for a new one"
        )
    if invitation.public != ask.invitation:
        return _refused(f"a newer code for {principal} has replaced this one; use that")
    if now_unix_s >= invitation.expires_unix_s:
        return _refused("this code has expired; ask the operator for a new one")
    if invitation.asked == ask.site:
        return Decision(Answer(WAITING))
    if invitation.asked is not None:
        return _refused(
            "another key has asked with this code before, and a code works once. If that was not "
            "you, somebody else has your code: tell the operator, who must not admit that one, and "
            "ask for a new code",
            suspect=True,
        )
    if any(other.asked == ask.site for other in invitations.values()):
        return _refused("this key has asked by another invitation already; give another --home")
    return Decision(Answer(WAITING), bind=replace(invitation, asked=ask.site))


def _refused(reason: str, *, suspect: bool = False) -> Decision:
    return Decision(Answer(REFUSED, reason), suspect=suspect)
