"""Measure a joint key: updates under it, the partial of a site, and opening with those of all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from metisfl.learner.bench_sealing import fold, say, scratch, seal_update, seconds, update_of
from metisfl.learner.crypto import Crypto
from metisfl.learner.joint_key import joint_key, make_share
from metisfl.learner.partial_file import make_partial
from metisfl.learner.sealed_file import open_sealed
from metisfl.proto import ckks
from metisfl.proto.ckks_key import MASK_KEY_BYTES
from metisfl.proto.model_file import open_model

__all__ = ["JointFigures", "joint_table", "measure_joint"]

TURNS = 3


@dataclass(frozen=True, slots=True)
class JointFigures:
    """One run. Speeds are the best of several turns; errors are relative to the tensor's scale."""

    profile: str
    params: int
    sites: int
    up_bytes_per_param: float
    down_bytes_per_param: float
    partial_bytes_per_param: float
    """What each site sends to open a model; it fetches about as much."""
    encrypt_mparams_per_s: float
    partial_mparams_per_s: float
    decrypt_mparams_per_s: float
    max_abs_error: float
    expected_error: float
    threads: int


def measure_joint(sites: int, params: int) -> JointFigures:
    """Seals an update at each site, folds them, makes all partials, and opens at one."""
    cryptos = _cryptos(sites)
    one, *_ = cryptos.values()
    with scratch() as name:
        folder = Path(name)
        exact = np.zeros(params)
        sealing_s, partial_s, opening_s = [], [], []
        updates, partials = {}, {}
        for number, (site, crypto) in enumerate(cryptos.items()):
            say(f"sealing the update of site {number + 1} of {sites}")
            values = update_of(number, params)
            exact += values
            updates[site] = folder / f"{site}.update"
            sealing_s.append(seconds(partial(seal_update, crypto, values, updates[site])))
        model, plain = folder / "model", folder / "plain"
        digest = fold(one.context, updates, model, 2)
        for number, (site, crypto) in enumerate(cryptos.items()):
            say(f"making the partial of site {number + 1} of {sites}")
            path = partials[site] = folder / f"{site}.partial"
            partial_s.append(seconds(partial(_make_partial, crypto, site, model, digest, path)))
        opening = folder / "partials"
        fold(one.partial_context, partials, opening, 1)
        for turn in range(TURNS):
            say(f"opening the sum, turn {turn + 1} of {TURNS}")
            opening_s.append(seconds(partial(_open, one, model, digest, opening, plain)))
        with open_model(plain) as opened:
            mean = opened.tensors()[0].array
        up, down, part = (
            path.stat().st_size / params for path in (updates[site], model, partials[site])
        )
    return JointFigures(
        profile=ckks.JOINT_PROFILE,
        params=params,
        sites=sites,
        up_bytes_per_param=up,
        down_bytes_per_param=down,
        partial_bytes_per_param=part,
        encrypt_mparams_per_s=params / min(sealing_s) / 1e6,
        partial_mparams_per_s=params / min(partial_s) / 1e6,
        decrypt_mparams_per_s=params / min(opening_s) / 1e6,
        max_abs_error=float(np.abs(mean - exact / sites).max()),
        expected_error=2.0 ** -(one.public.grid_bits + 1),
        threads=one.threads,
    )


def _cryptos(sites: int) -> dict[str, Crypto]:
    """Each site's end of a key whose shares are all made here."""
    names = [f"s{number:03}" for number in range(sites)]
    coin, mask_key = os.urandom(32), os.urandom(MASK_KEY_BYTES)
    made = {name: make_share(sites=names, coin=coin) for name in names}
    return {
        name: Crypto(
            *joint_key(
                sites=names,
                error=1.0,
                min_contributors=2,
                max_share=1.0,
                verify="none",
                coin=coin,
                shares={each: share.public for each, share in made.items()},
                secret=made[name].secret,
                mask_key=mask_key,
            )
        )
        for name in names
    }


def _make_partial(crypto: Crypto, site: str, model: Path, digest: bytes, path: Path) -> None:
    with open_model(model) as sums:
        make_partial(
            crypto,
            sums,
            path,
            model_digest=digest,
            own=(site, bytes(32)),
            initial=False,
            progress=lambda _: None,
        )


def _open(crypto: Crypto, model: Path, digest: bytes, opening: Path, plain: Path) -> None:
    with open_model(model) as sums, open_model(opening) as partials:
        open_sealed(
            crypto,
            sums,
            plain,
            others=list,
            progress=lambda _: None,
            partials=partials,
            model_digest=digest,
        )


def joint_table(figures: JointFigures) -> str:
    """The figures for a person."""
    return "\n".join(
        [
            f"encryption under a joint key: {figures.params:,} parameters, {figures.sites} sites, "
            f"{figures.threads} threads",
            "",
            f"  up                {figures.up_bytes_per_param:8.3f} bytes a parameter",
            f"  down              {figures.down_bytes_per_param:8.3f} bytes a parameter",
            f"  partial           {figures.partial_bytes_per_param:8.3f} bytes a parameter, up and "
            "down",
            f"  encrypt           {figures.encrypt_mparams_per_s:8.2f} million parameters/s",
            f"  make a partial    {figures.partial_mparams_per_s:8.2f} million parameters/s",
            f"  decrypt           {figures.decrypt_mparams_per_s:8.2f} million parameters/s",
            f"  error of a mean   {figures.max_abs_error:8.1e} of a tensor's scale "
            f"(at most {figures.expected_error:.1e}, and the rounding to float32)",
        ]
    )
