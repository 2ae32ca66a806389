"""A federation under a joint key, file by file: sealed, folded, opened by all sites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joint_keys import joint_keys
from sealed_models import no_others, quiet, sealed

from metisfl.controller.encrypted_fold import EncryptedUpdate, context_of, fold_encrypted
from metisfl.learner.crypto import Crypto
from metisfl.learner.partial_file import make_partial
from metisfl.learner.sealed_file import open_sealed
from metisfl.proto.model_file import open_model
from metisfl.proto.tensors import Tensor

__all__ = ["SITES", "JointSites"]

SITES = ("ada", "bob", "cyd")


class JointSites:
    """The sites of one key, each with its share, and what a controller does for them."""

    def __init__(self, names: Sequence[str] = SITES, **policy: Any) -> None:
        keys = joint_keys(names, **policy)
        self.cryptos = {name: Crypto(*keys[name]) for name in sorted(names)}
        self.public = next(iter(keys.values()))[0]

    def updates(
        self,
        folder: Path,
        models: Sequence[Sequence[Tensor]],
        *,
        weights: Sequence[float] = (),
        exponents: Sequence[int] = (),
    ) -> list[EncryptedUpdate]:
        """One of each site, in the order of names; fewer models: of the first sites."""
        weights = weights or [1.0] * len(models)
        return [
            EncryptedUpdate(path, name, weight, made.digest)
            for (name, crypto), tensors, weight in zip(
                self.cryptos.items(), models, weights, strict=False
            )
            for path in [folder / f"{name}.update"]
            for made in [sealed(crypto, tensors, path, weight=weight, exponents=exponents)]
        ]

    def model(self, updates: Sequence[EncryptedUpdate], target: Path) -> bytes:
        return fold_encrypted(updates, context_of(self.public), target)

    def partial(
        self, name: str, model: Path, digest: bytes, *, given: bytes = b"", **more: Any
    ) -> EncryptedUpdate:
        """A site's partial beside the model. `given`: its update, if the model names one."""
        path = model.with_name(f"{model.name}.{name}.partial")
        said = {"own": (name, given), "initial": False, "progress": quiet, **more}
        with open_model(model) as sums:
            made = make_partial(self.cryptos[name], sums, path, model_digest=digest, **said)
        return EncryptedUpdate(path, name, 1.0, made)

    def partials(
        self, model: Path, digest: bytes, updates: Sequence[EncryptedUpdate]
    ) -> list[EncryptedUpdate]:
        """One of each site."""
        given = {one.learner: one.digest for one in updates}
        return [
            self.partial(name, model, digest, given=given.get(name, b"")) for name in self.cryptos
        ]

    def opening(self, partials: Sequence[EncryptedUpdate], target: Path) -> Path:
        """The fold of partials."""
        fold_encrypted(partials, context_of(self.public, partials=True), target)
        return target

    def opened(
        self, name: str, model: Path, digest: bytes, partials: Path, *, others: Any = no_others
    ) -> Path:
        """The plain model that a site gets."""
        plain = model.with_name(f"{model.name}.{name}.plain")
        with open_model(model) as sums, open_model(partials) as added:
            open_sealed(
                self.cryptos[name],
                sums,
                plain,
                others=others,
                progress=quiet,
                partials=added,
                model_digest=digest,
            )
        return plain
