"""What a site keeps of a ceremony until its key is made: `ceremony.state` in its keys folder.

Rule 1: what a site is to say is on disk before it says what binds it to that, and is never drawn
anew: a site that came back with other randomness would have said two different things.
Rule 2: the file is a secret part of a key in the making, and its first bytes say so. It has mode
0600 from its first moment, takes the place of the former one at once, and goes when the key is
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgpack

from metisfl.deploy.keys import check_mode, write_new
from metisfl.learner.ceremony import OFFER, State, Stopped, begin, with_share
from metisfl.proto.ceremony import COIN_PART_BYTES, Manifest
from metisfl.proto.ckks_key import CEREMONY_MAGIC, MASK_KEY_BYTES
from metisfl.proto.errors import UserError, machine_error
from metisfl.proto.limits import CEREMONY_BODY_BYTES_MAX, CEREMONY_STEPS
from metisfl.proto.model_file import sync_folder

__all__ = ["STATE_FILE", "Kept", "begin_kept", "load", "pack", "parse", "save"]

STATE_FILE: Final = "ceremony.state"
FILE_BYTES_MAX: Final = 1 << 28
"""Above what a thousand sites say."""
SHARE_BYTES_MAX: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """`mask_part`: this site's of the mask key; `share`: OpenFHE's secret of its share, or b"".

    `through`: how far the log was read when this was written.
    """

    state: State
    coin_part: bytes = field(repr=False)
    mask_part: bytes = field(repr=False)
    share: bytes = field(default=b"", repr=False)
    through: int = 0


def begin_kept(manifest: Manifest, name: str) -> Kept:
    """A new ceremony, with randomness of the operating system."""
    coin_part, mask_part = os.urandom(COIN_PART_BYTES), os.urandom(MASK_KEY_BYTES)
    return Kept(begin(manifest, name, coin_part), coin_part, mask_part)


def pack(kept: Kept) -> bytes:
    """The content of the file."""
    state = kept.state
    stopped = state.stopped
    content: bytes = msgpack.packb(
        {
            "digest": state.manifest.digest,
            "name": state.name,
            "coin_part": kept.coin_part,
            "mask_part": kept.mask_part,
            "share": kept.share,
            "body": state.own.get(OFFER, b""),
            "through": kept.through,
            "heard": [[step, site, body] for (step, site), body in state.heard.items()],
            "doubted": sorted(state.doubted),
            "stopped": [] if stopped is None else [stopped.site, stopped.reason],
        }
    )
    return CEREMONY_MAGIC + content


def parse(data: bytes, manifest: Manifest, name: str) -> Kept | Stopped | None:
    """Read it. None if it is of another ceremony that may go on, Stopped if it never will.

    Raises ValueError for what `pack` did not write.
    """
    if not data.startswith(CEREMONY_MAGIC):
        raise ValueError(f"it does not begin with {CEREMONY_MAGIC.decode()}")
    try:
        found = msgpack.unpackb(data[len(CEREMONY_MAGIC) :], strict_map_key=True)
    except (msgpack.UnpackException, ValueError):
        raise ValueError("it is no msgpack") from None
    if not isinstance(found, dict) or list(found) != list(_CHECKS):
        raise ValueError(f"it must hold {', '.join(_CHECKS)}")
    for key, check in _CHECKS.items():
        if not check(found[key]):
            raise ValueError(f"its {key} cannot be")
    stopped = Stopped(*found["stopped"]) if found["stopped"] else None
    if (found["digest"], found["name"]) != (manifest.digest, name):
        return stopped
    return _kept(found, stopped, manifest, name)


def _kept(found: Mapping[str, Any], stopped: Stopped | None, manifest: Manifest, name: str) -> Kept:
    state = replace(
        begin(manifest, name, found["coin_part"]),
        heard={(step, site): body for step, site, body in found["heard"]},
        doubted=frozenset(found["doubted"]),
        stopped=stopped,
    )
    if found["body"]:
        state = with_share(state, found["body"])
    return Kept(state, found["coin_part"], found["mask_part"], found["share"], found["through"])


def load(folder: Path, manifest: Manifest, name: str) -> Kept | None:
    """What `folder` keeps of this ceremony; None if it is new here.

    Raises UserError for another one that is not over, and for a file that is damaged or open to
    others.
    """
    path = folder / STATE_FILE
    try:
        with path.open("rb") as file:
            check_mode(path, os.fstat(file.fileno()).st_mode, 0o077)
            data = file.read(FILE_BYTES_MAX)
        kept = parse(data, manifest, name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: {error}. Delete it, and begin again with a new manifest: without "
            "it this site cannot go on in the ceremony that it is of"
        ) from None
    if kept is None:
        raise UserError(
            f"{path} is of another ceremony, which is under way. Go on with that one's manifest; "
            "or, if it is given up, delete the file first"
        )
    return kept if isinstance(kept, Kept) else None


def save(folder: Path, kept: Kept) -> None:
    """Write the file, durably and at once. Raises MachineError, DiskFull."""
    path = folder / STATE_FILE
    replacement = folder / f".{STATE_FILE}.new"
    try:
        replacement.unlink(missing_ok=True)
        write_new(replacement, pack(kept))
        os.replace(replacement, path)
        sync_folder(folder)
    except OSError as error:
        raise machine_error(f"{path}: cannot be written: {error.strerror}", error) from None


def _bytes(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is bytes and least <= len(value) <= most


def _texts(value: Any) -> bool:
    return type(value) is list and all(type(each) is str for each in value)


_body = _bytes(0, CEREMONY_BODY_BYTES_MAX)


def _heard(value: Any) -> bool:
    return type(value) is list and all(
        type(each) is list
        and len(each) == 3
        and type(each[0]) is int
        and 1 <= each[0] <= CEREMONY_STEPS
        and type(each[1]) is str
        and _body(each[2])
        for each in value
    )


_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    "digest": _bytes(32, 32),
    "name": lambda value: type(value) is str,
    "coin_part": _bytes(COIN_PART_BYTES, COIN_PART_BYTES),
    "mask_part": _bytes(MASK_KEY_BYTES, MASK_KEY_BYTES),
    "share": _bytes(0, SHARE_BYTES_MAX),
    "body": _body,
    "through": lambda value: type(value) is int and 0 <= value < 1 << 63,
    "heard": _heard,
    "doubted": _texts,
    "stopped": lambda value: _texts(value) and len(value) in (0, 2),
}
