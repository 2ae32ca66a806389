"""An update gets its name when it is complete, right and durable; a part goes on after a crash."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.controller import spool as module
from metisfl.controller.spool import Spool, StagedUpdate, UpdateRejected
from metisfl.native_c import crc32c
from metisfl.proto.bulk import Code
from metisfl.proto.chunk import CHUNK_BYTES, ChunkHeader, chunk_extent, describe_chunk
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.tensors import Tensor

CHUNKS_A_SYNC = module.SYNC_BYTES // CHUNK_BYTES


def model_of(path: Path, *tensors: np.ndarray) -> ModelFile:
    named = [Tensor(f"t{i}", array, trainable=True) for i, array in enumerate(tensors)]
    write_model(path, named)
    return open_model(path)


def random_model(path: Path, chunks: float) -> ModelFile:
    values = np.random.default_rng(7).standard_normal(int(chunks * CHUNK_BYTES / 4))
    return model_of(path, values.astype(np.float32))


def chunk_of(model: ModelFile, index: int) -> tuple[ChunkHeader, bytes]:
    start, stop = chunk_extent(index, model.manifest)
    payload = model.pread(start, stop - start)
    none = bytes(16)
    header = describe_chunk(
        model.manifest,
        index,
        payload,
        federation=none,
        manifest_digest=none,
        subject=none,
        crc32c=crc32c,
    )
    return header, payload


def feed(staged: StagedUpdate, model: ModelFile, until: int | None = None) -> None:
    for index in range(staged.received, staged.count if until is None else until):
        header, payload = chunk_of(model, index)
        staged.check(header, payload)
        staged.write(payload)


def finish(staged: StagedUpdate) -> None:
    while not staged.catch_up():
        pass
    staged.commit()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ModelFile]:
    with random_model(tmp_path / "three.model", 2.5) as model:
        yield model


def test_an_update_becomes_a_model_file_under_its_tasks_name(
    spool: Spool, model: ModelFile
) -> None:
    staged = spool.begin("r.1.train.ada", model.digest(), model.manifest)
    feed(staged, model)
    assert not spool.is_stored("r.1.train.ada")
    finish(staged)
    assert spool.update_path("r.1.train.ada").read_bytes() == model.path.read_bytes()
    assert spool.stored() == ["r.1.train.ada"]
    assert [path.name for path in spool.folder.iterdir()] == ["r.1.train.ada.update"]


def test_a_small_update_costs_two_fsyncs(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync

    def counting(descriptor: int) -> None:
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", counting)
    monkeypatch.setattr(os, "fdatasync", counting)
    with random_model(tmp_path / "small.model", 0.02) as model:
        synced.clear()
        staged = spool.begin("small", model.digest(), model.manifest)
        feed(staged, model)
        finish(staged)
    assert len(synced) == 2, "one for the file, one for its name"


def test_an_empty_update_is_stored_too(spool: Spool, tmp_path: Path) -> None:
    with model_of(tmp_path / "empty.model", np.empty((0, 3), np.float32)) as model:
        staged = spool.begin("empty", model.digest(), model.manifest)
        assert staged.complete
        finish(staged)
    with spool.open("empty") as update:
        assert update.payload_bytes == 0


@pytest.mark.parametrize(
    ("array", "bad"),
    [
        (np.zeros(100, np.float32), np.nan),
        (np.zeros(100, np.float64), -np.inf),
        (np.zeros(100, np.float16), np.inf),
        (np.zeros(100, ml_dtypes.bfloat16), np.nan),
    ],
)
def test_a_value_that_is_not_finite_is_refused_with_the_tensors_name(
    spool: Spool, tmp_path: Path, array: np.ndarray, bad: float
) -> None:
    array[41] = bad
    with model_of(tmp_path / "bad.model", np.ones(3, np.int64), array) as model:
        staged = spool.begin("bad", model.digest(), model.manifest)
        with pytest.raises(UpdateRejected, match="tensor 't1' holds NaN or infinity") as refused:
            feed(staged, model)
    assert refused.value.code is Code.NON_FINITE
    staged.discard()


def test_integers_may_hold_any_bits(spool: Spool, tmp_path: Path) -> None:
    with model_of(tmp_path / "ints.model", np.full(100, -1, np.int64)) as model:
        staged = spool.begin("ints", model.digest(), model.manifest)
        feed(staged, model)
        finish(staged)
    assert spool.is_stored("ints")


def test_a_chunk_that_contradicts_the_manifest_is_refused(spool: Spool, model: ModelFile) -> None:
    staged = spool.begin("t", model.digest(), model.manifest)
    _, payload = chunk_of(model, 0)
    header, _ = chunk_of(model, 2)
    with pytest.raises(UpdateRejected, match="has 131072 bytes and 32768 values; the manifest"):
        staged.check(header, payload)
    staged.discard()


def test_content_with_another_digest_than_announced_is_refused(
    spool: Spool, model: ModelFile
) -> None:
    staged = spool.begin("t", b"x" * 32, model.manifest)
    feed(staged, model)
    with pytest.raises(UpdateRejected, match=r"7878.* was announced") as refused:
        finish(staged)
    assert refused.value.code is Code.DIGEST_MISMATCH
    staged.discard()
    assert list(spool.folder.iterdir()) == []


def test_a_part_goes_on_where_it_was_noted(spool: Spool, model: ModelFile) -> None:
    staged = spool.begin("t", model.digest(), model.manifest)
    feed(staged, model, until=2)
    staged.note()
    staged.close()
    again = Spool(spool.folder).begin("t", model.digest(), model.manifest)
    assert (again.received, again.resumed, again.hashed) == (2, True, False)
    feed(again, model)
    finish(again)
    assert spool.update_path("t").read_bytes() == model.path.read_bytes()


def test_a_killed_process_loses_at_most_what_followed_the_last_sync(
    spool: Spool, tmp_path: Path
) -> None:
    with random_model(tmp_path / "big.model", 2 * CHUNKS_A_SYNC + 4) as model:
        staged = spool.begin("t", model.digest(), model.manifest)
        feed(staged, model, until=2 * CHUNKS_A_SYNC - 1)
        staged.close()  # as the kernel does it: without a note
        again = spool.begin("t", model.digest(), model.manifest)
        assert again.received == CHUNKS_A_SYNC
        feed(again, model)
        finish(again)
        assert spool.update_path("t").read_bytes() == model.path.read_bytes()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.booleans(), st.integers(0, 59))
def test_the_newer_note_counts_and_a_torn_one_leaves_the_other(
    tmp_path_factory: pytest.TempPathFactory, notes: int, torn: bool, place: int
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    with random_model(folder / "m.model", 3.5) as model:
        spool = Spool(folder / "spool")
        staged = spool.begin("t", model.digest(), model.manifest)
        for until in range(1, notes + 1):
            feed(staged, model, until=until)
            staged.note()
        staged.close()
        newest = (notes - 1) % 2
        if torn:
            with open(staged.path, "r+b") as part:
                part.seek(staged.file_bytes + newest * module.NOTE_BYTES + place)
                byte = part.read(1)[0]
                part.seek(-1, os.SEEK_CUR)
                part.write(bytes([byte ^ 1]))
        again = spool.begin("t", model.digest(), model.manifest)
        assert again.received == (notes - 1 if torn else notes)
        again.discard()


def test_a_part_of_another_update_is_not_gone_on_with(
    spool: Spool, model: ModelFile, tmp_path: Path
) -> None:
    staged = spool.begin("t", b"x" * 32, model.manifest)
    feed(staged, model, until=2)
    staged.note()
    staged.close()
    again = spool.begin("t", model.digest(), model.manifest)
    assert not again.resumed, "it holds chunks of what has another digest"
    feed(again, model, until=1)
    again.note()
    again.close()
    with random_model(tmp_path / "other.model", 3.5) as other:
        another = spool.begin("t", model.digest(), other.manifest)
    assert not another.resumed, "it holds chunks of what has another manifest"
    another.discard()


def test_only_what_is_named_is_kept(spool: Spool, model: ModelFile) -> None:
    for task in ("a", "b", "c"):
        staged = spool.begin(task, model.digest(), model.manifest)
        if task != "c":
            feed(staged, model)
            finish(staged)
        staged.close()
    assert spool.keep(["b"]) == ["a"]
    spool.keep_parts([])
    assert sorted(path.name for path in spool.folder.iterdir()) == ["b.update"]
    spool.discard("b")
    spool.discard("b")
    with pytest.raises(MachineError, match="no update for task b"):
        spool.open("b")


@pytest.mark.parametrize("task_id", ["", "../etc", ".hidden", "a/b", "x" * 201, "a\nb"])
def test_a_task_id_that_cannot_name_a_file_is_a_defect(spool: Spool, task_id: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        spool.update_path(task_id)


def test_an_update_without_room_is_refused_and_leaves_nothing(
    spool: Spool, model: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MachineError, match="No space left on device"):
        spool.begin("t", model.digest(), model.manifest)
    assert list(spool.folder.iterdir()) == []


def test_the_reserve_of_the_disk_is_not_touched(tmp_path: Path, model: ModelFile) -> None:
    spool = Spool(tmp_path / "spool", reserve_bytes=1 << 60)
    with pytest.raises(MachineError, match="stay in reserve"):
        spool.begin("t", model.digest(), model.manifest)


def test_an_update_larger_than_any_may_be_is_refused(tmp_path: Path, model: ModelFile) -> None:
    spool = Spool(tmp_path / "spool", update_bytes_max=1000)
    with pytest.raises(
        UpdateRejected, match="655360 bytes; this controller takes up to 1000"
    ) as no:
        spool.begin("t", model.digest(), model.manifest)
    assert no.value.code is Code.TOO_LARGE
    assert list(spool.folder.iterdir()) == []


LIMITED = """
import resource, signal, sys
from pathlib import Path
from metisfl.controller.spool import Spool
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import open_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
model = open_model(Path(sys.argv[1]))
try:
    Spool(Path(sys.argv[2])).begin("t", model.digest(), model.manifest)
except MachineError as error:
    print(error)
"""


def test_a_real_limit_of_the_system_is_found_before_the_first_chunk(
    spool: Spool, model: ModelFile
) -> None:
    command = [sys.executable, "-I", "-c", LIMITED, model.path, spool.folder, "100000"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "File too large" in said.stdout, said
    assert list(spool.folder.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
