"""Who was invited and has not been admitted yet: the file `invitations` of the broker's keys.

Rule: the file has nothing that lets anybody in. It holds public halves of the codes' keys, never a
code. Commands and the broker change it one after the other, each time as a whole; whoever writes it
drops what has expired.

    learner:ada  {ZFV^Zq...  penguins  1764000000  8Yx+!Ru...

A principal, the code's public key, its federation, when the code expires (seconds since 1970), and
the key of the site that has asked by it, or `-`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from metisfl.deploy.key_lists import replace_file
from metisfl.deploy.keys import is_public_key, principal_at, read_lines
from metisfl.proto.enrolment import Invitation
from metisfl.proto.errors import MachineError, UserError
from metisfl.proto.topics import check_name

__all__ = [
    "INVITATIONS_FILE",
    "INVITATIONS_MAX",
    "Invitations",
    "change",
    "find",
    "load",
]

INVITATIONS_FILE: Final = "invitations"
INVITATIONS_MAX: Final = 1000
LOCK_FILE: Final = ".invitations.lock"
EXPIRY_MAX: Final = 1 << 40  # seconds; some 34,000 years
NOBODY: Final = "-"
HEADING: Final = """\
# Written by `metisfl invite`, `metisfl admit` and the broker; whoever it lists is not admitted yet.
"""

Invitations = Mapping[str, Invitation]
"""By principal: a newer invitation replaces an older one."""


def load(folder: Path) -> dict[str, Invitation]:
    """Read `folder`/invitations; without a file there are none. Raises UserError."""
    path = folder / INVITATIONS_FILE
    if not path.exists():
        return {}
    found: dict[str, Invitation] = {}
    for number, words in read_lines(path, "", mode_refused=0o077):
        invitation = _invitation(f"{path}:{number}", words)
        if invitation.principal in found:
            raise UserError(f"{path}:{number}: {invitation.principal} again; remove one")
        found[invitation.principal] = invitation
    return found


def find(folder: Path, principal: str) -> Invitation:
    """The invitation of `principal`. Raises UserError if there is none."""
    invitation = load(folder).get(principal)
    if invitation is None:
        raise UserError(
            f"{folder / INVITATIONS_FILE} has no invitation for {principal}: `metisfl invite` makes"
            " one, `metisfl admit` without a name lists them"
        )
    return invitation


def change(
    folder: Path,
    new: Callable[[Invitations], Invitations],
    *,
    now_unix_s: float,
    wait: bool = True,
) -> bool:
    """Replace what the file holds by what `new` makes of it, but for those that have expired.

    Others who change the file are waited for; with `wait` False, False is returned and nothing is
    done while somebody does. Raises UserError, also for more than 1,000, and MachineError.
    """
    with _alone(folder, wait) as alone:
        if not alone:
            return False
        before = load(folder)
        after = {who: it for who, it in new(before).items() if now_unix_s < it.expires_unix_s}
        if len(after) > INVITATIONS_MAX:
            raise UserError(
                f"{len(after)} invitations at a time; at most {INVITATIONS_MAX}: admit who has "
                "asked, or wait until some have expired"
            )
        if after != before:
            path = folder / INVITATIONS_FILE
            replace_file(path, HEADING + "".join(map(_line, after.values())), mode=0o600)
            _give_to_owner(folder, path)
        return True


def _line(invitation: Invitation) -> str:
    asked = invitation.asked.decode() if invitation.asked else NOBODY
    public, expires = invitation.public.decode(), invitation.expires_unix_s
    return f"{invitation.principal} {public} {invitation.federation} {expires} {asked}\n"


def _invitation(where: str, words: list[str]) -> Invitation:
    if len(words) != 5:
        raise UserError(
            f"{where}: {len(words)} words; allowed are principal, key, federation, expiry and the "
            f"key that has asked or `{NOBODY}`"
        )
    principal, public, federation, expires, asked = words
    for key in (public,) if asked == NOBODY else (public, asked):
        if not is_public_key(key.encode()):
            raise UserError(f"{where}: {key!r} is not a public key: 40 characters of Z85")
    digits = expires.isascii() and expires.isdigit() and len(expires) <= 13
    if not digits or int(expires) > EXPIRY_MAX:
        raise UserError(f"{where}: {expires!r} is no time in seconds since 1970")
    try:
        check_name(federation, "federation")
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Invitation(
        principal_at(where, principal),
        public.encode(),
        federation,
        int(expires),
        None if asked == NOBODY else asked.encode(),
    )


@contextmanager
def _alone(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock while the block runs; gives False if somebody has it and is not waited for."""
    path = folder / LOCK_FILE
    try:
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise MachineError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        _give_to_owner(folder, path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _give_to_owner(folder: Path, path: Path) -> None:
    """Root writes for the daemon whose folder it is, which must be able to read it."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
