"""A site's partial of a community model under a joint key, as a file to send.

Rule 1: weights, contributors and what is said of this site are looked at before anything is made.
Rule 2: it is on disk for good when this returns, so that it can be sent again and need not be made
again: a second one of the same model would show more of the key.
"""

from __future__ import annotations

from pathlib import Path

from metisfl.learner.crypto import Crypto
from metisfl.learner.model_blocks import block_ranges, read_block, unreadable
from metisfl.learner.opening_policy import check_own, check_policy
from metisfl.learner.sealed_file import Progress
from metisfl.native_c.ckks import BlockError
from metisfl.proto.chunk import chunk_count, exponents_of
from metisfl.proto.errors import PeerError
from metisfl.proto.model_file import ModelFile, ModelWriter
from metisfl.proto.tensors import encrypted_manifest, encrypted_values, serialise_manifest

__all__ = ["make_partial"]


def make_partial(
    crypto: Crypto,
    model: ModelFile,
    path: Path,
    *,
    model_digest: bytes,
    own: tuple[str, bytes],
    initial: bool,
    progress: Progress,
) -> bytes:
    """Write this site's partial of `model`, whose digest (32 bytes) this is; return its digest.

    `own` is this site's name and the digest of the update that it gave in the model's round.
    Raises PeerError for a model that this site does not open, MachineError for a damaged file,
    OSError.
    """
    public, manifest = crypto.public, model.manifest
    if not public.is_joint:
        raise PeerError("a partial is asked for, and this site's key is not a joint one")
    check_policy(public, manifest, initial=initial)
    check_own(manifest, *own)
    form = public.partial_form(manifest.encryption.exponents, model_digest)
    partial = encrypted_manifest(manifest, form)
    count = chunk_count(manifest)
    with ModelWriter(path, serialise_manifest(partial)) as writer:
        for index, (_, rows) in enumerate(block_ranges(crypto, encrypted_values(manifest))):
            block = read_block(model, index)
            try:
                writer.append(
                    crypto.partial_block(
                        block,
                        ciphertexts=rows,
                        index=index,
                        count=count,
                        exponents_digest=exponents_of(manifest),
                        partials_digest=exponents_of(partial),
                    )
                )
            except BlockError as error:
                raise unreadable(model, index, error) from None
            progress((index + 1) / count)
        return writer.commit(sync=True)
