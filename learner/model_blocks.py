"""The blocks of an encrypted model file, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from metisfl.learner.crypto import Crypto
from metisfl.native_c.ckks import BlockError
from metisfl.proto import ckks
from metisfl.proto.chunk import chunk_extent
from metisfl.proto.errors import MachineError, MetisError, PeerError
from metisfl.proto.model_file import ModelFile

__all__ = ["block_ranges", "read_block", "unreadable"]

DAMAGED: Final = frozenset({"magic", "version", "checksum", "length"})
"""What a block is refused for when its bytes have changed; else it was made wrong."""


def block_ranges(crypto: Crypto, values: int) -> Iterator[tuple[int, int]]:
    """The first value and the number of ciphertexts of each block."""
    ring, step = crypto.public.ring_dimension, crypto.context.block_ciphertexts
    whole = ckks.ciphertexts(values, ring)
    for first in range(0, whole, step):
        yield first * ring, min(step, whole - first)


def read_block(model: ModelFile, index: int) -> bytes:
    """The bytes of a block. Raises MachineError."""
    start, stop = chunk_extent(index, model.manifest)
    return model.pread(start, stop - start)


def unreadable(model: ModelFile, index: int, error: BlockError) -> MetisError:
    """Whose fault it is that a block of `model` was refused."""
    if error.code in DAMAGED:
        return MachineError(
            f"{model.path} is damaged in block {index}: {error}; delete it and fetch it again"
        )
    return PeerError(f"block {index} of the model is not as its manifest says: {error}")
