"""Encrypted model files: an update is sealed into one, a community model is opened from one.

Rule 1: block by block: memory is a few blocks, whatever the size of the model.
Rule 2: nothing wraps. What does not fit its tensor's scale is reported with the scale that it
needs, before anything is encrypted; what comes back outside its range is refused.
Rule 3: whoever opens the same file gets the same bits: the sum is on the grid, it is divided by the
sum of weights, and each step rounds as IEEE 754 says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from metisfl.learner.crypto import Crypto
from metisfl.learner.model_blocks import block_ranges, read_block, unreadable
from metisfl.learner.opening_policy import check_partials, check_policy
from metisfl.learner.packing import as_float64, pieces, scale_down, scale_up
from metisfl.native_c import Accumulator
from metisfl.native_c.ckks import BlockError
from metisfl.proto import ckks
from metisfl.proto.chunk import chunk_count, exponents_of
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.model_file import ModelFile, ModelWriter
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import (
    FLOATS,
    ITEM_BYTES,
    Tensor,
    compare_manifests,
    encrypted_manifest,
    encrypted_values,
    manifest_of,
    normalised,
    plain_payload_bytes,
    serialise_manifest,
)

__all__ = ["Exceeded", "Progress", "Sealed", "open_sealed", "seal"]

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Progress = Callable[[float], None]
"""Takes the fraction done, after each block; what it raises ends the work."""

SLICE_VALUES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Sealed:
    digest: bytes
    """Of the file's content."""
    exponents: tuple[int, ...]
    """That the float tensors need, with headroom."""


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Nothing was written: the first tensor that does not fit, and the exponents needed."""

    tensor: str
    exponents: tuple[int, ...]


def seal(
    crypto: Crypto,
    tensors: Sequence[Tensor],
    path: Path,
    *,
    exponents: Sequence[int],
    weight: float,
    sync: bool,
    progress: Progress,
) -> Sealed | Exceeded:
    """Encrypt the float tensors, times `weight`, into an update file at `path`.

    Tensor i is divided by 2^exponents[i] (none given: all are 0). `weight` is above 0 and at most
    the key's largest sum of weights. Raises UserError for NaN or infinity, OSError.
    """
    assert weight > 0, f"a weight of {weight}"
    assert ckks.weights_fit(weight, crypto.public.max_learners), f"a weight of {weight}"
    source = _Source(tensors)
    exponents = tuple(exponents) or (0,) * len(source.tensors)
    assert len(exponents) == len(source.tensors), "one exponent for each float tensor"
    largest = [source.largest(index) for index in range(len(source.tensors))]
    needed = tuple(ckks.exponent_for(value) for value in largest)
    for tensor, value, exponent in zip(source.tensors, largest, exponents, strict=True):
        if not ckks.fits(value, exponent):
            return Exceeded(tensor.name, needed)
    manifest = encrypted_manifest(
        manifest_of(tensors),
        crypto.public.update_form(exponents),
    )
    values = encrypted_values(manifest)
    count, digest = chunk_count(manifest), exponents_of(manifest)
    with ModelWriter(path, serialise_manifest(manifest)) as writer:
        for index, (start, rows) in enumerate(block_ranges(crypto, values)):
            block = np.zeros((rows, crypto.public.ring_dimension))
            flat = block.reshape(-1)
            source.fill(flat[: min(flat.size, values - start)], start, weight, exponents)
            crypto.to_grid(block)
            writer.append(
                crypto.encrypt_block(block, index=index, count=count, exponents_digest=digest)
            )
            progress((index + 1) / count)
        return Sealed(writer.commit(sync=sync), needed)


def open_sealed(
    crypto: Crypto,
    model: ModelFile,
    path: Path,
    *,
    others: Callable[[], Sequence[Tensor]],
    progress: Progress,
    initial: bool = False,
    partials: ModelFile | None = None,
    model_digest: bytes = b"",
) -> None:
    """Decrypt the community model in `model` into a plain model file at `path`.

    Under a joint key `partials` is the fold of all sites' partials of it, and `model_digest` the
    digest that they name.

    Integer and bool tensors come from `others()`, this site's own initial model, if there are any.
    The initial model may be a single site's; any other must keep to the key's policy. Raises
    PeerError for a model that this key's sites do not open, UserError if `others()` are of another
    model, MachineError for a damaged file, OSError.
    """
    manifest = model.manifest
    check_policy(crypto.public, manifest, initial=initial)
    if crypto.public.is_joint:
        check_partials(crypto.public, partials, manifest, model_digest)
    plain = Manifest(tensors=manifest.tensors, payload_bytes=plain_payload_bytes(manifest))
    local = [spec for spec in plain.tensors if spec.dtype not in FLOATS]
    kept = others() if local else []
    if local and (difference := compare_manifests(manifest_of(kept), plain)):
        raise UserError(f"this site's app builds another model: {difference}")
    weight_sum = math.fsum(share.weight for share in manifest.encryption.shares) or 1.0
    sums = _Sums(crypto, model, partials, weight_sum, progress)
    exponents = iter(manifest.encryption.exponents)
    with ExitStack() as stack:
        writer = stack.enter_context(ModelWriter(path, serialise_manifest(plain)))
        caster = stack.enter_context(Accumulator(capacity=sums.values_of_block))
        end = 0
        for index, spec in enumerate(plain.tensors):
            writer.append(bytes(spec.offset - end))
            if spec.dtype in FLOATS:
                exponent, left = next(exponents), math.prod(spec.shape)
                end = spec.offset
                while left:
                    some = sums.take(left)
                    left -= some.size
                    data = _cast(
                        caster, scale_up(some, exponent, weight_sum, spec.dtype), spec.dtype
                    )
                    writer.append(data.data)
                    end += data.nbytes
            else:
                values = normalised(kept[index])
                writer.append(values.reshape(-1).view("u1").data if values.size else b"")
                end = spec.offset + values.nbytes
        writer.commit(sync=False)


class _Source:
    """The float tensors of an update as one vector of float64, read piece by piece."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor for tensor in tensors if tensor.dtype_name in FLOATS]
        self._values = [normalised(tensor).reshape(-1) for tensor in self.tensors]
        self._ends = [*accumulate(values.size for values in self._values)]

    def largest(self, index: int) -> float:
        """The largest absolute value of a tensor. Raises UserError if one is not finite."""
        largest = 0.0
        for start in range(0, self._values[index].size, SLICE_VALUES):
            values = self._floats(index, start, start + SLICE_VALUES)
            here = max(float(values.max()), -float(values.min()))  # NaN if there is one
            if not math.isfinite(here):
                raise UserError(
                    f"tensor {self.tensors[index].name!r} has NaN or infinity after training; "
                    "lower the learning rate or clip gradients"
                )
            largest = max(largest, here)
        return largest

    def fill(self, out: Floats, start: int, weight: float, exponents: Sequence[int]) -> None:
        """Values from `start` of the vector on: divided by their scales, times the weight."""
        for piece in pieces(self._ends, start, start + out.size):
            values = self._floats(piece.tensor, piece.start, piece.stop)
            scale_down(values, exponents[piece.tensor], weight)
            out[piece.offset : piece.offset + values.size] = values

    def _floats(self, index: int, start: int, stop: int) -> Floats:
        return as_float64(self._values[index][start:stop], self.tensors[index].dtype_name)


class _Sums:
    """The decrypted sums of a model as one vector of float64, read front to back."""

    def __init__(
        self,
        crypto: Crypto,
        model: ModelFile,
        partials: ModelFile | None,
        weight_sum: float,
        progress: Progress,
    ) -> None:
        self._crypto = crypto
        self._model = model
        self._partials = partials
        self._progress = progress
        self._count = chunk_count(model.manifest)
        self._digest = exponents_of(model.manifest)
        # What each learner rounds is at most half a grid step beyond its weight.
        half_steps = max(1, len(model.manifest.encryption.shares)) / 2
        self._most = weight_sum + math.ldexp(half_steps, -crypto.public.grid_bits)
        self.values_of_block = crypto.context.block_ciphertexts * crypto.public.ring_dimension
        self._blocks = enumerate(block_ranges(crypto, encrypted_values(model.manifest)))
        self._here: Floats = np.empty(0)

    def take(self, most: int) -> Floats:
        """The next values: at least one, at most so many."""
        if not self._here.size:
            self._here = self._next_block()
        some, self._here = self._here[:most], self._here[most:]
        return some

    def _next_block(self) -> Floats:
        index, (_, rows) = next(self._blocks)
        block = read_block(self._model, index)
        place = {"index": index, "count": self._count}
        try:
            if self._partials is None:
                values = self._crypto.decrypt_block(
                    block, ciphertexts=rows, exponents_digest=self._digest, **place
                )
            else:
                values = self._crypto.decrypt_jointly(
                    block,
                    read_block(self._partials, index),
                    ciphertexts=rows,
                    exponents_digest=self._digest,
                    partials_digest=exponents_of(self._partials.manifest),
                    **place,
                )
        except BlockError as error:
            raise unreadable(self._model, index, error) from None
        if not float(np.abs(values).max()) <= self._most:
            # Not by how much: the controller reads this, and must not learn what was decrypted.
            raise PeerError(
                f"block {index} of the model holds a sum beyond {self._most:.6g}, the most that "
                "its weights allow: it was not folded from what the sites encrypted"
            )
        self._progress((index + 1) / self._count)
        return values.reshape(-1)


def _cast(caster: Accumulator, values: Floats, dtype: str) -> Bytes:
    """The bytes of `values` rounded to the tensor's dtype."""
    out = np.empty(values.size * ITEM_BYTES[dtype], np.uint8)
    caster.begin(values.size)
    caster.absorb(values, "float64", 1.0)
    caster.finalise(dtype, out, 1.0)
    return out
