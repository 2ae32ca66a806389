"""Make keys and show them: who a site is, and what updates are encrypted with.

Rule: like `metisfl` itself, it only dispatches; each folder registers its commands in the
entry-point group `metisfl.keys`.
"""

from __future__ import annotations

from metisfl.deploy.command import dispatch

__all__ = ["command"]

KEYS_GROUP = "metisfl.keys"
ABOUT = (
    "Key pairs of sites and servers: every connection is encrypted, and both ends are known by\n"
    "their public keys. And keys for encrypted updates, which sites share and servers never hold."
)


def command(argv: list[str]) -> int:
    """`metisfl keys NAME ...`: run the command NAME with the rest of the arguments."""
    return dispatch("metisfl keys", KEYS_GROUP, ABOUT, argv)
