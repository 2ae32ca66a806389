"""The sum of encrypted updates: exact to the limb, and the same file at each attempt."""

from __future__ import annotations

import errno
import os
import resource
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from example_key import PUBLIC
from hypothesis import given, settings
from hypothesis import strategies as st
from random_updates import (
    BLOCK_VALUES,
    EXPONENTS,
    RING,
    TENSORS,
    key_of,
    limbs_of,
    update_manifest,
    write_update,
)

from metisfl.controller.effects import Contribution, Fold
from metisfl.controller.encrypted_fold import (
    EncryptedUpdate,
    UnusableUpdate,
    context_of,
    fold_encrypted,
    terms_of,
)
from metisfl.controller.folding import fold_round
from metisfl.controller.room import NoRoom
from metisfl.controller.spool import Spool
from metisfl.controller.state import Terms
from metisfl.controller.store import ModelStore
from metisfl.proto import ckks
from metisfl.proto.chunk import chunk_count
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.model_file import open_model
from metisfl.proto.model_pb2 import Manifest, Share
from metisfl.proto.tensors import Tensor, parse_manifest

CONTEXT = context_of(PUBLIC)
FORWARDED = ckks.SEEDS_FORWARDED
PAYLOAD = 4096  # where it begins in the files here


def updates_in(
    folder: Path,
    count: int,
    manifest: Manifest | None = None,
    public: PublicPart = PUBLIC,
) -> list[EncryptedUpdate]:
    found = []
    for number in range(count):
        path = folder / f"site{number:02}.update"
        digest = write_update(path, number, manifest, public)
        found.append(EncryptedUpdate(path, path.stem, 0.5 + number, digest))
    return found


def spoil(path: Path, place: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


# ---- What the sum is ----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 9, FORWARDED, FORWARDED + 1])
def test_each_limb_is_the_sum_of_the_updates_limbs(tmp_path: Path, count: int) -> None:
    updates = updates_in(tmp_path, count)
    fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    found = list(limbs_of(tmp_path / "sum"))
    wanted = zip(*(limbs_of(update.path) for update in updates), strict=True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.array_equal(ours, np.sum(theirs, axis=0) % np.uint64(PUBLIC.modulus))
    assert len(found) == 2


@pytest.mark.parametrize("profile", ckks.PROFILES)
def test_the_sum_is_exact_for_every_size_of_limbs(tmp_path: Path, profile: str) -> None:
    public = key_of(profile)
    manifest = update_manifest(public)
    updates = updates_in(tmp_path, 3, manifest, public)
    fold_encrypted(updates, context_of(public), tmp_path / "sum")
    wanted = zip(*(limbs_of(update.path, public) for update in updates), strict=True)
    for ours, theirs in zip(limbs_of(tmp_path / "sum", public), wanted, strict=True):
        assert np.array_equal(ours, np.sum(theirs, axis=0) % np.uint64(public.modulus))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 3 * RING), min_size=1, max_size=3), st.integers(1, 4))
def test_models_of_any_size_are_folded(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], count: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    tensors = [Tensor(f"t{i}", np.zeros(n, np.float16), True) for i, n in enumerate(sizes)]
    manifest = update_manifest(tensors=tensors, exponents=range(len(sizes)))
    updates = updates_in(folder, count, manifest)
    fold_encrypted(updates, CONTEXT, folder / "sum")
    wanted = zip(*(limbs_of(update.path) for update in updates), strict=True)
    for ours, theirs in zip(limbs_of(folder / "sum"), wanted, strict=True):
        assert np.array_equal(ours, np.sum(theirs, axis=0) % np.uint64(PUBLIC.modulus))


def test_a_model_without_floats_has_nothing_to_fold_and_is_a_model_all_the_same(
    tmp_path: Path,
) -> None:
    manifest = update_manifest(tensors=TENSORS[1:2], exponents=())
    fold_encrypted(updates_in(tmp_path, 2, manifest), CONTEXT, tmp_path / "sum")
    with open_model(tmp_path / "sum") as made:
        assert made.payload_bytes == 0
        assert len(made.manifest.encryption.shares) == 2


# ---- What its manifest says ----------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "polynomials", "seeds"),
    [(1, 1, 1), (3, 1, 3), (FORWARDED, 1, FORWARDED), (FORWARDED + 1, 2, 0)],
)
def test_seeds_are_forwarded_of_few_updates_and_both_polynomials_of_many(
    tmp_path: Path, count: int, polynomials: int, seeds: int
) -> None:
    updates = updates_in(tmp_path, count)
    digest = fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    with open_model(tmp_path / "sum") as made:
        assert made.digest() == digest
        assert parse_manifest(made.manifest_bytes) == made.manifest
        form, update = made.manifest.encryption, update_manifest().encryption
        payload = made.pread(0, made.payload_bytes)
    assert (form.polynomials, form.seeds) == (polynomials, seeds)
    assert list(form.exponents) == list(update.exponents) == list(EXPONENTS)
    assert (form.fingerprint, form.limb_bits) == (PUBLIC.fingerprint, PUBLIC.limb_bits)
    carried = [payload[64 + 20 * number :][:16] for number in range(seeds)]
    assert carried == [each.path.read_bytes()[PAYLOAD + 64 :][:16] for each in updates[:seeds]]
    size = ckks.bytes_per_parameter(44, polynomials, seeds) * BLOCK_VALUES
    assert size / BLOCK_VALUES < (5.6 if polynomials == 1 else 11.2), "what a learner fetches"


def test_the_manifest_says_whose_updates_are_in_the_sum_with_which_weight(tmp_path: Path) -> None:
    updates = updates_in(tmp_path, 3)
    fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    with open_model(tmp_path / "sum") as made:
        assert list(made.manifest.encryption.shares) == [
            Share(learner=each.learner, weight=each.weight, update_digest=each.digest)
            for each in updates
        ]
        assert [spec.name for spec in made.manifest.tensors] == ["w", "steps", "b"]


@pytest.mark.parametrize("count", [3, FORWARDED + 1])
def test_a_fold_that_is_repeated_makes_the_same_file(tmp_path: Path, count: int) -> None:
    """A controller that was killed folds anew; what it says then is what it would have said."""
    updates = updates_in(tmp_path, count)
    first = fold_encrypted(updates, CONTEXT, tmp_path / "first")
    (tmp_path / "second.partial").write_bytes(b"what a killed process left")
    assert fold_encrypted(updates, CONTEXT, tmp_path / "second") == first
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()


def test_an_update_is_asked_for_in_the_seeded_form_with_the_rounds_exponents() -> None:
    form = PUBLIC.update_form([5, 0, 7])
    assert (form.polynomials, form.seeds, list(form.exponents)) == (1, 1, [5, 0, 7])
    assert (form.fingerprint, form.ring_dimension) == (PUBLIC.fingerprint, RING)
    assert not form.shares, "an update is nobody's but its sender's"


def test_a_round_is_held_to_what_the_key_allows() -> None:
    assert terms_of(PUBLIC) == Terms(10, 2, 0.95)
    assert terms_of(None) is None


# ---- What cannot be folded -------------------------------------------------------------


SECOND_BLOCK = PAYLOAD + 64 + 20 + 11 * RING * 44 // 8


@pytest.mark.parametrize(
    ("position", "place"),
    [
        (0, PAYLOAD),  # the magic
        (2, PAYLOAD + 8),  # the fingerprint
        (1, PAYLOAD + 70),  # the seed
        (11, PAYLOAD + 64 + 20),  # a limb; of one of the second eight
        (3, SECOND_BLOCK + 40),  # the index
        (9, -1),  # the last limb
    ],
)
def test_an_update_that_its_disk_has_spoilt_is_named_and_nothing_is_written(
    tmp_path: Path, position: int, place: int
) -> None:
    updates = updates_in(tmp_path, 12)
    spoil(updates[position].path, place)
    with pytest.raises(UnusableUpdate) as unusable:
        fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    assert unusable.value.position == position
    assert not list(tmp_path.glob("sum*"))
    del updates[position]
    fold_encrypted(updates, CONTEXT, tmp_path / "sum")


def test_an_update_whose_manifest_was_spoilt_is_named_too(tmp_path: Path) -> None:
    for position in (0, 2):
        updates = updates_in(tmp_path, 3)
        content = updates[position].path.read_bytes()
        spoil(updates[position].path, content.index(PUBLIC.fingerprint))
        with pytest.raises(UnusableUpdate, match="has changed") as unusable:
            fold_encrypted(updates, CONTEXT, tmp_path / "sum")
        assert unusable.value.position == position


def test_a_file_that_was_cut_or_is_gone_is_left_out_too(tmp_path: Path) -> None:
    updates = updates_in(tmp_path, 3)
    os.truncate(updates[1].path, 100_000)
    with pytest.raises(UnusableUpdate, match="100000 bytes where") as unusable:
        fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    assert unusable.value.position == 1
    updates[0].path.unlink()
    with pytest.raises(UnusableUpdate, match="gone") as unusable:
        fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    assert unusable.value.position == 0
    assert not list(tmp_path.glob("sum*"))


@pytest.mark.parametrize("count", [2, FORWARDED + 1])
def test_an_update_that_is_there_twice_is_not_counted_twice(tmp_path: Path, count: int) -> None:
    """A site that sends what another one sent would bring out its difference to the rest."""
    updates = updates_in(tmp_path, count)
    updates[-1].path.write_bytes(updates[0].path.read_bytes())
    with pytest.raises(UnusableUpdate) as unusable:
        fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    assert unusable.value.position == count - 1


def test_memory_does_not_grow_with_models_or_learners(tmp_path: Path) -> None:
    large = [Tensor("w", np.zeros(1_000_000, np.float16), True)]
    updates = updates_in(tmp_path, 20, update_manifest(tensors=large, exponents=(0,)))
    (tmp_path / "small").mkdir()
    small = updates_in(tmp_path / "small", 16)
    fold_encrypted(small, CONTEXT, tmp_path / "sum")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fold_encrypted(updates, CONTEXT, tmp_path / "sum")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 8 * 1024, f"20 updates of 5.5 MB cost {grown_kib} KiB more"
    peaks = []
    for some in (small[:8], small[:16], updates[:16]):
        tracemalloc.start()
        fold_encrypted(some, CONTEXT, tmp_path / "sum")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1.2 * peaks[0], peaks


# ---- A round ------------------------------------------------------------------------------


def a_round(folder: Path, number: int, weights: Sequence[float]) -> tuple[Fold, ModelStore, Spool]:
    spool, store = Spool(folder / "spool", contexts=[CONTEXT]), ModelStore(folder / "models")
    contributions = []
    for position, weight in enumerate(weights):
        learner = f"site{position}"
        task_id = f"r.{number}.train.{learner}"
        digest = write_update(spool.update_path(task_id), position)
        contributions.append(Contribution(learner, task_id, digest, weight))
    fold = Fold("key", "r", number, b"", tuple(contributions), 25.0, EXPONENTS)
    return fold, store, spool


@pytest.mark.parametrize(
    ("number", "examples", "weights"), [(1, (10.0, 40.0), [0.4, 1.6]), (0, (1.0,), [1.0])]
)
def test_a_round_becomes_a_model_with_the_weights_that_its_learners_used(
    tmp_path: Path, number: int, examples: tuple[float, ...], weights: list[float]
) -> None:
    fold, store, spool = a_round(tmp_path, number, examples)
    digest = fold_round(fold, store, spool, PUBLIC)
    store.verify(digest)
    with store.open(digest) as made:
        assert [share.weight for share in made.manifest.encryption.shares] == weights
        assert chunk_count(made.manifest) == 2
    assert len(list(store.folder.iterdir())) == 1


def test_a_full_disk_is_this_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold, store, spool = a_round(tmp_path, 1, (10.0, 40.0))
    payload = spool.update_path(fold.contributions[0].task_id).stat().st_size
    small = ModelStore(tmp_path / "small", limit_bytes=2 * payload - 1)
    with pytest.raises(NoRoom, match=r"limit is .*--models-limit"):
        fold_round(fold, small, spool, PUBLIC)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoRoom, match="No space left"):
        fold_round(fold, store, spool, PUBLIC)
    monkeypatch.undo()
    assert list(store.folder.iterdir()) == []
