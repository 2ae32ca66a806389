"""Encrypted updates of random limbs: who has no key cannot tell them from those of a site."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from example_key import PUBLIC, public_part
from numpy.typing import NDArray

from metisfl.controller.encrypted_fold import (
    EncryptedUpdate,
    context_of,
    fold_encrypted,
)
from metisfl.controller.store import ModelStore
from metisfl.native_c.ckks import block_bytes, open_block, seal_block
from metisfl.proto import ckks
from metisfl.proto.chunk import chunk_count, chunk_extent, exponents_of
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.model_file import ModelWriter, open_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import (
    Tensor,
    encrypted_manifest,
    encrypted_values,
    manifest_of,
    serialise_manifest,
)

RING = ckks.RING_DIMENSION
BLOCK_VALUES = 11 * RING  # with the 44 bits of the example key
TENSORS = (
    Tensor("w", np.zeros(BLOCK_VALUES + 2 * RING, np.float32), True),
    Tensor("steps", np.zeros(3, np.int64), False),
    Tensor("b", np.zeros(5, np.float32), True),
)
"""Two blocks."""
EXPONENTS = (0, 3)


def key_of(profile: str) -> PublicPart:
    bits = ckks.PROFILES[profile]
    return public_part(profile=profile, limb_bits=bits, modulus=(1 << bits) - 4095)


def update_manifest(
    public: PublicPart = PUBLIC,
    tensors: Sequence[Tensor] = TENSORS,
    exponents: Sequence[int] = EXPONENTS,
) -> Manifest:
    return encrypted_manifest(manifest_of(tensors), public.update_form(exponents))


def write_update(
    path: Path, seed: int, manifest: Manifest | None = None, public: PublicPart = PUBLIC
) -> bytes:
    """An update file at `path`, another one for each seed. Returns its digest."""
    manifest = manifest or update_manifest()
    random = np.random.default_rng(seed)
    with ModelWriter(path, serialise_manifest(manifest)) as writer:
        for index, rows in enumerate(block_rows(manifest)):
            limbs = random.integers(0, public.modulus, (rows, RING), np.uint64)
            writer.append(block_of(manifest, index, limbs, random.bytes(16), public))
        return writer.commit(sync=False)


def block_of(
    manifest: Manifest,
    index: int,
    limbs: NDArray[np.uint64],
    seed: bytes,
    public: PublicPart = PUBLIC,
    count: int = 0,
) -> bytearray:
    """One block in the seeded form, of (ciphertexts, N) limbs; `count`: of another number."""
    context = context_of(public)
    block = bytearray(block_bytes(context, len(limbs), 1, 1))
    seal_block(
        context,
        index=index,
        count=count or chunk_count(manifest),
        exponents_digest=exponents_of(manifest),
        c0=limbs,
        seed=seed,
        out=block,
    )
    return block


def block_rows(manifest: Manifest) -> list[int]:
    """The ciphertexts of each block."""
    full = ckks.block_ciphertexts(manifest.encryption.limb_bits, RING)
    whole = ckks.ciphertexts(encrypted_values(manifest), RING)
    return [min(full, whole - first) for first in range(0, whole, full)]


def limbs_of(path: Path, public: PublicPart = PUBLIC) -> Iterator[NDArray[np.uint64]]:
    """Block by block what a model file holds: (2, ciphertexts, N), c0 and c1."""
    with open_model(path) as model:
        for index, rows in enumerate(block_rows(model.manifest)):
            start, stop = chunk_extent(index, model.manifest)
            found = np.empty((2, rows, RING), np.uint64)
            open_block(
                context_of(public),
                model.pread(start, stop - start),
                index=index,
                count=chunk_count(model.manifest),
                exponents_digest=exponents_of(model.manifest),
                c0=found[0],
                c1=found[1],
            )
            yield found


def write_community(store: ModelStore, folder: Path) -> bytes:
    """Put a community model of two such updates into `store`; return its digest."""
    updates = []
    for number, learner in enumerate(("ada", "bob")):
        path = folder / f"{learner}.update"
        updates.append(EncryptedUpdate(path, learner, 1.0, write_update(path, 1000 + number)))
    draft = store.draft(0)
    return store.put(draft, fold_encrypted(updates, context_of(PUBLIC), draft))
