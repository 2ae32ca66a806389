"""All sites together open a model, exactly; what is not a model's partials opens nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joint_models import JointSites
from sealed_models import floats

from metisfl.controller.encrypted_fold import (
    EncryptedUpdate,
    UnusableUpdate,
    context_of,
    fold_encrypted,
)
from metisfl.native_c.ckks import BlockError, fold_payloads
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import ModelWriter, open_model
from metisfl.proto.model_pb2 import Manifest
from metisfl.proto.tensors import Tensor, serialise_manifest

RING = ckks.RING_DIMENSION
BLOCK_VALUES = ckks.block_ciphertexts(52, RING) * RING
MAKERS = {2: JointSites(("s0", "s1"), max_share=1.0), 3: JointSites(max_share=1.0)}
SIZES = st.sampled_from(
    [0, 1, 5, RING - 1, RING, RING + 1, BLOCK_VALUES - 1, BLOCK_VALUES, BLOCK_VALUES + 1]
)


@pytest.fixture(scope="module")
def sites() -> JointSites:
    return MAKERS[3]


class Opening:
    """A model of ada, bob and cyd in a folder, and the partials that open it."""

    def __init__(self, sites: JointSites, folder: Path, seed: int = 0, values: int = 30) -> None:
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(seed)
        models = [floats(random.uniform(-1, 1, values)) for _ in sites.cryptos]
        self.sites, self.folder, self.model = sites, folder, folder / "model"
        self.updates = sites.updates(folder, models)
        self.digest = sites.model(self.updates, self.model)
        self.partials = sites.partials(self.model, self.digest, self.updates)

    def opened(self, partials: Path, name: str = "ada") -> Path:
        return self.sites.opened(name, self.model, self.digest, partials)

    def partial(self, name: str = "ada", **more: Any) -> EncryptedUpdate:
        """Another one, as if there was none yet."""
        given = {one.learner: one.digest for one in self.updates}[name]
        return self.sites.partial(name, self.model, self.digest, **{"given": given, **more})

    def rewritten(self, source: Path, change: Callable[[Manifest], None]) -> Path:
        """The file with another manifest."""
        target = source.with_suffix(".changed")
        with open_model(source) as model:
            manifest = model.manifest
            change(manifest)
            with ModelWriter(target, serialise_manifest(manifest)) as writer:
                writer.append(model.pread(0, model.payload_bytes))
                writer.commit(sync=False)
        return target


@pytest.fixture
def opening(sites: JointSites, tmp_path: Path) -> Opening:
    return Opening(sites, tmp_path / "one")


def careless_fold(
    sites: JointSites,
    paths: Sequence[Path],
    weights: Sequence[int],
    target: Path,
    manifest: bytes = b"",
) -> None:
    """What a controller writes that looks at nothing itself, of models of one block."""
    with ExitStack() as files:
        models = [files.enter_context(open_model(path)) for path in paths]
        writer = files.enter_context(ModelWriter(target, manifest or models[0].manifest_bytes))
        fold_payloads(
            context_of(sites.public, partials=True),
            [model.read_payload_into for model in models],
            weights,
            ciphertexts=1,
            seeds=1,
            exponents_digest=exponents_of(models[0].manifest),
            polynomials=1,
            write=writer.append,
        )
        writer.commit(sync=False)


# ---- What is opened --------------------------------------------------------------


def check_mean(
    sites: JointSites, folder: Path, kinds: Sequence[tuple[str, int]], seed: int
) -> None:
    """Sites that seal, fold and open together have the weighted mean, and all the same bits."""
    random = np.random.default_rng(seed)
    count = len(sites.cryptos)
    weights = random.uniform(0.2, 1.0, count)
    weights *= count / weights.sum()
    models = [
        [
            Tensor(f"t{number}", random.uniform(-1, 1, size).astype(dtype), True)
            if dtype.startswith("float")
            else Tensor(f"t{number}", np.arange(size).astype(dtype), False)
            for number, (dtype, size) in enumerate(kinds)
        ]
        for _ in range(count)
    ]
    updates = sites.updates(folder, models, weights=weights.tolist())
    digest = sites.model(updates, folder / "model")
    made = sites.partials(folder / "model", digest, updates)
    added = sites.opening(made, folder / "partials")
    opened = [
        sites.opened(name, folder / "model", digest, added, others=lambda: models[0])
        for name in sites.cryptos
    ]
    assert len({path.read_bytes() for path in opened}) == 1, "all sites hold the same bits"
    with open_model(opened[0]) as plain:
        for tensor in plain.tensors():
            ours = [next(one.array for one in each if one.name == tensor.name) for each in models]
            if not tensor.dtype_name.startswith("float"):
                assert np.array_equal(tensor.array, ours[0])
                continue
            mean = np.average([one.astype(np.float64) for one in ours], axis=0, weights=weights)
            to_dtype = np.finfo(tensor.array.dtype).eps / 2
            assert np.abs(tensor.array - mean).max(initial=0) <= sites.public.error + to_dtype
    for path in folder.iterdir():
        path.unlink()


@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(["float32", "float64", "float16", "int64", "bool"]), SIZES),
        max_size=3,
    ),
    count=st.sampled_from([2, 3]),
    seed=st.integers(0, 2**32),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_all_sites_together_open_the_weighted_mean(
    tmp_path: Path, kinds: list[tuple[str, int]], count: int, seed: int
) -> None:
    check_mean(MAKERS[count], tmp_path, kinds, seed)


@pytest.mark.parametrize(
    "kinds",
    [
        [("float32", BLOCK_VALUES), ("int64", 3), ("float64", RING + 1)],
        [("int64", 3), ("bool", 1)],
        [],
    ],
)
def test_eight_sites_open_models_across_blocks_and_without_floats(
    tmp_path: Path, kinds: list[tuple[str, int]]
) -> None:
    check_mean(JointSites([f"s{number}" for number in range(8)]), tmp_path, kinds, 8)


def test_a_site_that_gave_no_update_helps_to_open(sites: JointSites, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    models = [floats(random.uniform(-1, 1, 40)) for _ in range(2)]
    updates = sites.updates(tmp_path, models)
    digest = sites.model(updates, tmp_path / "model")
    added = sites.opening(
        sites.partials(tmp_path / "model", digest, updates), tmp_path / "partials"
    )
    with open_model(sites.opened("cyd", tmp_path / "model", digest, added)) as plain:
        mean = (models[0][0].array + models[1][0].array) / 2
        assert np.abs(plain.tensors()[0].array - mean).max() <= sites.public.error


# ---- What opens nothing -----------------------------------------------------------


def test_partials_of_another_model_open_nothing(sites: JointSites, tmp_path: Path) -> None:
    one, other = (Opening(sites, tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    added = sites.opening(other.partials, tmp_path / "partials")
    with pytest.raises(PeerError, match=f"opens is {other.digest.hex()}.*be {one.digest.hex()}"):
        one.opened(added)

    def claim(manifest: Manifest) -> None:
        manifest.encryption.opens = one.digest

    claimed = other.rewritten(added, claim)
    with pytest.raises(PeerError, match="block 0 of the model is not as its manifest says"):
        one.opened(claimed)


def test_partials_of_two_models_do_not_fold(sites: JointSites, tmp_path: Path) -> None:
    one, other = (Opening(sites, tmp_path / name, seed) for seed, name in enumerate(("a", "b")))
    with pytest.raises(BlockError):
        careless_fold(
            sites, [one.partials[0].path, other.partials[1].path], [1, 1], tmp_path / "partials"
        )


def test_the_same_partial_twice_is_found_by_the_fold(opening: Opening) -> None:
    ada, bob, _ = opening.partials
    twice = replace(ada, learner="cyd")
    with pytest.raises(UnusableUpdate, match="seed") as raised:
        opening.sites.opening([ada, bob, twice], opening.folder / "partials")
    assert raised.value.position == 2


def test_partials_without_one_site_open_nothing(opening: Opening) -> None:
    two = opening.sites.opening(opening.partials[:2], opening.folder / "partials")
    with pytest.raises(
        PeerError, match="those of ada, bob; the sites of the key are ada, bob, cyd"
    ):
        opening.opened(two)

    def invent(manifest: Manifest) -> None:
        manifest.encryption.shares.add(learner="cyd", weight=1.0, update_digest=bytes(32))

    with pytest.raises(PeerError, match="the partials of 2 sites; the key has 3, and all have to"):
        opening.opened(opening.rewritten(two, invent))


def test_a_site_that_is_named_twice_is_refused(opening: Opening) -> None:
    added = opening.sites.opening(opening.partials, opening.folder / "partials")

    def repeat(manifest: Manifest) -> None:
        manifest.encryption.shares[2].learner = "bob"

    with pytest.raises(PeerError, match="shares must name each learner once"):
        opening.opened(opening.rewritten(added, repeat))


def test_a_weighted_partial_is_refused(opening: Opening) -> None:
    honest = opening.sites.opening(opening.partials, opening.folder / "partials")
    target = opening.folder / "weighted"
    with open_model(honest) as fold:
        named = fold.manifest_bytes
    paths = [one.path for one in opening.partials]
    careless_fold(opening.sites, paths, [1, 2, 1], target, named)
    with pytest.raises(PeerError, match="a partial was added 2 times; it may be once"):
        opening.opened(target)


def test_an_update_is_no_partial_and_a_partial_is_no_update(opening: Opening) -> None:
    public = opening.sites.public
    for files, partials in ((opening.updates, True), (opening.partials, False)):
        with pytest.raises(UnusableUpdate, match="key"):
            fold_encrypted(files, context_of(public, partials=partials), opening.folder / "wrong")
    with pytest.raises(PeerError, match=f"fingerprint is {public.fingerprint.hex()}; it must be"):
        opening.opened(opening.model)
    added = opening.sites.opening(opening.partials, opening.folder / "partials")
    with pytest.raises(PeerError, match="the model is encrypted with the key"):
        opening.sites.opened("ada", added, opening.digest, added)


# ---- The file -----------------------------------------------------------------------


def test_it_is_on_disk_for_good_when_it_is_made(
    opening: Opening, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could make it lost, and another one of the same model would be asked for."""
    synced: list[int] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    made = opening.partial()
    assert made.path.stat().st_ino in synced
    with open_model(made.path) as partial:
        assert partial.digest() == made.digest


def ended(_: float) -> None:
    raise InterruptedError


def test_a_partial_that_fails_leaves_no_file(
    sites: JointSites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = Opening(sites, tmp_path / "one", values=BLOCK_VALUES + 1)
    opening.partials[0].path.unlink()
    before = sorted(opening.folder.iterdir())
    with pytest.raises(InterruptedError):
        opening.partial(progress=ended)
    data = bytearray(opening.model.read_bytes())
    data[-1] ^= 1
    opening.model.write_bytes(data)
    with pytest.raises(MachineError, match=r"is damaged in block 1: .*; delete it and fetch it"):
        opening.partial()
    data[-1] ^= 1
    opening.model.write_bytes(data)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            opening.partial()
    assert sorted(opening.folder.iterdir()) == before
    opening.partial()


def test_two_partials_of_one_model_have_nothing_in_common(opening: Opening) -> None:
    """Each block has its own nonce, and so another mask."""
    with open_model(opening.partials[0].path) as one:
        first = np.frombuffer(one.pread(0, one.payload_bytes), np.uint8)
    with open_model(opening.partial().path) as two:
        second = np.frombuffer(two.pread(0, two.payload_bytes), np.uint8)
    same = first[ckks.BLOCK_HEADER_BYTES :] == second[ckks.BLOCK_HEADER_BYTES :]
    assert same.mean() < 0.01
