"""Laws of the encrypted fold, against whole numbers without bounds.

A fold of blocks is the weighted sum of their limbs modulo q: exact whatever the weights add up to,
the same in any order and however the calls are cut; and what was taken back was never there.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from metisfl.native_c import ArgumentError
from metisfl.native_c.ckks import (
    BLOCK_SEEDS_MAX,
    BlockError,
    Context,
    Fold,
    block_bytes,
    expand,
    fold_payloads,
    open_block,
    seal_block,
)

RING = 1024
ROWS = 2
EXPONENTS = b"exponents digest"
U32_MAX = 2**32 - 1

Exact = NDArray[np.object_]


def context_of(bits: int, *, lowest: bool = False) -> Context:
    """With a modulus near one end of what `bits` allow, or near the other."""
    modulus = 2 ** (bits - 1) + 11 if lowest else 2**bits - 4095
    return Context(b"0123456789abcdef", bits, RING, modulus)


class Update:
    """One block of random limbs, and what it stands for: c0 and c1 as whole numbers."""

    def __init__(self, context: Context, number: int, polynomials: int = 1) -> None:
        source = np.random.default_rng(number)
        c0, c1 = source.integers(0, context.modulus, (2, ROWS, RING), np.uint64)
        self.seed = source.bytes(16) if polynomials == 1 else None
        self.block = bytearray(block_bytes(context, ROWS, polynomials, 2 - polynomials))
        seal_block(
            context,
            index=0,
            count=1,
            exponents_digest=EXPONENTS,
            c0=c0,
            c1=None if self.seed else c1,
            seed=self.seed,
            out=self.block,
        )
        if self.seed:
            c1 = np.array([expand(context, self.seed, row) for row in range(ROWS)])
        self.c0: Exact = c0.astype(object)
        self.c1: Exact = c1.astype(object)


def begun(context: Context, polynomials: int) -> Fold:
    fold = Fold(context)
    fold.begin(0, 1, ROWS, EXPONENTS, polynomials)
    return fold


def finalised(fold: Fold) -> bytes:
    out = bytearray(fold.out_bytes)
    fold.finalise(out)
    return bytes(out)


def limbs_of(context: Context, block: bytes) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    c0, c1 = np.empty((2, ROWS, RING), np.uint64)
    open_block(context, block, index=0, count=1, exponents_digest=EXPONENTS, c0=c0, c1=c1)
    return c0, c1


def seeds_of(block: bytes) -> list[tuple[bytes, int]]:
    """Read from the bytes, as metis.h has them."""
    (count,) = struct.unpack_from("<H", block, 50)
    return [struct.unpack_from("<16sI", block, 64 + 20 * place) for place in range(count)]


def assert_sum(
    context: Context, block: bytes, updates: Sequence[Update], weights: Sequence[int]
) -> None:
    pairs = list(zip(updates, weights, strict=True))
    for found, expected in zip(
        limbs_of(context, block),
        (
            sum(update.c0 * weight for update, weight in pairs),
            sum(update.c1 * weight for update, weight in pairs),
        ),
        strict=True,
    ):
        assert (found == expected % context.modulus).all()


# ---- the sum -------------------------------------------------------------------------------------

contexts = st.builds(context_of, st.sampled_from([32, 44, 48, 52]), lowest=st.booleans())
weights_of_all_sizes = st.one_of(
    st.integers(1, 9), st.sampled_from([2**11, 2**12, 2**20, U32_MAX]), st.integers(1, U32_MAX)
)


@settings(max_examples=60, deadline=None)
@given(
    contexts,
    st.lists(weights_of_all_sizes, min_size=1, max_size=7),
    st.sampled_from([1, 2]),
    st.randoms(use_true_random=False),
)
def test_the_sum_is_exact_in_any_order_and_however_it_is_cut(
    context: Context, weights: list[int], polynomials: int, luck: random.Random
) -> None:
    """Also far beyond what 64 bits hold, and with both kinds of block where they may mix."""
    updates = [
        Update(context, number, luck.choice([1, polynomials])) for number in range(len(weights))
    ]
    order = luck.sample(range(len(weights)), len(weights))
    with begun(context, polynomials) as fold:
        at = 0
        while at < len(order):
            some = order[at : at + luck.randint(1, len(order))]
            if len(some) == 1:
                fold.absorb(updates[some[0]].block, weights[some[0]])
            else:
                fold.absorb_many([updates[i].block for i in some], [weights[i] for i in some])
            at += len(some)
        result = finalised(fold)
    assert_sum(context, result, updates, weights)
    if polynomials == 1:
        assert seeds_of(result) == [(updates[i].seed, weights[i]) for i in order]
    else:
        assert seeds_of(result) == []


@settings(max_examples=40, deadline=None)
@given(contexts, st.lists(weights_of_all_sizes, min_size=2, max_size=5), st.sampled_from([1, 2]))
def test_what_is_retracted_was_never_there(
    context: Context, weights: list[int], polynomials: int
) -> None:
    updates = [
        Update(context, number, 1 + (number + polynomials) % polynomials)
        for number in range(len(weights))
    ]
    with begun(context, polynomials) as fold:
        fold.absorb_many([update.block for update in updates[1:]], weights[1:])
        without = finalised(fold)
        fold.absorb(updates[0].block, weights[0])
        assert finalised(fold) != without
        fold.retract(updates[0].block, weights[0])
        assert finalised(fold) == without
        fold.absorb(updates[0].block, weights[0])  # not a duplicate of what was taken back
        assert_sum(context, finalised(fold), updates[1:] + updates[:1], weights[1:] + weights[:1])


@pytest.mark.parametrize("bits", [32, 44, 48, 52])
@pytest.mark.parametrize("polynomials", [1, 2])
def test_the_sum_of_weights_may_pass_what_64_bits_hold(bits: int, polynomials: int) -> None:
    """Once with small steps over the edge, so that the sums are reduced, and once at a leap."""
    context = context_of(bits)
    limit = 2 ** (64 - bits)
    step = min(limit // 2 - 1, U32_MAX // 2)
    for weights in ([step, step, step, step, 1], [min(limit, U32_MAX), U32_MAX, 1, U32_MAX, 2]):
        updates = [Update(context, number, polynomials) for number in range(5)]
        with begun(context, polynomials) as fold:
            for update, weight in zip(updates, weights, strict=True):
                fold.absorb(update.block, weight)
            assert_sum(context, finalised(fold), updates, weights)


@pytest.mark.parametrize("polynomials", [1, 2])
def test_what_was_folded_can_be_folded_again(polynomials: int) -> None:
    context = context_of(44)
    updates = [Update(context, number, polynomials) for number in range(4)]
    parts = []
    for some in (updates[:2], updates[2:]):
        with begun(context, polynomials) as fold:
            fold.absorb_many([update.block for update in some], [3, 5])
            parts.append(finalised(fold))
    with begun(context, polynomials) as fold:
        fold.absorb_many(parts, [7, 1])
        result = finalised(fold)
    with begun(context, polynomials) as fold:
        fold.absorb_many([update.block for update in updates], [21, 35, 3, 5])
        assert finalised(fold) == result


def test_a_block_carries_only_so_many_seeds() -> None:
    context = context_of(32)
    updates = [Update(context, number) for number in range(BLOCK_SEEDS_MAX + 1)]
    with begun(context, 1) as fold:
        for update in updates[:-1]:
            fold.absorb(update.block)
        full = finalised(fold)
        assert len(seeds_of(full)) == BLOCK_SEEDS_MAX
        with pytest.raises(BlockError, match="allowed together: 1024") as refused:
            fold.absorb(updates[-1].block)
        assert refused.value.code == "seeds"
        assert finalised(fold) == full
    with begun(context, 2) as fold:  # here they are summed, not carried
        fold.absorb_many([full, updates[-1].block], [1, 2])
        assert_sum(context, finalised(fold), updates, [1] * BLOCK_SEEDS_MAX + [2])


def test_a_seed_has_a_weight_of_32_bits() -> None:
    context = context_of(32)
    with begun(context, 1) as fold:
        fold.absorb(Update(context, 0).block, 2**31)
        heavy = finalised(fold)
        with begun(context, 1) as again, pytest.raises(BlockError, match="4294967296") as refused:
            again.absorb(heavy, 2)
    assert refused.value.code == "weight"


def test_no_seed_goes_in_twice_even_inside_what_was_folded() -> None:
    context = context_of(48)
    updates = [Update(context, number) for number in range(3)]
    with begun(context, 1) as fold:
        fold.absorb_many([update.block for update in updates[:2]], [1, 1])
        two = finalised(fold)
    with begun(context, 2) as fold:
        fold.absorb(updates[1].block)
        with pytest.raises(BlockError) as refused:
            fold.absorb_many([updates[2].block, two], [1, 1])
        assert (refused.value.code, refused.value.source) == ("duplicate", 1)
        assert_sum(context, finalised(fold), updates[1:2], [1])


# ---- whole payloads ------------------------------------------------------------------------------


class Payload:
    """Blocks end to end, with a reader that counts."""

    def __init__(self, context: Context, number: int, ciphertexts: int) -> None:
        full = context.block_ciphertexts
        count = -(-ciphertexts // full)
        source = np.random.default_rng(number)
        self.blocks: list[bytearray] = []
        for index in range(count):
            rows = min(full, ciphertexts - index * full)
            block = bytearray(block_bytes(context, rows, 1, 1))
            seal_block(
                context,
                index=index,
                count=count,
                exponents_digest=EXPONENTS,
                c0=source.integers(0, context.modulus, (rows, RING), np.uint64),
                seed=source.bytes(16),
                out=block,
            )
            self.blocks.append(block)
        self.data = bytearray().join(self.blocks)

    def reader(self, buffers: set[int]) -> Callable[[memoryview, int], int]:
        def read(buffer: memoryview, offset: int) -> int:
            buffers.add(np.frombuffer(buffer, np.uint8).ctypes.data)
            piece = self.data[offset : offset + len(buffer)]
            buffer[: len(piece)] = piece
            return len(piece)

        return read


LEARNERS = 19
CIPHERTEXTS = 23 + 12  # of RING values and 44 bits: a full block, and half of one


def folded(
    context: Context, payloads: Sequence[Payload], polynomials: int, buffers: set[int]
) -> list[bytes]:
    result: list[bytes] = []
    fold_payloads(
        context,
        [payload.reader(buffers) for payload in payloads],
        list(range(1, len(payloads) + 1)),
        ciphertexts=CIPHERTEXTS,
        seeds=1,
        exponents_digest=EXPONENTS,
        polynomials=polynomials,
        write=lambda block: result.append(bytes(block)),
    )
    return result


@pytest.mark.parametrize("polynomials", [1, 2])
def test_payloads_are_folded_block_by_block_with_eight_buffers(polynomials: int) -> None:
    context = context_of(44)
    assert context.block_ciphertexts == 23
    payloads = [Payload(context, number, CIPHERTEXTS) for number in range(LEARNERS)]
    buffers: set[int] = set()
    result = folded(context, payloads, polynomials, buffers)
    assert len(buffers) == 8
    with Fold(context) as fold:
        for index, rows in enumerate([23, 12]):
            fold.begin(index, 2, rows, EXPONENTS, polynomials)
            for weight, payload in enumerate(payloads, start=1):
                fold.absorb(payload.blocks[index], weight)
            assert finalised(fold) == result[index]


@pytest.mark.parametrize("bad", [0, 9, LEARNERS - 1])
def test_a_bad_payload_is_named(bad: int) -> None:
    context = context_of(44)
    payloads = [Payload(context, number, CIPHERTEXTS) for number in range(LEARNERS)]
    payloads[bad].data[-1] ^= 1
    with pytest.raises(BlockError) as refused:
        folded(context, payloads, 1, set())
    assert (refused.value.code, refused.value.source) == ("checksum", bad)
    del payloads[bad].data[-100:]
    with pytest.raises(BlockError) as refused:
        folded(context, payloads, 1, set())
    assert (refused.value.code, refused.value.source) == ("length", bad)


def test_every_reader_has_a_weight() -> None:
    with pytest.raises(ArgumentError, match="0 readers but 1 weights"):
        fold_payloads(
            context_of(44),
            [],
            [1],
            ciphertexts=1,
            seeds=1,
            exponents_digest=EXPONENTS,
            polynomials=1,
            write=lambda block: None,
        )
