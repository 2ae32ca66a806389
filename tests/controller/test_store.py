"""A model is in the store completely, or not at all, and under no name but its digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metisfl.controller.store import ModelStore
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor


def a_model(path: Path, fill: float) -> bytes:
    return write_model(path, [Tensor("w", np.full(10, fill, np.float32), trainable=True)])


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


def put(store: ModelStore, fill: float) -> bytes:
    draft = store.draft(5000)
    return store.put(draft, a_model(draft, fill))


def test_a_model_is_found_under_its_digest(store: ModelStore) -> None:
    digest = put(store, 1.0)
    assert store.contains(digest)
    assert store.path(digest).name == f"{digest.hex()}.model"
    with store.open(digest) as model:
        assert model.digest() == digest
    assert store.digests() == [digest]
    store.verify(digest)


def test_putting_computes_the_digest_when_nobody_knows_it(store: ModelStore) -> None:
    draft = store.draft(5000)
    digest = a_model(draft, 2.0)
    assert store.put(draft) == digest
    assert not draft.exists()


def test_the_same_model_twice_is_one_file(store: ModelStore) -> None:
    assert put(store, 1.0) == put(store, 1.0)
    assert len(store.digests()) == 1


def test_what_is_not_there_is_said_by_name(store: ModelStore) -> None:
    assert not store.contains(bytes(32))
    assert not store.contains(b"too short")
    with pytest.raises(MachineError, match="no model 0000"):
        store.open(bytes(32))


def test_a_draft_that_is_no_model_file_is_not_taken(store: ModelStore) -> None:
    draft = store.draft(10)
    draft.write_bytes(b"not a model")
    with pytest.raises(MachineError, match="is not a model file"):
        store.put(draft)
    assert store.digests() == []


def test_a_damaged_model_is_found_by_verifying(store: ModelStore) -> None:
    digest = put(store, 1.0)
    data = bytearray(store.path(digest).read_bytes())
    data[-1] ^= 1
    store.path(digest).write_bytes(data)
    with pytest.raises(MachineError, match="is damaged: its content has the digest"):
        store.verify(digest)


def test_keeping_a_list_deletes_the_rest(store: ModelStore) -> None:
    first, second, third = (put(store, fill) for fill in (1.0, 2.0, 3.0))
    assert set(store.keep([second])) == {first, third}
    assert store.digests() == [second]
    store.delete(second)
    store.delete(second)
    assert store.digests() == []


def test_a_deleted_model_stays_readable_for_who_has_it_open(store: ModelStore) -> None:
    digest = put(store, 1.0)
    with store.open(digest) as model:
        store.delete(digest)
        assert model.digest() == digest


def test_drafts_of_a_killed_process_are_removed_at_the_next_start(store: ModelStore) -> None:
    digest = put(store, 1.0)
    draft = store.draft(5000)
    draft.write_bytes(b"half a mod")
    (store.folder / (draft.name + ".partial")).write_bytes(b"half a mod")
    again = ModelStore(store.folder)
    assert [path.name for path in store.folder.iterdir()] == [f"{digest.hex()}.model"]
    assert again.contains(digest)


def test_a_model_above_the_limit_is_refused_before_it_is_written(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, limit_bytes=9_000)
    put(store, 1.0)
    with pytest.raises(MachineError, match=r"4136 bytes used, 5000 more .* the limit is 9000"):
        store.draft(5_000)


def test_a_disk_without_room_is_said_before_anything_is_written(store: ModelStore) -> None:
    with pytest.raises(MachineError, match=r"no space left on device: .* bytes are free"):
        store.draft(1 << 60)


def test_a_folder_that_cannot_be_made_is_the_machines_error(tmp_path: Path) -> None:
    (tmp_path / "models").write_bytes(b"a file")
    with pytest.raises(MachineError, match="model store"):
        ModelStore(tmp_path / "models")
