"""A model that is not the fold of the updates that it names is found out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from example_key import public_part

from metisfl.controller.encrypted_fold import EncryptedUpdate, context_of, fold_encrypted
from metisfl.learner.transfer import DownloadRefused
from metisfl.learner.verification import NotTheFold, verify
from metisfl.native_c.ckks import block_bytes, seal_block
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.model_file import ModelWriter, open_model, write_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import (
    Tensor,
    encrypted_manifest,
    encrypted_values,
    manifest_of,
    serialise_manifest,
)

PUBLIC = public_part()
FOUND = ckks.parameters_for(52, 3, joint=True)
JOINT = public_part(
    profile="wide",
    limb_bits=52,
    modulus=(1 << 52) - 4095,
    scaling_bits=FOUND.scaling_bits,
    grid_bits=FOUND.grid_bits,
    max_learners=3,
    site_names="site00 site01 site02",
)
VALUES = 13 * 2048 + 5  # two blocks
TENSORS = [
    Tensor("w", np.zeros(VALUES - 5, np.float32), True),
    Tensor("steps", np.zeros(3, np.int64), False),
    Tensor("b", np.zeros(5, np.float32), True),
]


def update(
    path: Path, seed: int, public: PublicPart = PUBLIC, exponents: Sequence[int] = (0, 3)
) -> bytes:
    """An update of random limbs: nobody can tell it from an encryption. Returns its digest."""
    rng = np.random.default_rng(seed)
    form = public.update_form(exponents)
    manifest = encrypted_manifest(manifest_of(TENSORS), form)
    context = context_of(public)
    ciphertexts = ckks.ciphertexts(encrypted_values(manifest), public.ring_dimension)
    full = context.block_ciphertexts
    count = -(-ciphertexts // full)
    with ModelWriter(path, serialise_manifest(manifest)) as writer:
        for index in range(count):
            inside = min(full, ciphertexts - index * full)
            shape = form.polynomials, inside, public.ring_dimension
            halves = rng.integers(0, public.modulus, shape, np.uint64)
            block = bytearray(block_bytes(context, inside, form.polynomials, form.seeds))
            seal_block(
                context,
                index=index,
                count=count,
                exponents_digest=exponents_of(manifest),
                c0=halves[0],
                c1=halves[1] if form.polynomials == 2 else None,
                seed=rng.bytes(16) if form.seeds else None,
                out=block,
            )
            writer.append(block)
        return writer.commit(sync=False)


class Controller:
    """Offers updates by digest, as the bulk endpoint does; `offered` may be tampered with."""

    def __init__(self, folder: Path, count: int, public: PublicPart = PUBLIC) -> None:
        self.folder, self.public = folder, public
        self.offered: dict[bytes, Path] = {}
        self.updates = []
        for number in range(count):
            path = folder / f"site{number:02}.update"
            digest = update(path, number, public)
            self.offered[digest] = path
            self.updates.append(EncryptedUpdate(path, path.stem, 1.0, digest))

    def fold(self, updates: Sequence[EncryptedUpdate] | None = None) -> bytes:
        """Write the model; return its digest."""
        return fold_encrypted(
            updates or self.updates, context_of(self.public), self.folder / "the.model"
        )

    async def download(
        self, digest: bytes, path: Path, *, on_progress: Callable[[float], None]
    ) -> None:
        if digest not in self.offered:
            raise DownloadRefused(f"no model {digest.hex()} here")
        path.write_bytes(self.offered[digest].read_bytes())
        on_progress(1.0)

    def rewrite(self, change: Callable[[Manifest, bytearray], None]) -> bytes:
        """Change the model and give it a digest that fits; return that."""
        path = self.folder / "the.model"
        with open_model(path) as model:
            manifest, payload = model.manifest, bytearray(model.pread(0, model.payload_bytes))
        change(manifest, payload)
        with ModelWriter(path, serialise_manifest(manifest)) as writer:
            writer.append(payload)
            return writer.commit(sync=False)

    def verified(self, digest: bytes) -> list[float]:
        """Verify the model; return the progress told. Nothing is left behind, whatever it says."""
        told: list[float] = []
        scratch = self.folder / "verification"
        try:
            asyncio.run(
                verify(
                    self.folder / "the.model",
                    digest,
                    cast(Any, self),
                    self.public,
                    scratch,
                    told.append,
                )
            )
        finally:
            assert not scratch.exists()
        return told


@pytest.mark.parametrize(
    ("public", "count"),
    [(PUBLIC, 1), (PUBLIC, 3), (PUBLIC, ckks.SEEDS_FORWARDED + 1), (JOINT, 1), (JOINT, 3)],
)
def test_an_honest_fold_is_believed(tmp_path: Path, public: PublicPart, count: int) -> None:
    controller = Controller(tmp_path, count, public)
    told = controller.verified(controller.fold())
    assert told == sorted(told)
    assert len(told) > count
    assert all(0 <= fraction < 1 for fraction in told)


@pytest.mark.parametrize("public", [PUBLIC, JOINT])
def test_a_fold_of_other_updates_than_it_names_is_found_out(
    tmp_path: Path, public: PublicPart
) -> None:
    controller = Controller(tmp_path, 4, public)
    ada, bob, cyd, dan = controller.updates
    named_bob = EncryptedUpdate(dan.path, bob.learner, 1.0, bob.digest)
    with pytest.raises(NotTheFold, match="something else than the 3 updates"):
        controller.verified(controller.fold([ada, named_bob, cyd]))
    controller.verified(controller.fold([ada, bob, cyd]))


@pytest.mark.parametrize("public", [PUBLIC, JOINT])
def test_an_update_that_is_in_it_twice_is_found_out(tmp_path: Path, public: PublicPart) -> None:
    """Else a controller could bring out one site's update by adding it again and again."""
    controller = Controller(tmp_path, 2, public)
    controller.fold()

    def repeat(manifest: Manifest, payload: bytearray) -> None:
        ada, bob = manifest.encryption.shares
        bob.update_digest = ada.update_digest

    with pytest.raises(NotTheFold, match="update of site01 cannot be folded"):
        controller.verified(controller.rewrite(repeat))


@pytest.mark.parametrize("public", [PUBLIC, JOINT])
def test_a_model_that_was_changed_after_the_fold_is_found_out(
    tmp_path: Path, public: PublicPart
) -> None:
    """As one would be that was made to read shares of the key off."""
    controller = Controller(tmp_path, 2, public)
    controller.fold()

    def flip(manifest: Manifest, payload: bytearray) -> None:
        payload[-1] ^= 1

    with pytest.raises(NotTheFold, match="something else"):
        controller.verified(controller.rewrite(flip))


def test_a_model_that_names_no_update_is_not_believed(tmp_path: Path) -> None:
    controller = Controller(tmp_path, 2)
    controller.fold()

    def forget(manifest: Manifest, payload: bytearray) -> None:
        manifest.encryption.ClearField("shares")

    with pytest.raises(NotTheFold, match="names no update"):
        controller.verified(controller.rewrite(forget))


def test_an_update_that_is_not_offered_cannot_be_verified(tmp_path: Path) -> None:
    controller = Controller(tmp_path, 2)
    digest = controller.fold()
    del controller.offered[controller.updates[1].digest]
    with pytest.raises(DownloadRefused, match=controller.updates[1].digest.hex()):
        controller.verified(digest)


@pytest.mark.parametrize(
    ("public", "other", "exponents"),
    [
        (PUBLIC, PUBLIC, [0, 4]),
        (PUBLIC, public_part(min_contributors=1), [0, 3]),
        (JOINT, JOINT, [0, 4]),
        (JOINT, replace(JOINT, min_contributors=1), [0, 3]),
        (JOINT, replace(JOINT, site_names=""), [0, 3]),
    ],
)
def test_an_update_of_another_form_is_named(
    tmp_path: Path, public: PublicPart, other: PublicPart, exponents: list[int]
) -> None:
    controller = Controller(tmp_path, 2, public)
    digest = controller.fold()
    update(tmp_path / "other", 9, other, exponents)
    controller.offered[controller.updates[1].digest] = tmp_path / "other"
    with pytest.raises(NotTheFold, match="update of site01 has other tensors"):
        controller.verified(digest)


def test_a_plain_update_or_model_is_not_believed(tmp_path: Path) -> None:
    controller = Controller(tmp_path, 2)
    digest = controller.fold()
    plain = write_model(tmp_path / "plain", TENSORS)
    controller.offered[controller.updates[0].digest] = tmp_path / "plain"
    with pytest.raises(NotTheFold, match="update of site00 has other tensors"):
        controller.verified(digest)
    (tmp_path / "the.model").write_bytes((tmp_path / "plain").read_bytes())
    with pytest.raises(NotTheFold, match="the model is plain"):
        controller.verified(plain)


def test_an_update_with_a_damaged_block_is_named(tmp_path: Path) -> None:
    controller = Controller(tmp_path, 2)
    digest = controller.fold()
    path = controller.updates[1].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(NotTheFold, match="update of site01 cannot be folded"):
        controller.verified(digest)
