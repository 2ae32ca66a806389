"""What a manifest says, and that nothing else passes for one."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.model_pb2 import Manifest, TensorSpec
from metisfl.proto.tensors import (
    ITEM_BYTES,
    MANIFEST_BYTES_MAX,
    Segment,
    Tensor,
    compare_manifests,
    manifest_of,
    parse_manifest,
    segments,
    serialise_manifest,
    spec_bytes,
)

NATIVE = sorted(set(ITEM_BYTES) - {"bfloat16"})

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=12)


@st.composite
def models(draw: st.DrawFn) -> list[Tensor]:
    """A few tensors of any dtype and shape, with any bytes for values."""
    tensors = []
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(NATIVE))
        array = draw(hnp.arrays(dtype, draw(shapes)))
        tensors.append(Tensor(name, array, draw(st.booleans())))
    return tensors


def manifest(*specs: tuple[str, str, tuple[int, ...]]) -> Manifest:
    return manifest_of([Tensor(n, np.zeros(shape, dtype), True) for n, dtype, shape in specs])


@given(models())
def test_a_manifest_survives_the_wire(tensors: list[Tensor]) -> None:
    ours = manifest_of(tensors)
    theirs = parse_manifest(serialise_manifest(ours))
    assert theirs == ours
    assert compare_manifests(ours, theirs) is None
    for spec, tensor in zip(theirs.tensors, tensors, strict=True):
        assert (spec.name, spec.trainable) == (tensor.name, tensor.trainable)
        assert (spec.dtype, tuple(spec.shape)) == (tensor.array.dtype.name, tensor.array.shape)
        assert spec.offset % 64 == 0
        assert spec_bytes(spec) == tensor.array.nbytes


@given(models(), st.data())
def test_changed_bytes_give_a_valid_manifest_or_a_peer_error(
    tensors: list[Tensor], data: st.DataObject
) -> None:
    changed = bytearray(serialise_manifest(manifest_of(tensors)))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 4)))
        changed[start:stop] = data.draw(st.binary(max_size=6))
    try:
        parsed = parse_manifest(bytes(changed))
    except PeerError:
        return
    assert serialise_manifest(parsed) == bytes(changed)
    end = 0
    for spec in parsed.tensors:
        assert end <= spec.offset <= parsed.payload_bytes
        end = spec.offset + spec_bytes(spec)
    assert end == parsed.payload_bytes
    assert len({spec.name for spec in parsed.tensors}) == len(parsed.tensors)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_manifest_or_a_peer_error(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        parse_manifest(data)


def spec(**fields: object) -> TensorSpec:
    return TensorSpec(**{"name": "w", "dtype": "float32", "shape": [4], **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "payload_bytes", "words"),
    [
        ([spec(dtype="float128")], 16, "dtype 'float128'; allowed are bool, int8"),
        ([spec(dtype="complex64")], 16, "'complex64'"),
        ([spec(name="")], 16, "tensor name '' of 0 characters"),
        ([spec(name="x" * 257)], 16, "of 257 characters; allowed are 1 to 256"),
        ([spec(name="a\nb")], 16, "printable"),
        ([spec(shape=[1] * 33)], 4, "33 dimensions; at most 32"),
        ([spec(shape=[2**63, 2**63])], 0, "at most 1125899906842624"),
        ([spec(shape=[2**32, 2**32])], 0, "at most 1125899906842624"),
        ([spec(shape=[2**63, 0])], 0, "at most 1125899906842624"),
        ([spec(), spec()], 80, "two tensors are called 'w'"),
        ([spec(offset=64)], 80, "offset 64; it must be 0"),
        ([spec(), spec(name="v", offset=16)], 32, "offset 16; it must be 64"),
        ([spec(), spec(name="v", offset=0)], 16, "offset 0; it must be 64"),
        ([spec()], 17, "payload of 17 bytes for tensors that end at 16"),
        ([spec()], 2**50 + 1, "payload of 1125899906842625 bytes; at most"),
        ([spec(name=f"{i}") for i in range(4097)], 16, "4097 tensors; at most 4096"),
    ],
)
def test_the_reason_for_a_refusal_has_the_value_and_its_bound(
    specs: list[TensorSpec], payload_bytes: int, words: str
) -> None:
    data = serialise_manifest(Manifest(tensors=specs, payload_bytes=payload_bytes))
    with pytest.raises(PeerError) as caught:
        parse_manifest(data)
    assert words in str(caught.value)


def test_a_manifest_over_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(PeerError, match=f"at most {MANIFEST_BYTES_MAX}"):
        parse_manifest(b"\xff" * (MANIFEST_BYTES_MAX + 1))


def test_a_second_encoding_of_the_same_manifest_is_refused() -> None:
    """Else one content would have two digests."""
    data = serialise_manifest(manifest(("w", "float32", (4,))))
    unknown_field = b"\x78\x01"
    with pytest.raises(PeerError, match="canonical"):
        parse_manifest(data + unknown_field)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([Tensor("w", np.zeros(2, "complex64"), True)], "dtype 'complex64'"),
        ([Tensor("w", np.zeros(2), True), Tensor("w", np.zeros(2), True)], "must be unique"),
        ([Tensor("\ud800", np.zeros(2), True)], "cannot be described"),
        ([Tensor("w", np.zeros(2, "float32"), True, "bfloat16")], "only uint16"),
        ([Tensor("w", np.zeros(2, "uint16"), True, "float16")], "only uint16"),
        ([Tensor("n" * 200 + str(i), np.zeros(1), True) for i in range(2000)], "shorter"),
    ],
)
def test_a_model_that_cannot_travel_is_the_users_error(tensors: list[Tensor], words: str) -> None:
    with pytest.raises(UserError) as caught:
        manifest_of(tensors)
    assert words in str(caught.value)


KERNEL, BIAS = ("dense/kernel", "float32", (13, 64)), ("dense/bias", "float32", (64,))


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (
            [("dense/kernel", "float32", (14, 64)), BIAS],
            "tensor 'dense/kernel' is (13, 64) here and (14, 64) in the federation",
        ),
        (
            [("dense/kernel", "float64", (13, 64)), BIAS],
            "tensor 'dense/kernel' is float32 here and float64 in the federation",
        ),
        ([KERNEL], "tensor 'dense/bias' exists here and not in the federation"),
        (
            [KERNEL, BIAS, ("more", "bool", ())],
            "tensor 'more' exists in the federation and not here",
        ),
        (
            [BIAS, KERNEL],
            "tensor 0 is 'dense/kernel' here and 'dense/bias' in the federation: "
            "the same tensors in another order",
        ),
    ],
)
def test_the_first_difference_is_said_in_words(
    theirs: list[tuple[str, str, tuple[int, ...]]], text: str
) -> None:
    assert compare_manifests(manifest(KERNEL, BIAS), manifest(*theirs)) == text


def test_a_difference_in_trainability_is_said_in_words() -> None:
    array = np.zeros(3)
    here, there = (manifest_of([Tensor("w", array, flag)]) for flag in (True, False))
    assert compare_manifests(here, there) == (
        "tensor 'w' is trainable here and not trainable in the federation"
    )


def test_segments_of_a_chunk() -> None:
    whole = manifest(("a", "float64", (10,)), ("b", "bool", ()), ("c", "int8", (0,)), KERNEL)
    assert [spec.offset for spec in whole.tensors] == [0, 128, 192, 192]
    assert segments(whole, 0, whole.payload_bytes) == [
        Segment("float64", 0, 80, "a"),
        Segment("bool", 128, 129, "b"),
        Segment("float32", 192, 192 + 13 * 64 * 4, "dense/kernel"),
    ]
    assert segments(whole, 64, 128) == [Segment("float64", 64, 80, "a")]
    assert segments(whole, 80, 128) == []
    assert segments(whole, 192, 256) == [Segment("float32", 192, 256, "dense/kernel")]


@given(models(), st.integers(1, 6).map(lambda count: 64 * count))
@settings(max_examples=50)
def test_the_segments_of_all_chunks_cover_every_value_once(
    tensors: list[Tensor], chunk_bytes: int
) -> None:
    whole = manifest_of(tensors)
    covered: dict[str, int] = {}
    for start in range(0, whole.payload_bytes, chunk_bytes):
        for segment in segments(whole, start, start + chunk_bytes):
            assert start <= segment.start < segment.stop <= start + chunk_bytes
            assert (segment.stop - segment.start) % ITEM_BYTES[segment.dtype] == 0
            covered[segment.name] = covered.get(segment.name, 0) + segment.stop - segment.start
    assert covered == {t.name: t.array.nbytes for t in tensors if t.array.nbytes}
