"""Measure encryption at a site: bytes a parameter, speed, and the error of a mean.

Rule: what is measured is what a learner does: files are sealed from tensors and opened into a plain
model, in memory where there is a memory file system, and the error is that of the opened model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from metisfl.deploy.options import whole_number
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.sealed_file import Sealed, open_sealed, seal
from metisfl.native_c.ckks import fold_payloads
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.model_file import ModelWriter, open_model
from metisfl.proto.model_pb2 import Encryption, Share
from metisfl.proto.tensors import Tensor, encrypted_manifest, encrypted_values, serialise_manifest

__all__ = ["CryptoFigures", "command", "measure"]

LEARNERS = 10
TURNS = 5
PARAMS_MAX = 100_000_000
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class CryptoFigures:
    """One run. Speeds are the best of several turns; errors are relative to the tensor's scale."""

    profile: str
    params: int
    learners: int
    up_bytes_per_param: float
    down_bytes_per_param: float
    """Where the learners rebuild half of the sum from its seeds."""
    down_bytes_per_param_expanded: float
    """Where both halves travel."""
    encrypt_mparams_per_s: float
    decrypt_mparams_per_s: float
    max_abs_error: float
    expected_error: float
    threads: int


def command(argv: list[str]) -> int:
    """Runs the benchmark that `argv` asks for; prints a table, or with --json one object."""
    parser = argparse.ArgumentParser(
        prog="metisfl bench crypto",
        description="Measure encryption and decryption of updates on this machine.",
    )
    parser.add_argument("--profile", choices=list(ckks.PROFILES), default="standard")
    parser.add_argument(
        "--params",
        type=whole_number(1, PARAMS_MAX),
        default=1_000_000,
        metavar="N",
        help="parameters of the model",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    figures = measure(options.profile, options.params)
    print(json.dumps(asdict(figures)) if options.json else _table(figures))
    return 0


def measure(profile: str, params: int) -> CryptoFigures:
    """Seals the updates of ten learners, folds them in both forms, and opens both sums."""
    crypto = Crypto(*generate(profile, max_learners=LEARNERS, error=1.0))
    place = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        exact = np.zeros(params)
        sealing_s = []
        for learner in range(LEARNERS):
            _say(f"sealing the update of learner {learner + 1} of {LEARNERS}")
            values = np.random.default_rng(learner).normal(0, 0.05, params).astype(np.float32)
            exact += np.clip(values, -1, 1, out=values)
            update = [Tensor("vector", values, trainable=True)]
            path = folder / f"{learner}.update"
            sealing_s.append(_seconds(partial(_seal, crypto, update, path)))
        up_bytes = (folder / "0.update").stat().st_size
        opening_s, down_bytes, errors = [], [], []
        for polynomials in (1, 2):
            model = folder / f"{polynomials}.model"
            _fold(crypto, folder, model, polynomials)
            plain = folder / "plain.model"
            for turn in range(TURNS):
                _say(f"opening the sum, turn {turn + 1} of {TURNS}")
                opening_s.append(_seconds(partial(_open, crypto, model, plain)))
            down_bytes.append(model.stat().st_size)
            with open_model(plain) as opened:
                mean = opened.tensors()[0].array
            errors.append(float(np.abs(mean - exact / LEARNERS).max()))
    return CryptoFigures(
        profile=profile,
        params=params,
        learners=LEARNERS,
        up_bytes_per_param=up_bytes / params,
        down_bytes_per_param=down_bytes[0] / params,
        down_bytes_per_param_expanded=down_bytes[1] / params,
        encrypt_mparams_per_s=params / min(sealing_s) / 1e6,
        decrypt_mparams_per_s=params / min(opening_s) / 1e6,
        max_abs_error=max(errors),
        expected_error=2.0 ** -(crypto.public.grid_bits + 1),
        threads=crypto.threads,
    )


def _seal(crypto: Crypto, update: Sequence[Tensor], path: Path) -> None:
    sealed = seal(
        crypto, update, path, exponents=(), weight=1.0, sync=False, progress=lambda _: None
    )
    assert isinstance(sealed, Sealed), "values up to 1 fit the smallest scale"


def _fold(crypto: Crypto, folder: Path, target: Path, polynomials: int) -> None:
    """What a controller does, in one form or the other."""
    models = [open_model(folder / f"{learner}.update") for learner in range(LEARNERS)]
    form = Encryption()
    form.CopyFrom(models[0].manifest.encryption)
    form.polynomials, form.seeds = (1, LEARNERS) if polynomials == 1 else (2, 0)
    for learner in range(LEARNERS):
        form.shares.append(Share(learner=f"l{learner}", weight=1.0, update_digest=bytes(32)))
    manifest = encrypted_manifest(models[0].manifest, form)
    with ModelWriter(target, serialise_manifest(manifest)) as writer:
        fold_payloads(
            crypto.context,
            [model.read_payload_into for model in models],
            [1] * LEARNERS,
            ciphertexts=ckks.ciphertexts(encrypted_values(manifest), form.ring_dimension),
            seeds=1,
            exponents_digest=exponents_of(manifest),
            polynomials=polynomials,
            write=writer.append,
        )
        writer.commit(sync=False)
    for model in models:
        model.close()


def _open(crypto: Crypto, model: Path, plain: Path) -> None:
    with open_model(model) as sums:
        open_sealed(crypto, sums, plain, others=list, progress=lambda _: None)


def _seconds(work: Callable[[], None]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _table(figures: CryptoFigures) -> str:
    return "\n".join(
        [
            f"encryption, profile {figures.profile}: {figures.params:,} parameters, "
            f"{figures.learners} learners, {figures.threads} threads",
            "",
            f"  up                {figures.up_bytes_per_param:8.3f} bytes a parameter",
            f"  down              {figures.down_bytes_per_param:8.3f} bytes a parameter "
            f"({figures.down_bytes_per_param_expanded:.3f} with both halves)",
            f"  encrypt           {figures.encrypt_mparams_per_s:8.2f} million parameters/s",
            f"  decrypt           {figures.decrypt_mparams_per_s:8.2f} million parameters/s",
            f"  error of a mean   {figures.max_abs_error:8.1e} of a tensor's scale "
            f"(at most {figures.expected_error:.1e}, and the rounding to float32)",
        ]
    )
