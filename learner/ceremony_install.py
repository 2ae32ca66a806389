"""A finished key's place: its two files in the keys folder, those of a former key moved aside.

Rule: whatever moment this process dies at, `install` does the rest when it is called again with
the same key, and at no moment is a key lost: what is moved is in `former/FINGERPRINT/`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE, load_public, write_new_key
from metisfl.deploy.key_lists import replace_file
from metisfl.learner.ceremony_kept import STATE_FILE
from metisfl.proto.ceremony import Manifest
from metisfl.proto.ckks_key import FILE_BYTES_MAX, PublicPart, SecretPart
from metisfl.proto.errors import PeerError, UserError, machine_error
from metisfl.proto.model_file import sync_folder

__all__ = ["DONE_FILE", "FORMER", "install", "made_before"]

FORMER: Final = "former"
DONE_FILE: Final = "ceremony.done"


def made_before(folder: Path, manifest: Manifest) -> PublicPart | None:
    """The key of this ceremony if it was made and is in force here; None else.

    Raises UserError for a public part that is damaged.
    """
    try:
        done = (folder / DONE_FILE).read_text().split()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / DONE_FILE}: cannot be read: {error}") from None
    if done[:1] != [manifest.digest.hex()]:
        return None
    public = load_public(folder)
    return public if public is not None and done[1:] == [public.fingerprint.hex()] else None


def install(folder: Path, manifest: Manifest, public: PublicPart, secret: SecretPart) -> None:
    """Put the key into force and forget the ceremony. Raises UserError, MachineError, DiskFull."""
    try:
        for name, content in ((PUBLIC_FILE, public.pack()), (SECRET_FILE, secret.pack())):
            _make_way(folder, name, content)
        if not (folder / PUBLIC_FILE).exists():
            (folder / SECRET_FILE).unlink(missing_ok=True)  # ours: whatever else was moved
            write_new_key(folder, public, secret)
        replace_file(folder / DONE_FILE, f"{manifest.digest.hex()} {public.fingerprint.hex()}\n")
        sync_folder(folder)
        (folder / STATE_FILE).unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise machine_error(f"{folder}: the key cannot be put there: {error}", error) from None


def _make_way(folder: Path, name: str, content: bytes) -> None:
    """Move a file of another key aside, and delete a part of this one that was cut off."""
    path = folder / name
    try:
        with path.open("rb") as file:
            found = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return
    if found == content:
        return
    if content.startswith(found):
        path.unlink()
        return
    place = folder / FORMER / _fingerprint(path, name, found)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.path.lexists(place / name):
        raise UserError(f"{place / name} is there already; move it or {path} away")
    os.rename(path, place / name)
    sync_folder(place)


def _fingerprint(path: Path, name: str, found: bytes) -> str:
    try:
        if name == PUBLIC_FILE:
            return PublicPart.parse(found).fingerprint.hex()
        return SecretPart.parse(found).fingerprint.hex()
    except PeerError as error:
        raise UserError(f"{path}: {error}; move it away, and run the same command again") from None
