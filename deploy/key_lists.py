"""Lists of public keys, in plain text files: `principal publickey` to a line.

Rule: a list is edited by people too. What they wrote, comments and order, stays as it is; a line
that cannot be is named with its number; a file is replaced as a whole or not at all.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from metisfl.deploy.keys import (
    check_principal,
    is_public_key,
    principal_at,
    read_lines,
    write_new,
)
from metisfl.proto.errors import UserError, machine_error

__all__ = [
    "SERVERS_FILE",
    "SERVER_PRINCIPALS",
    "Entry",
    "add_line",
    "add_server",
    "load_list",
    "load_servers",
    "remove_lines",
    "replace_file",
]

SERVERS_FILE = "servers"
SERVER_PRINCIPALS = ("broker", "controller")
OTHERS_MAY_WRITE = 0o002
SERVERS_TEXT = """\
# The servers that this site trusts: `broker publickey` and `controller publickey`.
"""


class Entry(NamedTuple):
    """One line: a principal, its public key in Z85, and what stands behind them."""

    line: int
    principal: str
    public: bytes
    rest: Sequence[str]


def load_servers(folder: Path, *needed: str) -> dict[str, bytes]:
    """Read `folder`/servers: "broker" and/or "controller" -> public key (Z85).

    Raises UserError, also if one of `needed` is not there.
    """
    path = folder / SERVERS_FILE
    remedy = "create it, with the lines that the operator of broker and controller gave you"
    servers = {entry.principal: entry.public for entry in load_list(path, remedy)}
    for principal in servers:
        if principal not in SERVER_PRINCIPALS:
            raise UserError(f"{path}: {principal!r} is not a server; use broker or controller")
    for principal in needed:
        if principal not in servers:
            raise UserError(f"{path} has no line for the {principal}")
    return servers


def add_server(folder: Path, principal: str, public: bytes) -> None:
    """Add a line to `folder`/servers. The same line twice is one; a conflict raises UserError."""
    if principal not in SERVER_PRINCIPALS:
        raise UserError(f"server {principal!r}: use broker or controller")
    add_line(folder / SERVERS_FILE, SERVERS_TEXT, principal, public)


def load_list(path: Path, remedy: str, *, more_words: int = 0) -> list[Entry]:
    """Read a list in its order; a line may have `more_words` behind the key.

    Raises UserError, with `remedy` if there is no file.
    """
    entries: list[Entry] = []
    lines: dict[str | bytes, int] = {}  # where each principal and each key was first seen
    for number, words in read_lines(path, remedy, mode_refused=OTHERS_MAY_WRITE):
        if not 2 <= len(words) <= 2 + more_words:
            raise UserError(
                f"{path}:{number}: {len(words)} words; allowed is `principal publickey`"
            )
        principal, key = principal_at(f"{path}:{number}", words[0]), words[1].encode()
        if not is_public_key(key):
            raise UserError(
                f"{path}:{number}: {words[1]!r} is not a public key: 40 characters, as printed by "
                "`metisfl keys show`"
            )
        for seen in (principal, key):
            if seen in lines:
                what = "principal" if seen is principal else "key"
                raise UserError(f"{path}:{number}: the {what} of line {lines[seen]} again")
            lines[seen] = number
        entries.append(Entry(number, principal, key, words[2:]))
    return entries


def add_line(
    path: Path, heading: str, principal: str, public: bytes, rest: Sequence[str] = ()
) -> bool:
    """Add a line; a new file begins with `heading`. False if the same line is there already.

    Raises UserError for a conflict, MachineError if the file cannot be written.
    """
    check_principal(principal)
    if not is_public_key(public):
        raise UserError(f"{public!r} is not a public key: 40 characters of Z85")
    known = load_list(path, "", more_words=len(rest) or 1) if path.exists() else []
    for entry in known:
        if (entry.principal, entry.public, tuple(entry.rest)) == (principal, public, tuple(rest)):
            return False
        if principal == entry.principal or public == entry.public:
            raise UserError(
                f"{path} already lists {entry.principal} in line {entry.line}, with another key, "
                "under another name or for other federations; remove that line first"
            )
    before = path.read_text() if path.exists() else heading
    gap = "" if before.endswith("\n") else "\n"
    replace_file(path, f"{before}{gap}{' '.join([principal, public.decode(), *rest])}\n")
    return True


def remove_lines(path: Path, numbers: Sequence[int]) -> None:
    """Take these lines (counted from 1) out. Raises MachineError if it cannot be written."""
    lines = path.read_text().split("\n")
    replace_file(path, "\n".join(line for n, line in enumerate(lines, 1) if n not in numbers))


def replace_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Write the whole file durably; a new one gets `mode`. Raises MachineError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            mode = stat.S_IMODE(path.stat().st_mode)
        replacement = path.with_name(f".{path.name}.{os.getpid()}")
        replacement.unlink(missing_ok=True)
        write_new(replacement, text.encode())
        replacement.chmod(mode)
        os.replace(replacement, path)
    except OSError as error:
        raise machine_error(f"{path}: cannot be written: {error.strerror}", error) from None
