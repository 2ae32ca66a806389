"""The files of a key for encrypted updates, in the `keys` folder beside the identity.

Rule 1: public.ckks may be anywhere; secret.ckks is at the sites, with mode 0600 from its first
moment, and never overwritten.
Rule 2: a broker or controller that finds a secret part among its files does not start.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from metisfl.deploy.keys import check_mode, write_new
from metisfl.proto.ckks_key import (
    FILE_BYTES_MAX,
    SEALED_MAGIC,
    PublicPart,
    SecretPart,
    is_secret,
)
from metisfl.proto.errors import MachineError, PeerError, UserError

__all__ = [
    "PUBLIC_FILE",
    "SECRET_FILE",
    "check_same_key",
    "load_public",
    "load_secret",
    "refuse_secret_parts",
    "write_new_key",
    "write_secret",
]

PUBLIC_FILE: Final = "public.ckks"
SECRET_FILE: Final = "secret.ckks"
CONFIGURATION: Final = "/etc/metisfl"
MAGIC_BYTES: Final = 8


def load_public(folder: Path) -> PublicPart | None:
    """Read `folder`/public.ckks; None if there is none. Raises UserError for what is no key."""
    path = folder / PUBLIC_FILE
    content = _content(path, mode_refused=0o002)
    if content is None:
        return None
    try:
        return PublicPart.parse(content)
    except PeerError as error:
        raise UserError(f"{path}: {error}; copy it again from the site that made the key") from None


def load_secret(folder: Path) -> SecretPart:
    """Read `folder`/secret.ckks, which must be of the same key as a public.ckks beside it.

    Raises UserError if it is missing, damaged, of another key or open to others.
    """
    path = folder / SECRET_FILE
    content = _content(path, mode_refused=0o077)
    if content is None:
        raise UserError(
            f"{path} does not exist; a site that has it makes a sealed copy with `metisfl keys "
            f"seal`, and `metisfl keys open FILE --folder {folder}` opens it here"
        )
    if content.startswith(SEALED_MAGIC):
        raise UserError(
            f"{path} is sealed: give it another name, and open it with `metisfl keys open FILE "
            f"--folder {folder}`"
        )
    try:
        secret = SecretPart.parse(content)
    except PeerError as error:
        raise UserError(f"{path}: {error}; have it sealed for this site again") from None
    public = load_public(folder)
    if public is not None:
        check_same_key(path, secret, folder / PUBLIC_FILE, public)
    return secret


def check_same_key(
    secret_path: Path, secret: SecretPart, public_path: Path, public: PublicPart
) -> None:
    """Raise UserError, which names both files, if these are parts of different keys."""
    if secret.fingerprint != public.fingerprint:
        raise UserError(
            f"{secret_path} is of the key {secret.fingerprint.hex()}, and {public_path} of "
            f"{public.fingerprint.hex()}; both must be of one key: take them from the site that "
            "made the federation's"
        )


def write_new_key(folder: Path, public: PublicPart, secret: SecretPart) -> None:
    """Write both parts of a key that was just made. Raises UserError if one is there already."""
    assert secret.fingerprint == public.fingerprint, "parts of two keys"
    path = folder / PUBLIC_FILE
    if os.path.lexists(path):
        raise UserError(f"{path} exists, and a key is never overwritten; take another folder")
    write_secret(folder, secret)
    try:
        write_new(path, public.pack())
        path.chmod(0o644)
    except OSError as error:
        (folder / SECRET_FILE).unlink()  # half a key would be in the way of the next attempt
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None


def write_secret(folder: Path, secret: SecretPart) -> None:
    """Write `folder`/secret.ckks, which must not exist. Raises UserError, MachineError."""
    path = folder / SECRET_FILE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_new(path, secret.pack())
    except FileExistsError:
        raise UserError(
            f"{path} exists, and a key is never overwritten; to take another key, move the old "
            "one away first"
        ) from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from None


def refuse_secret_parts(who: str, folders: Iterable[Path]) -> None:
    """Raise UserError if a file in these folders is a secret part, sealed or not.

    The configuration of this machine and systemd's credentials are looked at, too. Of each file
    only the first bytes are read. What this user may not read is passed by: it could not be used
    here.
    """
    others = [CONFIGURATION, os.environ.get("CREDENTIALS_DIRECTORY")]
    for folder in [*folders, *(Path(other) for other in others if other)]:
        for path in _files(folder):
            if is_secret(_beginning(path)):
                raise UserError(
                    f"{path} is the secret part of a key for encrypted updates, and {who} must "
                    "never hold it: whoever breaks in here could read every site's updates. Move "
                    "it to the site that it is for, or delete it if that site has it"
                )


def _files(folder: Path) -> Iterator[str]:
    for parent, _, names in os.walk(folder):  # follows no link to a folder, passes closed ones by
        for name in names:
            yield os.path.join(parent, name)


def _beginning(path: str) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a device may do something
            return b""
        with open(path, "rb", buffering=0) as file:
            return file.read(MAGIC_BYTES)
    except OSError:
        return b""


def _content(path: Path, mode_refused: int) -> bytes | None:
    """The file's bytes; None if there is no such file."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())  # of the file that is read, not of its name
            check_mode(path, status.st_mode, mode_refused)
            if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_BYTES_MAX:
                raise UserError(
                    f"{path}: {status.st_size} bytes; a part of a key is a file of up to "
                    f"{FILE_BYTES_MAX}"
                )
            return file.read(FILE_BYTES_MAX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
