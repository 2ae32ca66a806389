"""Open the secret part of a key that another site sealed to this one."""

from __future__ import annotations

import argparse
from pathlib import Path

from metisfl.deploy.ckks_keys import (
    PUBLIC_FILE,
    SECRET_FILE,
    check_same_key,
    load_public,
    write_secret,
)
from metisfl.deploy.keys import load_identity
from metisfl.deploy.sealing import open_box
from metisfl.proto.ckks_key import FILE_BYTES_MAX
from metisfl.proto.errors import UserError

__all__ = ["command"]


def command(argv: list[str]) -> int:
    """`metisfl keys open`. Raises UserError, MachineError."""
    parser = argparse.ArgumentParser(
        prog="metisfl keys open",
        description="Open FILE, which was sealed to the identity in DIR, and write "
        "DIR/secret.ckks. DIR/public.ckks must be there already.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--folder", type=Path, required=True, metavar="DIR", help="this site's keys folder"
    )
    options = parser.parse_args(argv)
    public = load_public(options.folder)
    if public is None:
        raise UserError(
            f"{options.folder / PUBLIC_FILE} does not exist; copy it there first, from the site "
            "that made the key"
        )
    identity = load_identity(options.folder)
    try:
        with options.file.open("rb") as file:
            sealed = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UserError(f"{options.file}: cannot be read: {error.strerror}") from None
    try:
        secret = open_box(sealed, identity)
    except UserError as error:
        raise UserError(f"{options.file}: {error}") from None
    check_same_key(options.file, secret, options.folder / PUBLIC_FILE, public)
    write_secret(options.folder, secret)
    print(
        f"wrote {options.folder / SECRET_FILE} (fingerprint {secret.fingerprint.hex()}); this site "
        f"now encrypts its updates, and {options.file} can be deleted"
    )
    return 0
