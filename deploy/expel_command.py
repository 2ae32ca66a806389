"""Expel a principal from a federation's servers, at once and without a restart.

Rule: it edits the servers' lists of peers and nothing else; a running server follows within a
second, cuts its connections, and records it in its audit log and as events.
"""

from __future__ import annotations

from metisfl.deploy.admit_command import principal_named, servers_parser
from metisfl.deploy.registry import expel

__all__ = ["command"]


def command(argv: list[str]) -> int:
    """`metisfl expel`: let a principal in no more."""
    parser = servers_parser(
        "metisfl expel",
        "Let a principal in no more: its connections are cut within a second, and its key opens "
        "nothing any more. Do it for the broker's home and for the controller's.",
    )
    options = parser.parse_args(argv)
    principal = principal_named(options.name)
    for home in options.home:
        gone = expel(home / "keys", principal)
        print(f"{home}: {principal} is expelled; it had the key {gone.public.decode()}")
    return 0
