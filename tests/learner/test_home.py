"""What is for no task any more is deleted, and nothing else."""

from __future__ import annotations

from pathlib import Path

from learner_site import task

from metisfl.learner import task as t
from metisfl.learner.home import Home, is_intact
from metisfl.proto import events_pb2 as pb

TRAIN = task(1, run_id="run.a")
TASKS = t.handle(t.Tasks("ada"), t.Assigned(TRAIN))[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(home: Home) -> None:
    trained = home.trained_path(TRAIN)
    update = home.update_path(TRAIN.task_id)
    for path in (
        *(trained, trained.with_name("run.a.2.trained"), trained.with_name("r.1.trained")),
        *(
            update,
            home.update_path("over"),
            home.update_path("over").with_suffix(".update.partial"),
        ),
    ):
        path.touch()


def test_a_sweep_leaves_what_belongs_to_a_task(tmp_path: Path) -> None:
    home = Home(tmp_path)
    fill(home)
    home.sweep(TASKS, writing=False)
    assert names(tmp_path / "outbox") == [f"{TRAIN.task_id}.update"]
    assert names(tmp_path / "trained") == ["run.a.1.trained"]
    evaluation = task(2, run_id="run.a", task_id="run.a.2.evaluate.ada", kind=pb.EVALUATE)
    home.sweep(t.handle(TASKS, t.Assigned(evaluation))[0], writing=False)
    assert names(tmp_path / "outbox") == names(tmp_path / "trained") == []


def test_a_sweep_takes_nothing_from_under_the_hands_of_a_task_that_is_being_stopped(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path)
    fill(home)
    home.sweep(TASKS, writing=True)
    assert names(tmp_path / "outbox") == ["over.update.partial", f"{TRAIN.task_id}.update"]


def test_later_attempts_find_what_the_first_one_trained(tmp_path: Path) -> None:
    home = Home(tmp_path)
    again = task(1, run_id="run.a", task_id="run.a.1.train.again1.ada", attempt=1)
    assert home.trained_path(again) == home.trained_path(TRAIN)


def test_a_new_model_takes_the_place_of_the_old_ones_opened_or_not(tmp_path: Path) -> None:
    home = Home(tmp_path)
    part = home.model_path(b"new").with_suffix(".model.00.part")  # of a download
    for path in (home.model_path(b"old"), home.plain_path(b"old"), part):
        path.touch()
    home.drop_models()
    assert names(tmp_path / "models") == [part.name]


def test_a_model_that_is_not_there_or_no_model_is_not_intact(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not a model")
    assert not is_intact(tmp_path / "x", bytes(32))
    assert not is_intact(tmp_path / "y", bytes(32))
