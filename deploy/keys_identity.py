"""Make a key pair for this site or server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from metisfl.deploy.keys import IDENTITY_FILE, PRINCIPALS_ALLOWED, create_identity

__all__ = ["command"]


def command(argv: list[str]) -> int:
    """`metisfl keys identity`: the public line alone goes to stdout."""
    parser = argparse.ArgumentParser(
        prog="metisfl keys identity",
        description="Make a key pair in DIR/identity.key and print the public line, which the "
        "operators of the broker and the controller put into their `peers` file.",
    )
    parser.add_argument("principal", metavar="PRINCIPAL", help=PRINCIPALS_ALLOWED)
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="this site's keys folder"
    )
    options = parser.parse_args(argv)
    made = create_identity(options.folder, options.principal)
    print(
        f"wrote {options.folder / IDENTITY_FILE}; it is secret, keep it on this machine. "
        "Give this line to the operators of the broker and the controller:",
        file=sys.stderr,
    )
    print(made.public_line)
    return 0
