"""Admit a principal to a federation's servers, at once and without a restart.

Rule: it edits the servers' lists of peers and nothing else; a running server follows within a
second, and records it in its audit log and as events.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from metisfl.deploy.admit_asked import admit_asked, list_invited
from metisfl.deploy.keys import PRINCIPALS_ALLOWED, check_principal, is_public_key
from metisfl.deploy.registry import Peer, admit
from metisfl.proto.errors import UserError
from metisfl.proto.topics import check_name

__all__ = ["command", "principal_named", "servers_parser"]


def command(argv: list[str]) -> int:
    """`metisfl admit`: let a public key in."""
    parser = servers_parser(
        "metisfl admit",
        "Let a principal connect. Do it for the broker's home and for the controller's: on one "
        "machine with one command, else with the same command on each. Without KEY, who has asked "
        "by the code of `metisfl invite` is admitted; without NAME, they are listed.",
        name_needed=False,
    )
    parser.add_argument(
        "key",
        metavar="KEY",
        nargs="?",
        help="its public key, as `metisfl keys show` prints it at the site",
    )
    parser.add_argument(
        "--fingerprint",
        metavar="XXXX-...",
        help="what the site reads from `metisfl join`; default: you are asked",
    )
    parser.add_argument(
        "--federation",
        metavar="NAME",
        action="append",
        default=[],
        help="let it take part in this federation only; may be repeated (default: in all)",
    )
    # A key is known by its form: one in 85 begins with a dash, as an option does.
    keys = [word for word in argv if is_public_key(word.encode())]
    options = parser.parse_intermixed_args([word for word in argv if word not in keys])
    if options.name is None:
        return list_invited(options.home)
    principal = principal_named(options.name)
    federations = frozenset(check_name(name, "federation") for name in options.federation)
    if options.key is not None or len(keys) > 1:
        raise UserError(
            f"{options.key or keys[1]!r}: NAME and one public key are expected, of 40 characters, "
            "as `metisfl keys show` prints it"
        )
    if not keys:
        return admit_asked(options.home, principal, federations, options.fingerprint)
    key = keys[0].encode()
    for home in options.home:
        new = admit(home / "keys", Peer(principal, key, federations))
        print(f"{home}: {principal} " + ("is admitted" if new else "was admitted already"))
    return 0


def servers_parser(
    program: str, description: str, *, name_needed: bool = True
) -> argparse.ArgumentParser:
    """A parser with NAME and --home, once or more."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs=None if name_needed else "?",
        help=f"{PRINCIPALS_ALLOWED}; a bare name is a learner's",
    )
    parser.add_argument(
        "--home",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="home of the broker or the controller; repeat it for both",
    )
    return parser


def principal_named(name: str) -> str:
    """The principal that is meant by `name`, which may be a learner's bare name."""
    servers = ("broker", "controller")
    return check_principal(name if ":" in name or name in servers else f"learner:{name}")
