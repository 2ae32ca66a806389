"""Whether a community model is the fold of the updates that it names: fetch all and fold them here.

Rule: the same C code folds at the controller and here, and gives the same bits; a controller that
folded anything else cannot give a file with the digest that comes out. No key is used: what is
folded stays encrypted.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from metisfl.learner.transfer import BulkClient
from metisfl.native_c.ckks import BlockError, Context, fold_payloads
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import ModelFile, content_hash, open_model
from metisfl.proto.model_pb2 import Encryption
from metisfl.proto.tensors import encrypted_manifest, encrypted_values, is_encrypted

__all__ = ["NotTheFold", "verify"]

PROGRESS_S: Final = 0.5


class NotTheFold(PeerError):
    """The controller folded something else than the model's manifest says."""


class _Stopped(Exception):
    """Nobody waits for the fold any more."""


async def verify(
    path: Path,
    digest: bytes,
    bulk: BulkClient,
    public: PublicPart,
    folder: Path,
    on_progress: Callable[[float], None],
) -> None:
    """Check that the model at `path`, whose digest (32 bytes) this is, is the fold of its updates.

    `folder` is made for the updates, which are as large as the model, and is gone afterwards.
    Raises NotTheFold (also for a model that is gone or damaged here), DownloadRefused for an update
    that the controller does not give, MachineError for a full disk.
    """
    try:
        opened = open_model(path)
    except (FileNotFoundError, MachineError) as error:
        raise NotTheFold(f"the model is gone or damaged here: {error}") from None
    with opened as model:
        if not is_encrypted(model.manifest):
            raise NotTheFold("the model is plain, in a federation that is encrypted")
        shares = model.manifest.encryption.shares
        if not shares:
            raise NotTheFold("the model names no update that is in it")
        steps = len(shares) + 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            updates = []
            for number, share in enumerate(shares):
                updates.append(folder / f"{share.learner}.update")

                def tell(done: float, number: int = number) -> None:
                    on_progress((number + done) / steps)

                await bulk.download(share.update_digest, updates[-1], on_progress=tell)
            found = await _folded(model, updates, public, lambda: on_progress((steps - 1) / steps))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if found != digest:
        raise NotTheFold(
            f"the controller folded something else than the {len(shares)} updates that the model "
            f"names: their fold has the digest {found.hex()}, the model {digest.hex()}"
        )


async def _folded(
    model: ModelFile, updates: Sequence[Path], public: PublicPart, tell: Callable[[], None]
) -> bytes:
    """The digest of the fold, computed in a thread; `tell` is called meanwhile."""
    stopped = threading.Event()
    fold = asyncio.ensure_future(asyncio.to_thread(_digest, model, updates, public, stopped))
    try:
        while not fold.done():
            await asyncio.wait([fold], timeout=PROGRESS_S)
            tell()
    finally:
        stopped.set()
        fold.cancel()
    return fold.result()


def _digest(
    model: ModelFile, updates: Sequence[Path], public: PublicPart, stopped: threading.Event
) -> bytes:
    """The digest of the fold of `updates` under the manifest of `model`. Raises NotTheFold."""
    result = content_hash(model.manifest_bytes)
    context = Context(public.fingerprint, public.limb_bits, public.ring_dimension, public.modulus)

    def write(block: memoryview) -> None:
        if stopped.is_set():
            raise _Stopped
        result.update(block)

    with ExitStack() as stack:
        opened = [stack.enter_context(open_model(path)) for path in updates]
        for one in opened:
            _check_form(model, one, public)
        form = model.manifest.encryption
        try:
            fold_payloads(
                context,
                [one.read_payload_into for one in opened],
                [1] * len(opened),
                ciphertexts=ckks.ciphertexts(encrypted_values(model.manifest), form.ring_dimension),
                seeds=opened[0].manifest.encryption.seeds,
                exponents_digest=exponents_of(model.manifest),
                polynomials=form.polynomials,
                write=write,
            )
        except BlockError as error:
            name = updates[error.source].stem
            raise NotTheFold(f"the update of {name} cannot be folded: {error}") from None
    return result.digest()


def _check_form(model: ModelFile, update: ModelFile, public: PublicPart) -> None:
    """Raise NotTheFold unless this update may be in this model."""
    form = Encryption()
    form.CopyFrom(model.manifest.encryption)
    form.ClearField("shares")
    sealed = public.update_form(())  # as sites seal, and nothing else
    form.polynomials, form.seeds = sealed.polynomials, sealed.seeds
    if encrypted_manifest(model.manifest, form) != update.manifest:
        raise NotTheFold(
            f"what the controller gave as the update of {update.path.stem} has other tensors, "
            "another key or other exponents than the model"
        )
