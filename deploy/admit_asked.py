"""Admit who asked with an invitation: the operator compares a fingerprint, not a key.

Rule: only what was compared is admitted. The key that is admitted is the one whose fingerprint was
shown, and an invitation ends with the admission that came of it.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from metisfl.deploy.invitations import INVITATIONS_FILE, change, find, load
from metisfl.deploy.keys import load_identity
from metisfl.deploy.registry import Peer, admit, load_registry
from metisfl.proto.enrolment import Invitation, fingerprint
from metisfl.proto.errors import UserError

__all__ = ["admit_asked", "list_invited"]


def list_invited(homes: Sequence[Path]) -> int:
    """Show who was invited, and the fingerprint of who has asked. Raises UserError."""
    keys = _broker_home(homes) / "keys"
    invitations = load(keys).values()
    for invitation in sorted(invitations, key=lambda it: (it.asked is None, it.principal)):
        asked = _fingerprint(keys, invitation) if invitation.asked else "has not asked yet"
        until = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(invitation.expires_unix_s))
        over = ", expired" if time.time() >= invitation.expires_unix_s else f", until {until}"
        print(f"{invitation.principal} to {invitation.federation}{over}: {asked}")
    if not invitations:
        print("nobody is invited")
    return 0


def admit_asked(
    homes: Sequence[Path], principal: str, federations: frozenset[str], told: str | None
) -> int:
    """Admit the key that has asked for `principal`, if its fingerprint is what the site reads.

    `told` is that fingerprint; None asks the operator. `federations` empty: that of the invitation.
    Raises UserError if nobody has asked, or if the fingerprints differ.
    """
    broker = _broker_home(homes)
    invitation = find(broker / "keys", principal)
    if invitation.asked is None:
        raise UserError(
            f"{principal} has not asked yet: the site runs `metisfl join` with the code first"
        )
    if time.time() >= invitation.expires_unix_s:
        raise UserError(f"the invitation of {principal} has expired; `metisfl invite` it again")
    shown = _fingerprint(broker / "keys", invitation)
    if told is None:
        print(f"{principal} asks to be admitted to {invitation.federation}; its fingerprint is")
        print(f"    {shown}")
        same = _yes("Does the site read the same, all five groups? [y/N] ")
    else:
        same = _letters(told) == _letters(shown)
    if not same:
        raise UserError(
            f"{principal} is not admitted: the broker was asked with {shown}. If the site reads "
            "another fingerprint, somebody else has used its code: `metisfl invite` it again, and "
            "the old code opens nothing any more"
        )
    peer = Peer(principal, invitation.asked, federations or frozenset({invitation.federation}))
    for home in (*(home for home in homes if home != broker), broker):
        new = admit(home / "keys", peer)
        print(f"{home}: {principal} " + ("is admitted" if new else "was admitted already"))

    def without_it(before: Mapping[str, Invitation]) -> Mapping[str, Invitation]:
        return {who: it for who, it in before.items() if it.asked != peer.public}

    change(broker / "keys", without_it, now_unix_s=time.time())
    if not any(load_identity(home / "keys").principal == "controller" for home in homes):
        names = " ".join(f"--federation {name}" for name in sorted(peer.federations))
        print("The controller must know it, too; with its home:")
        print(
            f"    metisfl admit {names} --home CONTROLLER_HOME -- {principal} "
            f"{shlex.quote(peer.public.decode())}"
        )
    return 0


def _broker_home(homes: Sequence[Path]) -> Path:
    for home in homes:
        if (home / "keys" / INVITATIONS_FILE).exists():
            return home
    raise UserError(
        f"nobody was invited: there is no keys/{INVITATIONS_FILE} in "
        f"{' or '.join(map(str, homes))}; `metisfl invite` puts it into the broker's home. Without "
        "an invitation, give KEY"
    )


def _fingerprint(keys: Path, invitation: Invitation) -> str:
    controller = load_registry(keys).peers.get("controller")
    if controller is None:
        raise UserError(f"{keys}/peers does not list the controller, which sites must know")
    assert invitation.asked is not None, "nobody has asked"
    return fingerprint(
        invitation.principal,
        site=invitation.asked,
        broker=load_identity(keys).public,
        controller=controller.public,
    )


def _yes(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _letters(shown: str) -> str:
    return "".join(letter for letter in shown.upper() if letter.isalnum())
