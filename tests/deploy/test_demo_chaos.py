"""Two runs are told apart by a single bit, and the demo says so with its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from metisfl.deploy import demo_chaos
from metisfl.deploy.chaos import Chaos, RoundTimes
from metisfl.deploy.demo import EXAMPLE
from metisfl.deploy.demo_chaos import model_digest, run_twice
from metisfl.deploy.driver import Outcome
from metisfl.deploy.outages import Outage
from metisfl.deploy.settings import Federation, load_federation
from metisfl.deploy.watch import RunFailed

WEIGHTS = np.linspace(0, 1, 7, dtype=np.float32)


def write_model(folder: Path, **arrays: Any) -> Path:
    folder.mkdir(parents=True)
    np.savez(folder / "model.npz", **arrays)
    return folder


def test_a_digest_is_of_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    digest = model_digest(write_model(tmp_path / "model", a=WEIGHTS, b=WEIGHTS[:3]))
    assert digest == model_digest(write_model(tmp_path / "order", b=WEIGHTS[:3], a=WEIGHTS))
    one_bit = WEIGHTS.copy()
    one_bit.view(np.uint32)[3] ^= 1
    others = {
        "bit": {"a": one_bit, "b": WEIGHTS[:3]},
        "name": {"a": WEIGHTS, "c": WEIGHTS[:3]},
        "shape": {"a": WEIGHTS.reshape(1, 7), "b": WEIGHTS[:3]},
        "type": {"a": WEIGHTS.view(np.int32), "b": WEIGHTS[:3]},
        "split": {"a": WEIGHTS[:3], "b": WEIGHTS},
    }
    for what, arrays in others.items():
        assert model_digest(write_model(tmp_path / what, **arrays)) != digest, what


class Runs:
    """Stands in for the driver: the undisturbed run's weights, then the disturbed one's."""

    def __init__(self, privacy: str, *weights: Any, digests: tuple[bytes, bytes]) -> None:
        self.privacy, self.weights, self.digests = privacy, list(weights), list(digests)
        self.left = 0

    def up(
        self,
        federation: Federation,
        folder: Path,
        screen: Any,
        on_started: Callable[..., None] = print,
    ) -> Outcome:
        if isinstance(screen, Chaos):
            planned = screen._waiting
            while len(planned) > self.left:
                moment = planned.pop(0)
                screen.outages[moment] = Outage(moment.victim, 1, 2, over_ns=1_500_000_001)
        return Outcome(
            run_id="r",
            rounds=3,
            seconds=1.0,
            metrics=MappingProxyType({"test.accuracy": 0.8}),
            by_learner=MappingProxyType({}),
            privacy=self.privacy,
            update_bytes=1,
            plain_bytes=1,
            model_digest=self.digests.pop(0),
            model=write_model(folder / "model", a=self.weights.pop(0)),
            folder=folder,
        )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr(RoundTimes, "median_s", 1.0)

    def run(runs: Runs, *, as_json: bool = False) -> int:
        monkeypatch.setattr(demo_chaos, "up", runs.up)
        federation = load_federation(EXAMPLE / "federation.toml")
        return run_twice(federation, tmp_path, 5, as_json=as_json)

    return run


def test_the_same_bits_are_a_success_and_all_is_told(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs("ckks", WEIGHTS, WEIGHTS, digests=(b"1", b"2"))
    assert run(runs, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same_bits"] is True
    assert [kill["missed_s"] for kill in told["kills"]] == [1.5] * 4
    assert told["undisturbed_digest"] == told["disturbed_digest"]


def test_another_bit_is_a_failure(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    other = np.nextafter(WEIGHTS, 2)
    assert run(Runs("ckks", WEIGHTS, other, digests=(b"1", b"1"))) == 1
    assert "DIFFER" in capsys.readouterr().out


def test_in_plain_the_community_models_must_be_the_same_too(run: Callable[..., int]) -> None:
    assert run(Runs("plain", WEIGHTS, WEIGHTS, digests=(b"1", b"2"))) == 1


def test_a_run_in_which_not_all_were_killed_shows_nothing(run: Callable[..., int]) -> None:
    runs = Runs("plain", WEIGHTS, WEIGHTS, digests=(b"1", b"1"))
    runs.left = 1
    with pytest.raises(RunFailed, match=r"before .* could be killed"):
        run(runs)
