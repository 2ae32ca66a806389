"""Measure encryption at a site: bytes a parameter, speed, and the error of a mean.

Rule: files are sealed from tensors and opened into a plain model, and the error is that of the
opened model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from metisfl.deploy.options import whole_number
from metisfl.learner.bench_joint import joint_table, measure_joint
from metisfl.learner.bench_sealing import fold, say, scratch, seal_update, seconds, update_of
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.sealed_file import open_sealed
from metisfl.proto import ckks
from metisfl.proto.model_file import open_model

__all__ = ["CryptoFigures", "command", "measure"]

LEARNERS = 10
TURNS = 5
PARAMS_MAX = 100_000_000
DEFAULT_PROFILE = "standard"


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
    parser.add_argument(
        "--profile", choices=list(ckks.PROFILES), help=f"default: {DEFAULT_PROFILE}"
    )
    parser.add_argument(
        "--threshold",
        type=whole_number(2, ckks.joint_sites_max()),
        metavar="N",
        help="under a joint key of N sites, which all have to open a model; of profile "
        f"{ckks.JOINT_PROFILE}",
    )
    parser.add_argument(
        "--params",
        type=whole_number(1, PARAMS_MAX),
        default=1_000_000,
        metavar="N",
        help="parameters of the model",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.threshold is None:
        figures = measure(options.profile or DEFAULT_PROFILE, options.params)
        print(json.dumps(asdict(figures)) if options.json else _table(figures))
        return 0
    if options.profile not in (None, ckks.JOINT_PROFILE):
        parser.error(f"--threshold: a joint key is of --profile {ckks.JOINT_PROFILE}")
    joint = measure_joint(options.threshold, options.params)
    print(json.dumps(asdict(joint)) if options.json else joint_table(joint))
    return 0


def measure(profile: str, params: int) -> CryptoFigures:
    """Seals the updates of ten learners, folds them in both forms, and opens both sums."""
    crypto = Crypto(*generate(profile, max_learners=LEARNERS, error=1.0))
    with scratch() as name:
        folder = Path(name)
        exact = np.zeros(params)
        sealing_s, updates = [], {}
        for learner in range(LEARNERS):
            say(f"sealing the update of learner {learner + 1} of {LEARNERS}")
            values = update_of(learner, params)
            exact += values
            path = updates[f"l{learner}"] = folder / f"{learner}.update"
            sealing_s.append(seconds(partial(seal_update, crypto, values, path)))
        up_bytes = (folder / "0.update").stat().st_size
        opening_s, down_bytes, errors = [], [], []
        for polynomials in (1, 2):
            model = folder / f"{polynomials}.model"
            fold(crypto.context, updates, model, polynomials)
            plain = folder / "plain.model"
            for turn in range(TURNS):
                say(f"opening the sum, turn {turn + 1} of {TURNS}")
                opening_s.append(seconds(partial(_open, crypto, model, plain)))
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


def _open(crypto: Crypto, model: Path, plain: Path) -> None:
    with open_model(model) as sums:
        open_sealed(crypto, sums, plain, others=list, progress=lambda _: None)


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
