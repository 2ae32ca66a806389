"""FedAvg over update files, chunk by chunk.

Rule 1: the sums are float64 and taken in the order given, which is the order of learner names, so
that every run, kernel and restart gives the same bits.
Rule 2: memory is a few chunks, whatever the size of the model and the number of updates.
Rule 3: integer and bool tensors stay as the base model has them: an average of counters means
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metisfl.native_c import Accumulator
from metisfl.proto.model_file import ModelFile, ModelWriter, open_model
from metisfl.proto.tensors import ITEM_BYTES, Segment, segments

__all__ = ["Update", "fold"]

CHUNK_BYTES: Final = 256 * 1024
FUSED: Final = 8  # updates read and absorbed together: 2 MiB of buffers, which the L2 cache holds
AVERAGED: Final = frozenset({"float16", "bfloat16", "float32", "float64"})


@dataclass(frozen=True, slots=True)
class Update:
    """One learner's update file and what it weighs (finite, above 0)."""

    path: Path
    weight: float


def fold(updates: Sequence[Update], base: Path | None, target: Path) -> bytes:
    """Write the weighted mean of `updates` to `target` and return its digest.

    All files have the same manifest. `base` is the current community model; without one the first
    update takes its place. Raises OSError (a full disk) and MachineError (a damaged file).
    """
    assert updates, "a fold of nothing"
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(update.path)) for update in updates]
        kept = stack.enter_context(open_model(base)) if base else models[0]
        assert all(model.manifest_bytes == kept.manifest_bytes for model in models)
        divisor = math.fsum(update.weight for update in updates)
        writer = stack.enter_context(ModelWriter(target, kept.manifest_bytes))
        folder = stack.enter_context(_Folder([u.weight for u in updates], divisor))
        for start in range(0, kept.payload_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, kept.payload_bytes)
            chunk = bytearray(stop - start)
            for segment in segments(kept.manifest, start, stop):
                out = memoryview(chunk)[segment.start - start : segment.stop - start]
                if segment.dtype in AVERAGED:
                    folder.average(models, segment, out)
                else:
                    kept.read_payload_into(out, segment.start)
            writer.append(chunk)
        return writer.commit()


class _Folder:
    """The accumulator and the buffers that one fold uses again and again."""

    def __init__(self, weights: list[float], divisor: float) -> None:
        self._weights = weights
        self._divisor = divisor
        self._sums = Accumulator(capacity=CHUNK_BYTES // 2)
        self._buffers = [bytearray(CHUNK_BYTES) for _ in range(min(FUSED, len(weights)))]

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._sums.close()

    def average(self, models: list[ModelFile], segment: Segment, out: memoryview) -> None:
        """Fill `out` with the weighted mean of one segment's values."""
        self._sums.begin((segment.stop - segment.start) // ITEM_BYTES[segment.dtype])
        for first in range(0, len(models), FUSED):
            views = []
            for model, buffer in zip(models[first : first + FUSED], self._buffers, strict=False):
                view = memoryview(buffer)[: segment.stop - segment.start]
                model.read_payload_into(view, segment.start)
                views.append(view)
            weights = self._weights[first : first + FUSED]
            self._sums.absorb_many(views, segment.dtype, weights)
        self._sums.finalise(segment.dtype, out, self._divisor)
