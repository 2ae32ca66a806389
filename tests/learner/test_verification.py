"""A model that is not the fold of the updates that it names is found out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from example_key import public_part

from metisfl.controller.encrypted_fold import EncryptedUpdate, fold_encrypted
from metisfl.learner.transfer import DownloadRefused
from metisfl.learner.verification import NotTheFold, verify
from metisfl.native_c.ckks import Context, block_bytes, seal_block
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.model_file import ModelWriter, open_model, write_model
from metisfl.proto.model_pb2 import Encryption, Manifest
from metisfl.proto.tensors import (
    Tensor,
    encrypted_manifest,
    encrypted_values,
    manifest_of,
    serialise_manifest,
)

PUBLIC = public_part()
CONTEXT = Context(PUBLIC.fingerprint, PUBLIC.limb_bits, PUBLIC.ring_dimension, PUBLIC.modulus)
VALUES = 13 * 2048 + 5  # two blocks
TENSORS = [
    Tensor("w", np.zeros(VALUES - 5, np.float32), True),
    Tensor("steps", np.zeros(3, np.int64), False),
    Tensor("b", np.zeros(5, np.float32), True),
]


def update(path: Path, seed: int, **form: Any) -> bytes:
    """An update of random limbs: nobody can tell it from an encryption. Returns its digest."""
    rng = np.random.default_rng(seed)
    given: dict[str, Any] = {
        "fingerprint": PUBLIC.fingerprint,
        "limb_bits": PUBLIC.limb_bits,
        "ring_dimension": PUBLIC.ring_dimension,
        "polynomials": 1,
        "seeds": 1,
        "exponents": [0, 3],
    }
    manifest = encrypted_manifest(manifest_of(TENSORS), Encryption(**{**given, **form}))
    ciphertexts = ckks.ciphertexts(encrypted_values(manifest), PUBLIC.ring_dimension)
    full = CONTEXT.block_ciphertexts
    count = -(-ciphertexts // full)
    with ModelWriter(path, serialise_manifest(manifest)) as writer:
        for index in range(count):
            inside = min(full, ciphertexts - index * full)
            block = bytearray(block_bytes(CONTEXT, inside, 1, 1))
            seal_block(
                CONTEXT,
                index=index,
                count=count,
                exponents_digest=exponents_of(manifest),
                c0=rng.integers(0, PUBLIC.modulus, (inside, PUBLIC.ring_dimension), np.uint64),
                seed=rng.bytes(16),
                out=block,
            )
            writer.append(block)
        return writer.commit(sync=False)


class Controller:
    """Offers updates by digest, as the bulk endpoint does; `offered` may be tampered with."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.offered: dict[bytes, Path] = {}
        self.updates = []
        for number in range(count):
            path = folder / f"site{number:02}.update"
            digest = update(path, number)
            self.offered[digest] = path
            self.updates.append(EncryptedUpdate(path, path.stem, 1.0, digest))

    def fold(self, updates: Sequence[EncryptedUpdate] | None = None) -> bytes:
        """Write the model; return its digest."""
        return fold_encrypted(updates or self.updates, CONTEXT, self.folder / "the.model")

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
                    self.folder / "the.model", digest, cast(Any, self), PUBLIC, scratch, told.append
                )
            )
        finally:
            assert not scratch.exists()
        return told


@pytest.mark.parametrize("count", [1, 3, ckks.SEEDS_FORWARDED + 1])
def test_an_honest_fold_is_believed(tmp_path: Path, count: int) -> None:
    controller = Controller(tmp_path, count)
    told = controller.verified(controller.fold())
    assert told == sorted(told)
    assert len(told) > count
    assert all(0 <= fraction < 1 for fraction in told)


def test_a_fold_of_other_updates_than_it_names_is_found_out(tmp_path: Path) -> None:
    controller = Controller(tmp_path, 4)
    ada, bob, cyd, dan = controller.updates
    named_bob = EncryptedUpdate(dan.path, bob.learner, 1.0, bob.digest)
    with pytest.raises(NotTheFold, match="something else than the 3 updates"):
        controller.verified(controller.fold([ada, named_bob, cyd]))
    controller.verified(controller.fold([ada, bob, cyd]))


def test_an_update_that_is_in_it_twice_is_found_out(tmp_path: Path) -> None:
    """Else a controller could bring out one site's update by adding it again and again."""
    controller = Controller(tmp_path, 2)
    controller.fold()

    def repeat(manifest: Manifest, payload: bytearray) -> None:
        ada, bob = manifest.encryption.shares
        bob.update_digest = ada.update_digest

    with pytest.raises(NotTheFold, match="update of site01 cannot be folded"):
        controller.verified(controller.rewrite(repeat))


def test_a_model_that_was_changed_after_the_fold_is_found_out(tmp_path: Path) -> None:
    controller = Controller(tmp_path, 2)
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


@pytest.mark.parametrize("form", [{"exponents": [0, 4]}, {"fingerprint": b"g" * 16}])
def test_an_update_of_another_form_is_named(tmp_path: Path, form: dict[str, Any]) -> None:
    controller = Controller(tmp_path, 2)
    digest = controller.fold()
    update(tmp_path / "other", 9, **form)
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
