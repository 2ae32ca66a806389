"""What the training process does with a key: the same as without, and nothing plain leaves."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metisfl.controller.encrypted_fold import EncryptedUpdate, context_of, fold_encrypted
from metisfl.learner import encrypted_jobs, jobs
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.encrypted_jobs import EncryptedJobs
from metisfl.learner.jobs import JobLine, Jobs
from metisfl.learner.trainer import EvaluateResult, Hyperparameters, TaskCancelled, TrainResult
from metisfl.learner.worker_messages import Job, Opening, Progress, Result, Sealing
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.model_file import ModelWriter, open_model, write_model
from metisfl.proto.tensors import Tensor, is_encrypted

PUBLIC, SECRET = generate("standard", max_learners=4)
VALUES = 30_000  # two blocks
SEED = 11
GROWTH = 2700.0


class App:
    """Its variance grows to GROWTH within a round; it counts steps, for itself."""

    def __init__(self, examples: int) -> None:
        self.trained: list[int] = []
        self._examples = examples
        self.size = VALUES

    def initialise(self, seed: int) -> list[Tensor]:
        rng = np.random.default_rng(seed)
        return [
            Tensor("w", rng.uniform(-0.5, 0.5, self.size).astype(np.float32), True),
            Tensor("steps", np.array([seed, 0]), False),
            Tensor("variance", np.ones(3, np.float32), False),
        ]

    def train(
        self, tensors: Sequence[Tensor], hyperparameters: Hyperparameters, seed: int, *_: Any
    ) -> TrainResult:
        self.trained.append(seed)
        w, steps, variance = tensors
        shift = np.random.default_rng([seed, self._examples]).uniform(-0.1, 0.1, w.array.shape)
        after = [
            Tensor("w", (w.array + shift).astype(np.float32), True),
            Tensor("steps", steps.array + 1, False),
            Tensor("variance", variance.array * np.float32(GROWTH), False),
        ]
        return TrainResult(after, self._examples, 3, {"loss": 0.5})

    def evaluate(self, tensors: Sequence[Tensor], *_: object) -> EvaluateResult:
        return EvaluateResult(7, {"test.steps": float(tensors[1].array.sum())})

    def save(self, tensors: Sequence[Tensor], folder: Path) -> None:
        write_model(folder / "saved", tensors)


class Site:
    """The training process of one site, in this process."""

    def __init__(self, folder: Path, name: str, examples: int = 30) -> None:
        self.folder, self.name = folder / name, name
        self.folder.mkdir()
        self.app = App(examples)
        self.told: list[Progress] = []
        self.cancelled = False
        line = JobLine(self.told.append, lambda number: self.cancelled)
        self.jobs = EncryptedJobs(Jobs(self.app, line), Crypto(PUBLIC, SECRET), line)
        self.update = self.folder / "update"
        self.trained = self.folder / "trained"
        self.plain = self.folder / "plain"

    def sealing(self, **fields: Any) -> Sealing:
        return replace(Sealing(self.trained, (0, 14), reference_weight=20.0), **fields)

    def initialise(self) -> Result:
        sealing = self.sealing(exponents=(), reference_weight=None)
        return self.jobs.do(Job("initialise", SEED, update_path=self.update, sealing=sealing))

    def train(self, model: Path, *, initial: bool = True, **fields: Any) -> Result:
        opening = Opening(self.plain, SEED, initial)
        job = Job("train", 5, model, self.update, opening=opening, sealing=self.sealing(**fields))
        return self.jobs.do(job)

    def seal(self, **fields: Any) -> Result:
        sealing = self.sealing(examples=30, **fields)
        return self.jobs.do(Job("seal", update_path=self.update, sealing=sealing))

    def plain_values(self, path: Path) -> dict[str, np.ndarray]:
        with open_model(path) as model:
            return {tensor.name: np.array(tensor.array) for tensor in model.tensors()}


def fold(target: Path, *sites: tuple[Site, float]) -> Path:
    """What the controller makes of the sites' updates; it has the public part alone."""
    updates = []
    for site, weight in sites:
        with open_model(site.update) as model:
            updates.append(EncryptedUpdate(site.update, site.name, weight, model.digest()))
    fold_encrypted(updates, context_of(PUBLIC), target)
    return target


@pytest.fixture(scope="module")
def initial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encrypted model of round 0."""
    folder = tmp_path_factory.mktemp("initial")
    site = Site(folder, "ada")
    site.initialise()
    return fold(folder / "model", (site, 1.0))


def test_a_round_gives_every_site_the_weighted_mean_and_its_own_integers(
    initial: Path, tmp_path: Path
) -> None:
    ada, bob = Site(tmp_path, "ada", 30), Site(tmp_path, "bob", 10)
    for site in (ada, bob):
        result = site.train(initial)
        assert (result.examples, result.batches, result.metrics) == (
            site.app._examples,
            3,
            {"loss": 0.5},
        )
        assert result.exponents == (2, 14), "w needs headroom, the variance grew"
        with open_model(site.update) as model:
            assert is_encrypted(model.manifest)
            assert model.digest() == result.digest
        with open_model(site.trained) as model:
            assert model.digest() == result.trained_digest
    model = fold(tmp_path / "model", (ada, 1.5), (bob, 0.5))
    for site in (ada, bob):
        opening = Opening(site.folder / "next", SEED, initial=False)
        scored = site.jobs.do(Job("evaluate", model_path=model, opening=opening))
        assert scored.metrics == {"test.steps": float(SEED)}, "the integers of the initial model"
    assert (ada.folder / "next").read_bytes() == (bob.folder / "next").read_bytes()
    found = ada.plain_values(ada.folder / "next")
    mine, theirs = ada.plain_values(ada.trained), ada.plain_values(bob.trained)
    for name, scale in (("w", 1.0), ("variance", 2.0**14)):
        mean = (1.5 * mine[name] + 0.5 * theirs[name]) / 2
        assert np.abs(found[name] - mean).max() <= 1e-6 * scale


def test_what_does_not_fit_is_sealed_again_with_new_seeds_and_not_trained_again(
    initial: Path, tmp_path: Path
) -> None:
    ada = Site(tmp_path, "ada")
    exceeded = ada.train(initial, exponents=())
    assert (exceeded.exceeded, exceeded.exponents, exceeded.digest) == ("variance", (2, 14), b"")
    assert not ada.update.exists()
    digests = set()
    for _ in range(2):
        sealed = ada.seal(exponents=exceeded.exponents)
        assert (sealed.exceeded, sealed.exponents) == ("", (2, 14))
        digests.add(sealed.digest)
    assert len(digests) == 2, "two encryptions of one thing must not look alike"
    assert ada.app.trained == [5]


def test_a_model_is_opened_once_for_training_and_evaluation(initial: Path, tmp_path: Path) -> None:
    ada = Site(tmp_path, "ada")
    ada.train(initial)
    before = ada.plain.stat().st_mtime_ns
    opening = Opening(ada.plain, SEED, initial=True)
    ada.jobs.do(Job("evaluate", model_path=initial, opening=opening, keep_folder=tmp_path / "kept"))
    assert ada.plain.stat().st_mtime_ns == before
    assert ada.plain_values(tmp_path / "kept" / "saved")["steps"].tolist() == [SEED, 0]


@pytest.mark.parametrize(
    ("examples", "reference", "fault", "words"),
    [
        (81, 20.0, UserError, "81 examples weigh 4.05 where the reference is 20; .* up to 4"),
        (0, 20.0, UserError, "0 examples weigh 0 "),
        (30, 0.0, PeerError, r"the reference weight 0.0; .* must be above 0"),
    ],
)
def test_a_weight_that_the_key_does_not_allow_is_not_encrypted(
    initial: Path,
    tmp_path: Path,
    examples: int,
    reference: float,
    fault: type[Exception],
    words: str,
) -> None:
    ada = Site(tmp_path, "ada", examples)
    with pytest.raises(fault, match=words):
        ada.train(initial, reference_weight=reference)
    assert not ada.update.exists()


def test_where_the_reference_is_a_guess_the_remedy_is_to_say_the_examples(
    initial: Path, tmp_path: Path
) -> None:
    ada = Site(tmp_path, "ada", 81)
    with pytest.raises(UserError, match=r"let the application's trainer say its examples\(\)"):
        ada.train(initial)
    ada.app.examples = lambda: 81  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="make a key for more learners"):
        ada.train(initial)


def test_the_largest_weight_is_allowed(initial: Path, tmp_path: Path) -> None:
    assert Site(tmp_path, "ada", 80).train(initial).digest


def test_exponents_for_another_number_of_tensors_are_the_controllers_error(
    initial: Path, tmp_path: Path
) -> None:
    with pytest.raises(PeerError, match="3 exponents for 2 float tensors"):
        Site(tmp_path, "ada").train(initial, exponents=(0, 0, 0))


def test_a_model_that_is_plain_or_of_another_app_or_one_sites_own_is_not_opened(
    initial: Path, tmp_path: Path
) -> None:
    ada = Site(tmp_path, "ada")
    write_model(tmp_path / "model", ada.app.initialise(SEED))
    with pytest.raises(PeerError, match="the model is plain"):
        ada.train(tmp_path / "model")
    with pytest.raises(PeerError, match="holds 1 updates"):
        ada.train(initial, initial=False)
    ada.app.size = 5
    with pytest.raises(UserError, match=r"builds another model: tensor 'w' is \(5,\) here"):
        ada.train(initial)
    assert not ada.plain.exists()


def test_a_site_without_a_key_cannot_read_the_model(initial: Path, tmp_path: Path) -> None:
    plain = Jobs(App(30), JobLine(lambda progress: None, lambda number: False))
    with pytest.raises(PeerError, match="the model is encrypted"):
        plain.do(Job("train", 5, initial, tmp_path / "update"))


@pytest.mark.parametrize("at", ["opening", "sealing"])
def test_a_cancelled_job_ends_at_the_next_block_and_leaves_nothing(
    initial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_INTERVAL_S", 0.0)
    ada = Site(tmp_path, "ada")
    if at == "sealing":
        ada.train(initial)
        ada.update.unlink()
        ada.told.clear()
    ada.cancelled = True
    with pytest.raises(TaskCancelled):
        ada.train(initial)
    assert ada.told == []
    left = {path.name for path in ada.folder.iterdir()}
    assert left == ({"plain", "trained"} if at == "sealing" else set())


def test_progress_is_told_while_a_model_is_opened_and_an_update_sealed(
    initial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PROGRESS_INTERVAL_S", 0.0)
    ada = Site(tmp_path, "ada")
    ada.train(initial)
    assert [one.fraction for one in ada.told] == [0.0, 0.0, 1.0, 1.0], "two blocks each"


@pytest.mark.parametrize("durable_s", [0.0, 1000.0])
def test_an_update_that_took_long_to_make_is_on_disk_for_good(
    initial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable_s: float
) -> None:
    synced: list[str] = []

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", noted)
    for module in (jobs, encrypted_jobs):
        monkeypatch.setattr(module, "DURABLE_S", durable_s)
    result = Site(tmp_path, "ada").train(initial)
    assert result.durable == (durable_s == 0)
    assert synced == (["trained.partial", "ada", "update", "ada"] if result.durable else [])


def test_a_full_disk_leaves_no_part_of_an_update(
    initial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = Site(tmp_path, "ada")
    ada.train(initial)
    ada.update.unlink()
    append = ModelWriter.append

    def full(writer: ModelWriter, data: bytes) -> None:
        append(writer, data)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ModelWriter, "append", full)
    with pytest.raises(OSError, match="No space left"):
        ada.seal()
    assert {path.name for path in ada.folder.iterdir()} == {"plain", "trained"}
