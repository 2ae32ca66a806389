"""What a site has opened is there for the next run, whatever was deleted or cut meanwhile."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metisfl.learner import checkpoint
from metisfl.learner.checkpoint import RUNS_KEPT, keep
from metisfl.proto.model_file import open_model, write_model
from metisfl.proto.tensors import Tensor


def opened(path: Path, value: float) -> Path:
    write_model(path, [Tensor("w", np.full(10, value, np.float32), trainable=True)])
    return path


def value_of(path: Path) -> float:
    with open_model(path) as model:
        return float(model.tensors()[0].array[0])


def test_the_newest_model_of_a_run_outlives_the_file_that_it_was_opened_into(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "run.model"
    for value in (1.0, 2.0):
        keep(opened(tmp_path / "one.plain", value), kept)
        (tmp_path / "one.plain").unlink()
    assert value_of(kept) == 2.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.model"]


def test_the_oldest_runs_go(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(RUNS_KEPT + 2):
        model = opened(plain / f"{number}.plain", number)
        os.utime(model, ns=(number, number))
        keep(model, tmp_path / f"run{number}.model")
    kept = sorted(path.stem for path in tmp_path.glob("*.model"))
    assert kept == [f"run{number}" for number in range(2, RUNS_KEPT + 2)]


def test_it_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args: Any, name: str = name, real: Any = real) -> None:
            done.append(name)
            real(*args)

        monkeypatch.setattr(checkpoint.os, name, noted)
    keep(opened(tmp_path / "one.plain", 1.0), tmp_path / "run.model")
    assert done[-3:] == ["fsync", "replace", "fsync"], "file, name, folder"
