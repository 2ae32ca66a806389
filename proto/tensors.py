"""Tensors and the manifest that describes them: what a model consists of.

Rule 1: one model has one manifest. Offsets follow from names, dtypes and shapes, the encoding is
canonical, so equal content gives equal bytes and equal digests everywhere.
Rule 2: `parse_manifest` takes foreign bytes and yields a manifest whose every number has been
checked, or PeerError. Sizes are Python integers: nothing overflows.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from metisfl.proto import ckks
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.limits import NAME_CHARACTERS_MAX, TENSORS_MAX
from metisfl.proto.model_pb2 import Encryption, Manifest, TensorSpec
from metisfl.proto.topics import NAME

try:
    from ml_dtypes import bfloat16 as _bfloat16  # comes with tensorflow
except ImportError:
    _bfloat16 = None

__all__ = [
    "ALIGNMENT",
    "FLOATS",
    "ITEM_BYTES",
    "MANIFEST_BYTES_MAX",
    "PAYLOAD_BYTES_MAX",
    "Array",
    "Segment",
    "Tensor",
    "array_of",
    "compare_manifests",
    "encrypted_manifest",
    "encrypted_values",
    "float_specs",
    "is_encrypted",
    "manifest_of",
    "normalised",
    "parse_manifest",
    "plain_payload_bytes",
    "segments",
    "serialise_manifest",
    "spec_bytes",
]

Array = npt.NDArray[Any]

ALIGNMENT: Final = 64
RANK_MAX: Final = 32
MANIFEST_BYTES_MAX: Final = 252 * 1024  # with its frame it fits one bulk message of 256 KiB
PAYLOAD_BYTES_MAX: Final = 1 << 50
SHARE_MAX: Final = 1e6
ITEM_BYTES: Final = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "bfloat16": 2,
    "float16": 2,
    "int16": 2,
    "uint16": 2,
    "float32": 4,
    "int32": 4,
    "uint32": 4,
    "float64": 8,
    "int64": 8,
    "uint64": 8,
}
FLOATS: Final = frozenset({"bfloat16", "float16", "float32", "float64"})
"""What is averaged, and encrypted; other tensors stay as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A named array. `dtype` is only given for bfloat16 values that are held as uint16."""

    name: str
    array: Array
    trainable: bool
    dtype: str = ""

    @property
    def dtype_name(self) -> str:
        """The name that a manifest gives this tensor's dtype."""
        return self.dtype or self.array.dtype.name


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of one tensor's values that lies in `[start, stop)` of the payload, in bytes."""

    dtype: str
    start: int
    stop: int
    name: str


def manifest_of(tensors: Sequence[Tensor]) -> Manifest:
    """Describe `tensors` in their order. Raises UserError if they are no model that can travel."""
    manifest = Manifest()
    end = 0
    for tensor in tensors:
        try:
            spec = TensorSpec(
                name=tensor.name,
                dtype=tensor.dtype_name,
                shape=tensor.array.shape,
                trainable=tensor.trainable,
                offset=_aligned(end),
            )
        except (UnicodeEncodeError, ValueError) as error:
            raise UserError(f"tensor {tensor.name!r} cannot be described: {error}") from None
        if tensor.dtype and (tensor.dtype != "bfloat16" or tensor.array.dtype != np.uint16):
            raise UserError(
                f"tensor {tensor.name!r} holds {tensor.array.dtype} and calls it {tensor.dtype!r}; "
                "only uint16 may be called something else, namely 'bfloat16'"
            )
        manifest.tensors.append(spec)
        problem = _spec_problem(spec)
        if problem:
            raise UserError(problem)
        end = spec.offset + spec_bytes(spec)
    manifest.payload_bytes = end
    problem = _whole_problem(manifest, manifest.ByteSize())
    if problem:
        raise UserError(problem)
    return manifest


def serialise_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes, which are part of a model's digest."""
    return manifest.SerializeToString(deterministic=True)


def parse_manifest(data: bytes) -> Manifest:
    """Parse and check a manifest from elsewhere. Raises PeerError with the value and its bound."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise PeerError(f"manifest of {len(data)} bytes; at most {MANIFEST_BYTES_MAX}")
    manifest = Manifest()
    try:
        manifest.ParseFromString(data)
    except DecodeError:
        raise PeerError(f"the {len(data)} bytes of a manifest are not a manifest") from None
    problem = _whole_problem(manifest, len(data)) or _layout_problem(manifest)
    if problem:
        raise PeerError(problem)
    manifest.DiscardUnknownFields()
    if serialise_manifest(manifest) != data:
        raise PeerError("the manifest is not in its canonical encoding; send what its writer wrote")
    return manifest


def is_encrypted(manifest: Manifest) -> bool:
    """Whether the payload is blocks of ciphertexts."""
    return manifest.HasField("encryption")


def float_specs(manifest: Manifest) -> list[TensorSpec]:
    """The tensors whose values an encrypted payload holds, in order."""
    return [spec for spec in manifest.tensors if spec.dtype in FLOATS]


def encrypted_values(manifest: Manifest) -> int:
    """Values of all float tensors together."""
    return sum(math.prod(spec.shape) for spec in float_specs(manifest))


def plain_payload_bytes(manifest: Manifest) -> int:
    """Payload of the plain model that the manifest describes."""
    if not manifest.tensors:
        return 0
    last = manifest.tensors[-1]
    return last.offset + spec_bytes(last)


def encrypted_manifest(model: Manifest, encryption: Encryption) -> Manifest:
    """The manifest of the model with these tensors in this encrypted form."""
    manifest = Manifest(tensors=model.tensors, encryption=encryption)
    manifest.payload_bytes = _encrypted_payload_bytes(manifest)
    return manifest


def _encrypted_payload_bytes(manifest: Manifest) -> int:
    form = manifest.encryption
    return ckks.payload_bytes(
        encrypted_values(manifest),
        form.limb_bits,
        form.ring_dimension,
        form.polynomials,
        form.seeds,
    )


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes that the values of one tensor take in the payload."""
    return math.prod(spec.shape) * ITEM_BYTES[spec.dtype]


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _spec_problem(spec: TensorSpec) -> str | None:
    """What is wrong with one tensor's description, apart from its place."""
    if not 1 <= len(spec.name) <= NAME_CHARACTERS_MAX or not spec.name.isprintable():
        return (
            f"tensor name {spec.name[:NAME_CHARACTERS_MAX]!r} of {len(spec.name)} characters; "
            f"allowed are 1 to {NAME_CHARACTERS_MAX} printable ones"
        )
    if spec.dtype not in ITEM_BYTES:
        return (
            f"tensor {spec.name!r} has the dtype {spec.dtype[:64]!r}; allowed are "
            f"{', '.join(ITEM_BYTES)}"
        )
    if len(spec.shape) > RANK_MAX:
        return f"tensor {spec.name!r} has {len(spec.shape)} dimensions; at most {RANK_MAX}"
    # A zero must not hide a dimension that no array can have.
    extent = math.prod(max(1, dimension) for dimension in spec.shape) * ITEM_BYTES[spec.dtype]
    if extent > PAYLOAD_BYTES_MAX:
        return (
            f"tensor {spec.name!r} has the shape {tuple(spec.shape)}, {extent} bytes; "
            f"at most {PAYLOAD_BYTES_MAX}"
        )
    return None


def _whole_problem(manifest: Manifest, manifest_bytes: int) -> str | None:
    """What is wrong with the manifest as a whole."""
    if manifest_bytes > MANIFEST_BYTES_MAX:
        return (
            f"manifest of {manifest_bytes} bytes for {len(manifest.tensors)} tensors; at most "
            f"{MANIFEST_BYTES_MAX}: use shorter tensor names or fewer tensors"
        )
    if len(manifest.tensors) > TENSORS_MAX:
        return f"model of {len(manifest.tensors)} tensors; at most {TENSORS_MAX}"
    if manifest.payload_bytes > PAYLOAD_BYTES_MAX:
        return f"payload of {manifest.payload_bytes} bytes; at most {PAYLOAD_BYTES_MAX}"
    seen: set[str] = set()
    for spec in manifest.tensors:
        if spec.name in seen:
            return f"two tensors are called {spec.name[:80]!r}; names must be unique"
        seen.add(spec.name)
    return None


def _layout_problem(manifest: Manifest) -> str | None:
    """What is wrong with a foreign manifest's tensors or with their places in the payload."""
    end = 0
    for spec in manifest.tensors:
        problem = _spec_problem(spec)
        if problem:
            return problem
        if spec.offset != _aligned(end):
            return f"tensor {spec.name!r} has the offset {spec.offset}; it must be {_aligned(end)}"
        end = spec.offset + spec_bytes(spec)
    if is_encrypted(manifest):
        return _encryption_problem(manifest)
    if manifest.payload_bytes != end:
        return f"payload of {manifest.payload_bytes} bytes for tensors that end at {end}"
    return None


def _encryption_problem(manifest: Manifest) -> str | None:
    """What is wrong with a foreign manifest's encrypted form."""
    form = manifest.encryption
    if problem := ckks.form_problem(
        form.fingerprint, form.limb_bits, form.ring_dimension, form.polynomials, form.seeds
    ):
        return problem
    if form.opens and (len(form.opens) != 32 or form.polynomials != 1):
        return (
            f"partials of a model with a digest of {len(form.opens)} bytes, in {form.polynomials} "
            "polynomials; it has 32, and they have 1"
        )
    floats = len(float_specs(manifest))
    if len(form.exponents) != floats:
        return f"{len(form.exponents)} exponents for {floats} float tensors; one for each"
    if any(not 0 <= exponent <= ckks.EXPONENT_MAX for exponent in form.exponents):
        return (
            f"exponents from {min(form.exponents)} to {max(form.exponents)}; allowed are 0 to "
            f"{ckks.EXPONENT_MAX}"
        )
    if len(form.shares) > ckks.LEARNERS_MAX:
        return f"{len(form.shares)} shares; at most {ckks.LEARNERS_MAX}"
    names = [share.learner for share in form.shares]
    if sorted(set(names)) != names or any(not NAME.fullmatch(name) for name in names):
        return "shares must name each learner once, in the order of names"
    for share in form.shares:
        if not 0 < share.weight <= SHARE_MAX or len(share.update_digest) != 32:
            return (
                f"the share of {share.learner} has the weight {share.weight} and an update digest "
                f"of {len(share.update_digest)} bytes; above 0 up to {SHARE_MAX:g}, and 32 bytes"
            )
    wanted = _encrypted_payload_bytes(manifest)
    if manifest.payload_bytes != wanted:
        return f"payload of {manifest.payload_bytes} bytes; its encrypted form asks for {wanted}"
    return None


def compare_manifests(ours: Manifest, theirs: Manifest) -> str | None:
    """The first difference, in words for the person at this site; None when there is none."""
    for name, here, there in _pairs(ours.tensors, theirs.tensors):
        if there is None:
            return f"tensor {name!r} exists here and not in the federation"
        if here is None:
            return f"tensor {name!r} exists in the federation and not here"
        if here.shape != there.shape:
            return (
                f"tensor {name!r} is {tuple(here.shape)} here and "
                f"{tuple(there.shape)} in the federation"
            )
        if here.dtype != there.dtype:
            return f"tensor {name!r} is {here.dtype} here and {there.dtype} in the federation"
        if here.trainable != there.trainable:
            words = {True: "trainable", False: "not trainable"}
            return (
                f"tensor {name!r} is {words[here.trainable]} here and "
                f"{words[there.trainable]} in the federation"
            )
    for index, (here, there) in enumerate(zip(ours.tensors, theirs.tensors, strict=True)):
        if here.name != there.name:
            return (
                f"tensor {index} is {here.name!r} here and {there.name!r} in the federation: "
                "the same tensors in another order"
            )
    return None


def _pairs(
    ours: Iterable[TensorSpec], theirs: Iterable[TensorSpec]
) -> Iterable[tuple[str, TensorSpec | None, TensorSpec | None]]:
    """Every name with its description here and in the federation, ours first."""
    there = {spec.name: spec for spec in theirs}
    for spec in ours:
        yield spec.name, spec, there.pop(spec.name, None)
    for name, spec in there.items():
        yield name, None, spec


def segments(manifest: Manifest, start: int, stop: int) -> list[Segment]:
    """Which tensors' values lie in the payload bytes `[start, stop)`, in order.

    The padding between tensors belongs to none. With `start` and `stop` on multiples of 8 no value
    is ever split.
    """
    found = []
    first = max(0, bisect_right(manifest.tensors, start, key=lambda spec: spec.offset) - 1)
    for index in range(first, len(manifest.tensors)):
        spec = manifest.tensors[index]
        if spec.offset >= stop:
            break
        inside = max(start, spec.offset), min(stop, spec.offset + spec_bytes(spec))
        if inside[0] < inside[1]:
            found.append(Segment(spec.dtype, *inside, spec.name))
    return found


def normalised(tensor: Tensor) -> Array:
    """The tensor's values as the payload holds them: C order, little-endian, one byte per bool."""
    array = tensor.array
    if tensor.dtype_name != "bfloat16":
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.asarray(array, order="C")


def array_of(spec: TensorSpec, payload: memoryview) -> Array:
    """View the tensor's values in `payload` (the whole one) without a copy.

    bfloat16 comes as `ml_dtypes.bfloat16` where that is installed, else as uint16.
    """
    if spec.dtype == "bfloat16":
        dtype = np.dtype("<u2" if _bfloat16 is None else _bfloat16)
    else:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
    values = payload[spec.offset : spec.offset + spec_bytes(spec)]
    return np.frombuffer(values, dtype=dtype).reshape(tuple(spec.shape))
