"""The example applications: what a site prepares, and that together is better than alone."""

from __future__ import annotations

import asyncio
import csv
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unwatched import UNWATCHED

from metisfl.deploy.settings import Federation, load_federation
from metisfl.learner.alone import accuracy_alone
from metisfl.learner.app import load_app, trainer_for
from metisfl.learner.trainer import Hyperparameters, Trainer, derive_seed
from metisfl.learner.worker import Job, Worker
from metisfl.proto.model_file import open_model, write_model
from metisfl.proto.tensors import Tensor

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
HEARTS, PENGUINS = EXAMPLES / "heart_disease", EXAMPLES / "penguins"

# Keras hands TensorFlow's variables to numpy, which wants a keyword that they do not know yet.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


def federation_of(folder: Path) -> Federation:
    return load_federation(folder / "federation.toml")


def app_of(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorFlow's import uses what Python deprecates
        return load_app(federation_of(folder).app.object, folder)


@pytest.fixture(autouse=True)
def _import_path() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path


def train_together(federation: Federation, trainers: Mapping[str, Trainer]) -> list[Tensor]:
    """Federated averaging by examples, in one process: what the daemons do without the wires."""
    hyperparameters = hyperparameters_of(federation)
    model = list(next(iter(trainers.values())).initialise(derive_seed(federation.seed, 0, "all")))
    for round_number in range(1, federation.rounds + 1):
        results = [
            trainer.train(
                model,
                hyperparameters,
                derive_seed(federation.seed, round_number, name),
                lambda fraction, metrics: None,
                lambda: False,
            )
            for name, trainer in sorted(trainers.items())
        ]
        examples = sum(result.examples for result in results)
        for index, tensor in enumerate(model):
            parts = (r.tensors[index].array * (r.examples / examples) for r in results)
            model[index] = Tensor(tensor.name, sum(parts).astype("float32"), True)  # type: ignore[attr-defined]
    return model


def hyperparameters_of(federation: Federation, rounds: int = 1) -> Hyperparameters:
    training = federation.training
    rate = training.learning_rate or 0.0
    return Hyperparameters(training.epochs * rounds, training.batch_size, rate)


@pytest.mark.parametrize(
    ("folder", "at_least", "better_by"), [(HEARTS, 0.78, 0.08), (PENGUINS, 0.92, 0.3)]
)
def test_together_is_better_than_alone(folder: Path, at_least: float, better_by: float) -> None:
    federation, app = federation_of(folder), app_of(folder)
    trainers = {each.name: trainer_for(app, each.data) for each in federation.learners}
    model = train_together(federation, trainers)
    scores = [trainer.evaluate(model, *UNWATCHED).metrics for trainer in trainers.values()]
    examples = sum(score["test.examples"] for score in scores)
    together = sum(score["test.accuracy"] * score["test.examples"] for score in scores) / examples
    epochs_alone = hyperparameters_of(federation, federation.rounds)
    alone = accuracy_alone(trainers, epochs_alone, federation.seed, lambda text: None)
    assert together >= at_least
    assert together >= np.mean(list(alone.values())) + better_by
    assert together > max(alone.values())


@pytest.mark.parametrize("folder", [HEARTS, PENGUINS])
def test_the_splits_of_a_site_are_apart_and_always_the_same(folder: Path) -> None:
    app, again = app_of(folder), app_of(folder)
    for learner in federation_of(folder).learners:
        data = app.data(learner.data)
        rows = [row.tobytes() for x, _ in data.values() for row in x]
        assert len(set(rows)) >= 0.97 * len(rows), "but for patients who are alike, each once"
        for name, (x, y) in again.data(learner.data).items():
            np.testing.assert_array_equal(x, data[name][0])
            np.testing.assert_array_equal(y, data[name][1])


@pytest.mark.parametrize("folder", [HEARTS, PENGUINS])
def test_every_record_is_used_once(folder: Path) -> None:
    app = app_of(folder)
    sizes = [
        [len(y) for _, y in app.data(learner.data).values()]
        for learner in federation_of(folder).learners
    ]
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        records = list(csv.reader(file))[1:]
    left_out = 2 if folder == PENGUINS else 0  # without any measure
    assert sum(map(sum, sizes)) == len(records) - left_out
    for train, validation, test in sizes:
        whole = train + validation + test
        assert (train / whole, test / whole) == pytest.approx((0.6, 0.25), abs=0.02)
        assert validation >= 7


@pytest.mark.parametrize("folder", [HEARTS, PENGUINS])
def test_an_unknown_site_is_said(folder: Path) -> None:
    with pytest.raises(ValueError, match="'Nowhere'"):
        app_of(folder).data("Nowhere")


def test_each_split_of_a_hospital_has_its_share_of_the_ill() -> None:
    app = app_of(HEARTS)
    for learner in federation_of(HEARTS).learners:
        shares = [y.mean() for _, y in app.data(learner.data).values()]
        assert max(shares) - min(shares) < 0.05, f"{learner.name}: {shares}"


def test_a_hospital_scales_by_its_training_patients_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that the model learns from changes when the other patients' numbers do."""
    app = app_of(HEARTS)
    module = sys.modules[type(app).__module__]
    before = app.data("Cleveland")
    with module.PATIENTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cleveland = [row for row in rows if row["dataset"] == "Cleveland"]
    ill = np.array([row["num"] != "0" for row in cleveland], np.float32)
    for index in np.concatenate([module.split(ill)[name] for name in ("validation", "test")]):
        cleveland[index]["age"] = "130"
    changed = tmp_path / "patients.csv"
    with changed.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(module, "PATIENTS", changed)
    after = app.data("Cleveland")
    np.testing.assert_array_equal(after["train"][0], before["train"][0])
    assert (after["test"][0][:, 0] > before["test"][0][:, 0]).all()
    train = before["train"][0][:, : len(module.NUMBERS)]
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-6)


def test_a_column_that_a_hospital_does_not_know_is_zero_and_marked() -> None:
    app = app_of(HEARTS)
    module = sys.modules[type(app).__module__]
    cholesterol = module.NUMBERS.index("chol")
    unknown = module.FEATURES - len(module.OFTEN_UNKNOWN) + module.OFTEN_UNKNOWN.index("chol")
    for x, _ in app.data("Switzerland").values():
        assert np.isfinite(x).all()
        assert (x[:, cholesterol] == 0).all(), "a cholesterol of 0 is none"
        assert (x[:, unknown] == 1).all()


def test_the_hearts_model_is_large_enough_for_a_full_chunk_of_values() -> None:
    assert app_of(HEARTS).model().count_params() >= 4096


def test_a_worker_gives_the_bits_that_a_trainer_gives_here(tmp_path: Path) -> None:
    """The whole way of a task at a site, in the process that trains."""
    federation, app = federation_of(PENGUINS), app_of(PENGUINS)
    hyperparameters = hyperparameters_of(federation)
    model, update = tmp_path / "model", tmp_path / "update"

    async def in_the_worker() -> tuple[bytes, bytes, Mapping[str, float]]:
        worker = Worker(app=federation.app.object, path=PENGUINS, source="Dream")
        try:
            made = await worker.run(Job("initialise", 5, update_path=model), lambda progress: None)
            job = Job("train", 6, model, update, hyperparameters)
            trained = await worker.run(job, lambda progress: None)
            job = Job("evaluate", 0, update, keep_folder=tmp_path / "kept")
            scored = await worker.run(job, lambda progress: None)
        finally:
            await worker.close()
        assert trained.examples == 74
        assert trained.batches == 5 * federation.training.epochs
        return made.digest, trained.digest, scored.metrics

    made, trained, metrics = asyncio.run(in_the_worker())
    trainer = trainer_for(app, "Dream")
    initial = trainer.initialise(5)
    result = trainer.train(
        initial, hyperparameters, 6, lambda fraction, metrics: None, lambda: False
    )
    assert write_model(tmp_path / "here", initial) == made
    assert write_model(tmp_path / "here", result.tensors) == trained
    assert trainer.evaluate(result.tensors, *UNWATCHED).metrics == metrics
    with open_model(update) as file, np.load(tmp_path / "kept" / "model.npz") as kept:
        for tensor in file.tensors():
            np.testing.assert_array_equal(kept[tensor.name], tensor.array)
    assert (tmp_path / "kept" / "model.keras").is_file()
