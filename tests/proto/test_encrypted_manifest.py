"""The manifest of an encrypted model, and the chunks of its payload, which are its blocks."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.native_c import ckks as native
from metisfl.proto import chunk as c
from metisfl.proto import ckks
from metisfl.proto.errors import PeerError
from metisfl.proto.model_pb2 import Encryption, Manifest, Share
from metisfl.proto.tensors import (
    FLOATS,
    ITEM_BYTES,
    Tensor,
    encrypted_manifest,
    encrypted_values,
    float_specs,
    is_encrypted,
    manifest_of,
    parse_manifest,
    plain_payload_bytes,
    serialise_manifest,
    spec_bytes,
)

RING = ckks.RING_DIMENSION
MODEL = manifest_of(
    [
        Tensor("dense/kernel", np.zeros((30, 50), np.float32), True),
        Tensor("seed", np.zeros(2, np.uint32), False),
        Tensor("dense/bias", np.zeros(50, np.float64), True),
    ]
)

forms = st.sampled_from([(1, 1), (1, 2), (1, 16), (2, 0)])
limb_bits = st.sampled_from(sorted(ckks.PROFILES.values()))
shapes = st.lists(st.integers(0, 300), max_size=3)


def encryption(bits: int = 44, polynomials: int = 1, seeds: int = 1, floats: int = 2) -> Encryption:
    return Encryption(
        fingerprint=b"f" * 16,
        limb_bits=bits,
        ring_dimension=RING,
        polynomials=polynomials,
        seeds=seeds,
        exponents=[0, 3, 1100][:floats],
    )


def encrypted() -> Manifest:
    form = encryption(seeds=2)
    for name, weight in (("ada", 0.5), ("bob", 1.5)):
        form.shares.append(Share(learner=name, weight=weight, update_digest=b"d" * 32))
    return encrypted_manifest(MODEL, form)


def large(values: int, bits: int, polynomials: int, seeds: int) -> Manifest:
    """The manifest of a model of one float tensor."""
    model = Manifest()
    model.tensors.add(name="w", dtype="float32", shape=[values])
    return encrypted_manifest(model, encryption(bits, polynomials, seeds, floats=1))


def test_an_encrypted_manifest_survives_the_wire() -> None:
    ours = encrypted()
    assert parse_manifest(serialise_manifest(ours)) == ours
    assert is_encrypted(ours)
    assert not is_encrypted(MODEL)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), shapes), max_size=6),
    limb_bits,
    forms,
    st.data(),
)
def test_the_encrypted_manifest_of_any_model_survives_the_wire(
    tensors: list[tuple[str, list[int]]], bits: int, form: tuple[int, int], data: st.DataObject
) -> None:
    model = Manifest()
    end = 0
    for number, (dtype, shape) in enumerate(tensors):
        spec = model.tensors.add(
            name=str(number), dtype=dtype, shape=shape, offset=-(-end // 64) * 64
        )
        end = spec.offset + spec_bytes(spec)
    floats = [math.prod(shape) for dtype, shape in tensors if dtype in FLOATS]
    exponents = st.lists(
        st.integers(0, ckks.EXPONENT_MAX), min_size=len(floats), max_size=len(floats)
    )
    encrypted_form = encryption(bits, *form, floats=0)
    encrypted_form.exponents.extend(data.draw(exponents))
    ours = encrypted_manifest(model, encrypted_form)
    assert parse_manifest(serialise_manifest(ours)) == ours
    assert encrypted_values(ours) == sum(floats)
    assert plain_payload_bytes(ours) == end
    assert (c.chunk_count(ours) == 0) == (sum(floats) == 0)


def test_it_describes_the_plain_model_that_it_opens_to() -> None:
    ours = encrypted()
    assert ours.tensors == MODEL.tensors
    assert plain_payload_bytes(ours) == MODEL.payload_bytes
    assert [spec.name for spec in float_specs(ours)] == ["dense/kernel", "dense/bias"]
    assert encrypted_values(ours) == 30 * 50 + 50
    assert not MODEL.HasField("encryption"), "the plain manifest is left as it was"


def test_a_model_without_float_tensors_has_an_empty_payload() -> None:
    model = manifest_of([Tensor("seed", np.zeros(2, np.uint32), False)])
    ours = encrypted_manifest(model, encryption(floats=0))
    assert parse_manifest(serialise_manifest(ours)).payload_bytes == 0
    assert c.chunk_count(ours) == 0


def partials(opens: bytes = b"m" * 32) -> Manifest:
    form = encryption(52, seeds=3)
    form.opens = opens
    return encrypted_manifest(MODEL, form)


def test_the_manifest_of_partials_survives_the_wire_and_its_chunks_name_the_model() -> None:
    ours, others = partials(), partials(b"n" * 32)
    assert parse_manifest(serialise_manifest(ours)) == ours
    plain = encrypted_manifest(MODEL, encryption(52, seeds=3))
    assert len({c.exponents_of(one) for one in (ours, others, plain)}) == 3
    assert c.exponents_of(ours) == ckks.exponents_digest([0, 3], b"m" * 32)


def change(**values: object) -> Callable[[Manifest], None]:
    def apply(manifest: Manifest) -> None:
        for name, value in values.items():
            setattr(manifest.encryption, name, value)

    return apply


def exponents(*numbers: int) -> Callable[[Manifest], None]:
    def apply(manifest: Manifest) -> None:
        manifest.encryption.exponents[:] = numbers

    return apply


def share(index: int, **values: object) -> Callable[[Manifest], None]:
    def apply(manifest: Manifest) -> None:
        for name, value in values.items():
            setattr(manifest.encryption.shares[index], name, value)

    return apply


def more_bytes(manifest: Manifest) -> None:
    manifest.payload_bytes += 1


@pytest.mark.parametrize(
    ("spoil", "story"),
    [
        (change(fingerprint=b""), "a fingerprint of 0 bytes; it has 16"),
        (change(limb_bits=40), "limbs of 40 bits; known are 32, 44, 48, 52"),
        (change(ring_dimension=2047), "a ring dimension of 2047; allowed are powers of two"),
        (change(ring_dimension=1 << 31), "a ring dimension of 2147483648"),
        (change(polynomials=3), "3 polynomials and 2 seeds"),
        (change(seeds=0), "1 polynomials and 0 seeds"),
        (change(seeds=2**32 - 1), "1 polynomials and 4294967295 seeds"),
        (change(seeds=3), "payload of 11368 bytes; its encrypted form asks for 11388"),
        (change(limb_bits=48), "payload of 11368 bytes; its encrypted form asks for"),
        (change(opens=b"m"), "a model with a digest of 1 bytes, in 1 polynomials; it has 32"),
        (change(opens=b"m" * 33), "a model with a digest of 33 bytes"),
        (
            change(opens=b"m" * 32, polynomials=2, seeds=0),
            "a digest of 32 bytes, in 2 polynomials; it has 32, and they have 1",
        ),
        (exponents(0), "1 exponents for 2 float tensors; one for each"),
        (exponents(0, 1, 2), "3 exponents for 2 float tensors"),
        (exponents(-1, 0), "exponents from -1 to 0; allowed are 0 to 1100"),
        (exponents(0, 1101), "exponents from 0 to 1101; allowed are 0 to 1100"),
        (share(0, learner="bob"), "shares must name each learner once"),
        (share(0, learner="carl"), "in the order of names"),
        (share(0, learner="../x"), "shares must name each learner once"),
        (share(0, learner=""), "shares must name each learner once"),
        (share(1, weight=0.0), "the share of bob has the weight 0.0"),
        (share(1, weight=-1.0), "the share of bob has the weight -1.0"),
        (share(1, weight=math.nan), "the share of bob has the weight nan"),
        (share(1, weight=math.inf), "the share of bob has the weight inf"),
        (share(1, update_digest=b"x"), "an update digest of 1 bytes; above 0 up to 1e+06, and 32"),
        (more_bytes, "payload of 11369 bytes; its encrypted form asks for 11368"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(
    spoil: Callable[[Manifest], None], story: str
) -> None:
    manifest = encrypted()
    spoil(manifest)
    with pytest.raises(PeerError, match=re.escape(story)):
        parse_manifest(serialise_manifest(manifest))


@settings(max_examples=50)
@given(st.data())
def test_changed_bytes_give_a_consistent_manifest_or_a_peer_error(data: st.DataObject) -> None:
    changed = bytearray(serialise_manifest(encrypted()))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] ^= data.draw(st.integers(1, 255))
    try:
        parsed = parse_manifest(bytes(changed))
    except PeerError:
        return
    assert serialise_manifest(parsed) == changed
    if is_encrypted(parsed):
        assert c.chunk_bytes(parsed) <= c.CHUNK_BYTES
        assert len(parsed.encryption.exponents) == len(float_specs(parsed))


@given(st.integers(1, 400_000), limb_bits, forms)
def test_the_chunks_cover_the_payload_once_and_are_its_blocks(
    values: int, bits: int, form: tuple[int, int]
) -> None:
    manifest = large(values, bits, *form)
    context = native.Context(b"f" * 16, bits, RING, (1 << bits) - 2 * RING + 1)
    left, end, counted = -(-values // RING), 0, 0
    for index in range(c.chunk_count(manifest)):
        start, stop = c.chunk_extent(index, manifest)
        count = min(left, context.block_ciphertexts)
        assert start == end
        assert stop - start == native.block_bytes(context, count, *form) <= c.CHUNK_BYTES
        assert 0 < c.value_count(manifest, index) <= count * RING
        left, end, counted = left - count, stop, counted + c.value_count(manifest, index)
    assert (left, end, counted) == (0, manifest.payload_bytes, values)


@given(st.integers(1, 200_000), limb_bits, forms)
def test_the_header_of_a_block_comes_out_as_it_went_in(
    values: int, bits: int, form: tuple[int, int]
) -> None:
    manifest = large(values, bits, *form)
    index = c.chunk_count(manifest) - 1
    start, stop = c.chunk_extent(index, manifest)
    header = c.describe_chunk(
        manifest,
        index,
        bytes(stop - start),
        federation=bytes(16),
        manifest_digest=bytes(16),
        subject=bytes(16),
        crc32c=zlib.crc32,
    )
    assert header.privacy == c.CKKS
    assert header.exponents == ckks.exponents_digest([0]) != c.NO_DIGEST
    assert c.parse_header(c.pack_header(header, zlib.crc32), zlib.crc32) == header


def test_headers_carry_the_digest_of_the_exponents_in_encrypted_mode_alone() -> None:
    assert c.exponents_of(MODEL) == c.NO_DIGEST
    assert c.exponents_of(encrypted()) == ckks.exponents_digest([0, 3])
