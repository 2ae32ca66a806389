"""What the benchmarks of encryption share: updates, their files, and the fold between sites.

Rule: what is measured is what a learner does, on files, in memory where there is a memory file
system; the fold is what a controller does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from metisfl.learner.crypto import Crypto
from metisfl.learner.sealed_file import Sealed, seal
from metisfl.native_c.ckks import Context, fold_payloads
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.model_file import ModelWriter, open_model
from metisfl.proto.model_pb2 import Encryption, Share
from metisfl.proto.tensors import Tensor, encrypted_manifest, encrypted_values, serialise_manifest

__all__ = ["fold", "say", "scratch", "seal_update", "seconds", "update_of"]

SHARED_MEMORY = Path("/dev/shm")


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the files, which goes with the context."""
    return tempfile.TemporaryDirectory(
        dir=SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    )


def update_of(learner: int, params: int) -> NDArray[np.float32]:
    """Weights as after some training, within -1 to 1."""
    values = np.random.default_rng(learner).normal(0, 0.05, params).astype(np.float32)
    return np.clip(values, -1, 1, out=values)


def seal_update(crypto: Crypto, values: NDArray[np.float32], path: Path) -> None:
    update = [Tensor("vector", values, trainable=True)]
    sealed = seal(
        crypto, update, path, exponents=(), weight=1.0, sync=False, progress=lambda _: None
    )
    assert isinstance(sealed, Sealed), "values up to 1 fit the smallest scale"


def fold(context: Context, files: Mapping[str, Path], target: Path, polynomials: int) -> bytes:
    """Write the sum of `files`, by learner in order, and return its digest.

    With one polynomial it carries the seeds of all.
    """
    with ExitStack() as stack:
        models = [stack.enter_context(open_model(path)) for path in files.values()]
        seeds = models[0].manifest.encryption.seeds
        form = Encryption()
        form.CopyFrom(models[0].manifest.encryption)
        form.polynomials = polynomials
        form.seeds = seeds * len(models) if polynomials == 1 else 0
        for learner in files:
            form.shares.append(Share(learner=learner, weight=1.0, update_digest=bytes(32)))
        manifest = encrypted_manifest(models[0].manifest, form)
        writer = stack.enter_context(ModelWriter(target, serialise_manifest(manifest)))
        fold_payloads(
            context,
            [model.read_payload_into for model in models],
            [1] * len(models),
            ciphertexts=ckks.ciphertexts(encrypted_values(manifest), form.ring_dimension),
            seeds=seeds,
            exponents_digest=exponents_of(manifest),
            polynomials=polynomials,
            write=writer.append,
        )
        return writer.commit(sync=False)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of `work`."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def say(text: str) -> None:
    """Tell whoever waits, on stderr."""
    print(text, file=sys.stderr, flush=True)
