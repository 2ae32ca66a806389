"""An assignment says in full how its job opens models and seals the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from learner_site import task

from metisfl.learner import task as t
from metisfl.learner.assignment import job_of, outcome_of
from metisfl.learner.home import Home
from metisfl.learner.worker import Result
from metisfl.learner.worker_messages import Opening, Sealing
from metisfl.proto import events_pb2 as pb

TRAINED = t.Outcome(b"", 40, 2, {"loss": 1.0}, 0.1, (0, 12), b"t" * 32)
DIGEST = bytes([3]) * 32


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def encrypted(kind: int, round_number: int, **fields: Any) -> pb.TaskAssigned:
    return task(
        round_number,
        kind=kind,
        privacy="ckks",
        initial_seed=11,
        reference_weight=20.0,
        exponents=(0, 12),
        model_digest=b"" if kind == pb.INITIALISE else DIGEST,
        **fields,
    )


def test_the_initial_model_weighs_one_and_there_is_none_to_open(home: Home) -> None:
    given = encrypted(pb.INITIALISE, 0)
    job = job_of(given, home, None)
    assert (job.kind, job.model_path, job.opening) == ("initialise", None, None)
    assert job.sealing == Sealing(home.trained_path(given), (0, 12), reference_weight=None)


@pytest.mark.parametrize(
    ("kind", "round_number", "initial"),
    [(pb.TRAIN, 1, True), (pb.TRAIN, 2, False), (pb.EVALUATE, 1, False), (pb.EVALUATE, 0, True)],
)
def test_only_the_model_of_round_0_is_one_sites_own(
    home: Home, kind: int, round_number: int, initial: bool
) -> None:
    job = job_of(encrypted(kind, round_number), home, None)
    assert job.model_path == home.model_path(DIGEST)
    assert job.opening == Opening(home.plain_path(DIGEST), 11, initial)


def test_an_update_weighs_its_examples_by_the_rounds_reference(home: Home) -> None:
    given = encrypted(pb.TRAIN, 3)
    job = job_of(given, home, None)
    assert job.kind == "train"
    assert job.sealing == Sealing(home.trained_path(given), (0, 12), reference_weight=20.0)
    assert job_of(encrypted(pb.EVALUATE, 3), home, None).sealing is None


def test_what_is_trained_is_sealed_with_the_examples_that_it_was_trained_on(home: Home) -> None:
    again = encrypted(pb.TRAIN, 3, task_id="r.3.train.again1.ada", attempt=1)
    job = job_of(again, home, TRAINED)
    assert job.kind == "seal"
    assert job.update_path == home.update_path("r.3.train.again1.ada")
    assert job.sealing == Sealing(home.trained_path(encrypted(pb.TRAIN, 3)), (0, 12), 20.0, 40)


def test_a_plain_task_opens_and_seals_nothing(home: Home) -> None:
    job = job_of(task(2), home, None)
    assert (job.kind, job.opening, job.sealing) == ("train", None, None)


def test_sealing_again_changes_the_update_and_the_exponents_alone() -> None:
    sealed = outcome_of(Result(digest=DIGEST, exponents=(1, 12), durable=True), TRAINED)
    assert sealed == t.Outcome(DIGEST, 40, 2, {"loss": 1.0}, 0.1, (1, 12), b"t" * 32)
