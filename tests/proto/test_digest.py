"""The running digest of a model is the digest of its file, however the bytes come."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.proto.digest import RunningDigest
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.tensors import Tensor


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digest") / "m.model"
    values = np.random.default_rng(4).standard_normal(300_000).astype(np.float64)
    write_model(path, [Tensor("w", values, trainable=True)])
    return path


def read_to_the_end(model: ModelFile, running: RunningDigest) -> int:
    slices = 1
    while not running.advance(model.payload_bytes):
        slices += 1
    return slices


def test_a_file_is_hashed_in_slices(path: Path) -> None:
    with open_model(path) as model:
        running = RunningDigest(model.fileno(), model.manifest_bytes)
        assert read_to_the_end(model, running) == 3, "2.4 MB in slices of a MiB"
        assert running.digest() == model.digest()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700_000)), max_size=12))
def test_bytes_at_hand_and_bytes_on_disk_give_one_digest(
    path: Path, steps: list[tuple[bool, int]]
) -> None:
    with open_model(path) as model:
        running = RunningDigest(model.fileno(), model.manifest_bytes)
        arrived = 0
        for at_hand, count in steps:
            data = model.pread(arrived, count)
            if at_hand:
                running.update(arrived, data)  # passed over while older bytes are not hashed
            arrived += len(data)
            running.advance(arrived if not at_hand else running.bytes_done)
            assert running.bytes_done <= arrived
        read_to_the_end(model, running)
        assert running.digest() == model.digest()


def test_a_file_that_is_cut_while_it_is_read_is_said(path: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(path.read_bytes()[: 1 << 20])
    descriptor = os.open(short, os.O_RDONLY)
    try:
        with open_model(path) as model, pytest.raises(MachineError, match="was cut at byte"):
            read_to_the_end(model, RunningDigest(descriptor, model.manifest_bytes))
    finally:
        os.close(descriptor)
