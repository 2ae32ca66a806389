"""The Python face of the encrypted fold: blocks of CKKS ciphertexts, summed unread.

Rule: this file decides nothing. metis.h states what may be folded together and what comes of it; C
enforces it. What is wrong with a block becomes a BlockError, what is wrong with the call an
ArgumentError, a defect of ours.

Blocks are anything contiguous that lends its memory. Limbs are uint64 arrays of shape
(ciphertexts, ring dimension), each limb below the modulus. Both are lent for the call only, and
the GIL is released meanwhile: leave them alone until it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from metisfl.native_c import ArgumentError, Buffer, WritableBuffer, _borrow, _borrow_all, _give_back
from metisfl.native_c._ffi import ffi, lib
from metisfl.native_c.blocks import (
    BLOCK_SEEDS_MAX,
    SEED_BYTES,
    BlockError,
    Context,
    block_bytes,
    check,
    context_in_c,
    expand,
    open_block,
    range_in_c,
    reseed,
    seal_block,
)

__all__ = [
    "BLOCK_SEEDS_MAX",
    "SEED_BYTES",
    "BlockError",
    "Context",
    "Fold",
    "block_bytes",
    "expand",
    "fold_payloads",
    "open_block",
    "reseed",
    "seal_block",
]

_INPUTS_AT_ONCE = 8
_WEIGHT_MAX = 2**32 - 1


class Fold:
    """The weighted sum of one block of each update; the weights are whole numbers.

    `begin` a range, `absorb` the blocks, `finalise` the sum into a block. The limbs of the result
    are exact and do not depend on the order. One thread at a time per fold. Use it as a context
    manager, or `close` it; once closed every method raises ArgumentError.
    """

    def __init__(self, context: Context) -> None:
        """Raises ArgumentError, MemoryError."""
        self._handle = ffi.NULL
        out = ffi.new("metis_ckks_fold **")
        check(lib.metis_ckks_fold_create(context_in_c(context), out))
        self._handle = ffi.gc(out[0], lib.metis_ckks_fold_destroy)

    def begin(
        self,
        index: int,
        count: int,
        ciphertexts: int,
        exponents_digest: bytes,
        polynomials: int,
    ) -> None:
        """Starts block `index` of `count`, and forgets what was absorbed before.

        `polynomials` is that of the result. With 1 it carries the seeds of all blocks, in the order
        absorbed, and takes only blocks with seeds; with 2 the seeds are expanded and summed, and
        blocks of both kinds mix. Takes 8 bytes for each limb of the result. Raises ArgumentError,
        MemoryError.
        """
        check(
            lib.metis_ckks_fold_begin(
                self._handle, range_in_c(index, count, ciphertexts, exponents_digest, polynomials)
            )
        )

    def absorb(self, block: Buffer, weight: int = 1) -> None:
        """Adds `weight` (1 to 2^32 - 1) times `block`. Raises BlockError, ArgumentError."""
        count = _weight(weight)
        with _borrow("block", block) as source:
            status = lib.metis_ckks_fold_absorb(self._handle, source, len(source), count)
        check(status)

    def absorb_many(self, blocks: Sequence[Buffer], weights: Sequence[int]) -> None:
        """Adds each of `blocks` with its weight or, when one is refused, none of them.

        The same as one after another, in less time. BlockError.source says which was refused.
        """
        if len(blocks) != len(weights):
            raise ArgumentError(f"{len(blocks)} blocks but {len(weights)} weights")
        _weight(min(weights, default=1))
        _weight(max(weights, default=1))
        sources = _borrow_all("block", blocks)
        try:
            status = lib.metis_ckks_fold_absorb_many(
                self._handle,
                ffi.new("const void *[]", sources),
                ffi.new("size_t[]", list(map(len, sources))),
                ffi.new("uint32_t[]", weights),
                len(sources),
            )
        finally:
            _give_back(sources)
        check(status)

    def retract(self, block: Buffer, weight: int = 1) -> None:
        """Undoes the absorb of `block` with this weight: it was never there.

        Raises BlockError, and ArgumentError for a block that was not absorbed so.
        """
        count = _weight(weight)
        with _borrow("block", block) as source:
            status = lib.metis_ckks_fold_retract(self._handle, source, len(source), count)
        check(status)

    @property
    def out_bytes(self) -> int:
        """The length of what `finalise` writes now. Raises ArgumentError before any absorb."""
        out = ffi.new("size_t *")
        check(lib.metis_ckks_fold_bytes(self._handle, out))
        return int(out[0])

    def finalise(self, out: WritableBuffer) -> None:
        """Writes the sum as a whole block of `out_bytes`. The sums stay. Raises ArgumentError."""
        with _borrow("out", out, writable=True) as target:
            status = lib.metis_ckks_fold_finalise(self._handle, target, len(target))
        check(status)

    def close(self) -> None:
        """Gives the memory back; a second time does nothing."""
        # A released handle must not reach C again; C refuses NULL.
        handle, self._handle = self._handle, ffi.NULL
        if handle:
            ffi.release(handle)

    def __enter__(self) -> Fold:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def fold_payloads(
    context: Context,
    readers: Sequence[Callable[[memoryview, int], int]],
    weights: Sequence[int],
    *,
    ciphertexts: int,
    seeds: int,
    exponents_digest: bytes,
    polynomials: int,
    write: Callable[[memoryview], object],
) -> None:
    """Folds whole payloads of `ciphertexts` ciphertexts, block after block, in constant memory.

    A reader fills a buffer from an offset of its payload and returns the bytes read. `seeds` is the
    number that each block of the inputs carries, 0 for blocks of two polynomials; `polynomials`
    is that of the result, as in Fold.begin. Each result block is given to `write`, and lent only
    until it returns. At most eight input blocks are held at a time, however many readers there are.

    Raises BlockError, whose `source` is the position of the reader; ArgumentError; and whatever a
    reader or `write` raises. What was written before stays written.
    """
    if len(readers) != len(weights):
        raise ArgumentError(f"{len(readers)} readers but {len(weights)} weights")
    if not ciphertexts:
        return  # a model without floats: its payload has no block
    full = context.block_ciphertexts
    count = -(-ciphertexts // full)
    kind = 1 if seeds else 2
    room = block_bytes(context, min(full, ciphertexts), kind, seeds)
    buffers = [memoryview(bytearray(room)) for _ in readers[:_INPUTS_AT_ONCE]]
    out = bytearray()
    offset = 0
    with Fold(context) as fold:
        for index in range(count):
            inside = min(full, ciphertexts - index * full)
            size = block_bytes(context, inside, kind, seeds)
            fold.begin(index, count, inside, exponents_digest, polynomials)
            for first in range(0, len(readers), _INPUTS_AT_ONCE):
                group = readers[first : first + _INPUTS_AT_ONCE]
                blocks = [
                    buffer[: read(buffer[:size], offset)]
                    for buffer, read in zip(buffers, group, strict=False)
                ]
                try:
                    fold.absorb_many(blocks, weights[first : first + _INPUTS_AT_ONCE])
                except BlockError as error:
                    error.source += first
                    raise
            if len(out) != fold.out_bytes:
                out = bytearray(fold.out_bytes)
            fold.finalise(out)
            write(memoryview(out))
            offset += size


def _weight(weight: int) -> int:
    if not 1 <= weight <= _WEIGHT_MAX:
        raise ArgumentError(f"a weight of {weight} is outside 1 to 2^32 - 1")
    return weight
