"""The model store: `models/<SHA-256 in hex>.model`, named by content.

Rule: a file under a model's name is complete, durable and never changed. Everything goes through a
draft in the same folder, fsync, then an atomic rename; a draft that a killed process left is
removed at the next start. So any thread may read while another puts or deletes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from metisfl.controller.room import RESERVE_BYTES, Room, explained
from metisfl.proto.errors import MachineError, machine_error
from metisfl.proto.model_file import DIGEST_BYTES, ModelFile, open_model, sync_folder

__all__ = ["ModelStore"]

_NAME = re.compile(r"([0-9a-f]{64})\.model")
_DRAFT = ".draft"


class ModelStore:
    """Models of one controller. `limit_bytes` bounds the folder; None leaves it to the disk.

    `reserve_bytes` stay free on the disk for the event log and the operating system.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int | None = None,
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        """Open or create `folder`. Raises MachineError if it cannot be used."""
        self.folder = folder
        self._room = Room(folder, "--models-limit", limit_bytes, reserve_bytes)
        self._drafts = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"*{_DRAFT}*"):
                leftover.unlink()
        except OSError as error:
            raise machine_error(f"model store {folder}: {error.strerror}", error) from None

    def path(self, digest: bytes) -> Path:
        """Where the model with this digest (32 bytes) is, or would be."""
        assert len(digest) == DIGEST_BYTES, f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}"
        return self.folder / f"{digest.hex()}.model"

    def draft(self, file_bytes: int) -> Path:
        """A fresh path in the store to write a model of `file_bytes` to; then `put` it.

        Raises NoRoom if there is none for it.
        """
        self._room.check(file_bytes)
        self._drafts += 1
        return self.folder / f"{os.getpid()}-{self._drafts}{_DRAFT}"

    def put(self, draft: Path, digest: bytes | None = None) -> bytes:
        """Take over the model file `draft` (on the same file system) and return its digest.

        With `digest`, which a writer such as `write_model` has just returned, the content is not
        read and synced again. Raises MachineError for what is no model file or cannot be made
        durable.
        """
        with open_model(draft) as model:
            try:
                if digest is None:
                    digest = model.digest()
                    os.fsync(model.fileno())
                os.replace(draft, self.path(digest))
                sync_folder(self.folder)
            except OSError as error:
                raise explained(self.folder, error) from None
        return digest

    def contains(self, digest: bytes) -> bool:
        return len(digest) == DIGEST_BYTES and self.path(digest).is_file()

    def open(self, digest: bytes) -> ModelFile:
        """Open a model for reading; it stays readable even if it is deleted meanwhile.

        Raises MachineError if it is not here or damaged.
        """
        try:
            return open_model(self.path(digest))
        except FileNotFoundError:
            raise MachineError(f"model store {self.folder}: no model {digest.hex()}") from None
        except OSError as error:
            raise MachineError(f"{self.path(digest)}: {error.strerror}") from None

    def verify(self, digest: bytes) -> None:
        """Read the whole model. Raises MachineError if its content has another digest."""
        with self.open(digest) as model:
            found = model.digest()
        if found != digest:
            raise MachineError(
                f"{self.path(digest)} is damaged: its content has the digest {found.hex()}; "
                "restore it from a backup or start the run again"
            )

    def digests(self) -> list[bytes]:
        """Every model that is here, in the order of their names."""
        names = sorted(os.listdir(self.folder))
        return [bytes.fromhex(match[1]) for name in names if (match := _NAME.fullmatch(name))]

    def delete(self, digest: bytes) -> None:
        """Delete a model; one that is not here is fine."""
        self.path(digest).unlink(missing_ok=True)

    def keep(self, digests: Collection[bytes]) -> list[bytes]:
        """Delete every model but these, and return what was deleted."""
        surplus = [digest for digest in self.digests() if digest not in digests]
        for digest in surplus:
            self.delete(digest)
        return surplus
