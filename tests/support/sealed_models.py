"""Models that are sealed at sites, added without a key and opened again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from metisfl.controller.encrypted_fold import EncryptedUpdate, context_of, fold_encrypted
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.sealed_file import Sealed, open_sealed, seal
from metisfl.proto import ckks
from metisfl.proto.model_file import open_model
from metisfl.proto.tensors import Tensor

LEARNERS = 20
PUBLIC, SECRET = generate("standard", max_learners=LEARNERS)
BLOCK_VALUES = 11 * ckks.RING_DIMENSION
HALF_STEP = 2.0 ** -(PUBLIC.grid_bits + 1)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def quiet(_: float) -> None: ...


def no_others() -> NoReturn:
    raise AssertionError("a model of floats alone needs nothing of this site's own")


def floats(*arrays: Any) -> list[Tensor]:
    return [Tensor(f"t{number}", array, True) for number, array in enumerate(arrays)]


def sealed(
    crypto: Crypto,
    tensors: Sequence[Tensor],
    path: Path,
    *,
    weight: float = 1.0,
    exponents: Sequence[int] = (),
) -> Sealed:
    made = seal(
        crypto, tensors, path, exponents=exponents, weight=weight, sync=False, progress=quiet
    )
    assert isinstance(made, Sealed), made
    return made


def community(
    crypto: Crypto,
    folder: Path,
    models: Sequence[Sequence[Tensor]],
    *,
    weights: Sequence[float] = (),
    exponents: Sequence[int] = (),
    claimed: Sequence[float] = (),
) -> Path:
    """The sum of the sites' models; it claims the weights `claimed` (those that were used)."""
    updates = []
    weights = weights or [1.0] * len(models)
    for number, (tensors, weight) in enumerate(zip(models, weights, strict=True)):
        path = folder / f"s{number:03}"
        made = sealed(crypto, tensors, path, weight=weight, exponents=exponents)
        said = claimed[number] if claimed else weight
        updates.append(EncryptedUpdate(path, path.name, said, made.digest))
    fold_encrypted(updates, context_of(crypto.public), folder / "model")
    return folder / "model"


def opened(
    crypto: Crypto, model: Path, *, others: Any = no_others, initial: bool = False
) -> dict[str, Any]:
    """The tensors of a community model, by name."""
    plain = model.with_name("plain")
    with open_model(model) as sums:
        open_sealed(crypto, sums, plain, others=others, progress=quiet, initial=initial)
    with open_model(plain) as tensors:
        return {each.name: np.array(each.array) for each in tensors.tensors()}
