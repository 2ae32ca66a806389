"""A part file goes on where it was, and becomes the model only if it is the model."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from metisfl.learner.part import PartFile
from metisfl.proto.chunk import CHUNK_BYTES, chunk_extent
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.tensors import Tensor


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    values = np.random.default_rng(5).standard_normal(CHUNK_BYTES).astype(np.float16)
    values = np.concatenate([values, values[:1000]])
    write_model(tmp_path / "original", [Tensor("w", values, trainable=True)])
    with open_model(tmp_path / "original") as model:
        data = model.pread(0, model.payload_bytes)
        model.pread = lambda offset, count: data[offset : offset + count]  # type: ignore[method-assign]
    return model


def feed(part: PartFile, model: ModelFile, until: int) -> None:
    for index in range(part.received, until):
        start, stop = chunk_extent(index, model.manifest)
        part.append(model.pread(start, stop - start))


def finish(part: PartFile) -> bool:
    while not part.catch_up():
        pass
    if not part.matches():
        return False
    part.publish()
    return True


def digest_of(path: Path) -> bytes:
    with open_model(path) as model:
        return model.digest()


def test_a_model_gets_its_name_when_it_is_complete(model: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "got.model"
    with PartFile(path, digest_of(model.path)) as part:
        assert not part.complete
        part.begin(model.manifest_bytes)
        feed(part, model, part.count)
        assert not path.exists()
        assert finish(part)
    assert path.read_bytes() == model.path.read_bytes()
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize("torn_bytes", [0, 1, CHUNK_BYTES - 1])
def test_an_interrupted_model_goes_on_at_the_first_missing_chunk(
    model: ModelFile, tmp_path: Path, torn_bytes: int
) -> None:
    path, digest = tmp_path / "got.model", digest_of(model.path)
    with PartFile(path, digest) as part:
        part.begin(model.manifest_bytes)
        feed(part, model, 1)
    (left,) = tmp_path.glob("*.part")
    with open(left, "ab") as file:
        file.write(bytes(torn_bytes))
    with PartFile(path, digest) as part:
        assert (part.received, part.resumed) == (1, True)
        part.begin(model.manifest_bytes)
        feed(part, model, part.count)
        assert finish(part)
    assert path.read_bytes() == model.path.read_bytes()


def test_a_complete_part_needs_nothing_more(model: ModelFile, tmp_path: Path) -> None:
    path, digest = tmp_path / "got.model", digest_of(model.path)
    with PartFile(path, digest) as part:
        part.begin(model.manifest_bytes)
        feed(part, model, part.count)
    with PartFile(path, digest) as part:
        assert part.complete
        assert finish(part)


def test_damaged_content_is_not_the_model(model: ModelFile, tmp_path: Path) -> None:
    path = tmp_path / "got.model"
    with PartFile(path, digest_of(model.path)) as part:
        part.begin(model.manifest_bytes)
        feed(part, model, 2)
        part.append(bytes(model.payload_bytes - 2 * CHUNK_BYTES))
        assert part.complete
        assert not finish(part)
        part.discard()
    assert not path.exists()
    assert list(tmp_path.glob("*.part")) == []


def test_chunks_of_a_model_with_another_manifest_are_dropped(
    model: ModelFile, tmp_path: Path
) -> None:
    write_model(tmp_path / "other", [Tensor("v", np.zeros(3, np.int8), trainable=False)])
    with open_model(tmp_path / "other") as other, PartFile(tmp_path / "x", bytes(32)) as part:
        part.begin(model.manifest_bytes)
        feed(part, model, 1)
        part.begin(other.manifest_bytes)
        assert (part.received, part.count) == (0, 1)


@pytest.mark.parametrize("left", [b"", b"METISMDL", b"garbage" * 1000])
def test_whatever_lies_there_is_overwritten(model: ModelFile, tmp_path: Path, left: bytes) -> None:
    path, digest = tmp_path / "got.model", digest_of(model.path)
    with PartFile(path, digest) as part:
        name = part._part
    name.write_bytes(left)
    with PartFile(path, digest) as part:
        assert not part.begun
        part.begin(model.manifest_bytes)
        feed(part, model, part.count)
        assert finish(part)


def test_a_manifest_that_is_none_is_the_peers_error(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x", bytes(32)) as part, pytest.raises(PeerError):
        part.begin(b"\xff")


def test_a_full_disk_is_the_machines_error(
    model: ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with PartFile(tmp_path / "x", bytes(32)) as part:
        part.begin(model.manifest_bytes)
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(MachineError, match="No space left on device"):
            feed(part, model, 1)


def test_a_folder_that_is_not_there_is_the_machines_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file"):
        PartFile(tmp_path / "nowhere" / "x", bytes(32))
