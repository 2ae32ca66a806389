"""What a learner keeps on disk besides its database: models, updates, and what it trained.

Rule 1: a file is named after what it is for (a digest, a task, a round), and whatever is for no
task any more is deleted.
Rule 2: in an encrypted federation plain weights lie in `models/*.plain` and in `trained/`, and in
`final/` and `checkpoints/` for the site itself; uploads come from `outbox/` alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Final

from metisfl.learner.task import Tasks
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError
from metisfl.proto.model_file import open_model

__all__ = ["Home", "is_intact"]

PARTIAL: Final = ".partial"


class Home:
    """The folders of one learner; they are made if they are not there."""

    def __init__(self, folder: Path) -> None:
        self._models = folder / "models"
        self._outbox = folder / "outbox"
        self._trained = folder / "trained"
        self._final = folder / "final"
        self._checkpoints = folder / "checkpoints"
        self.verification = folder / "verification"
        for each in (self._models, self._outbox, self._trained, self._final, self._checkpoints):
            each.mkdir(parents=True, exist_ok=True)
            each.chmod(0o700)  # plain weights lie here, and nobody else on the machine needs them

    def model_path(self, digest: bytes) -> Path:
        """The community model as the controller sends it."""
        return self._models / f"{digest.hex()}.model"

    def plain_path(self, digest: bytes) -> Path:
        """The same model, opened with the site's key."""
        return self._models / f"{digest.hex()}.plain"

    def update_path(self, task_id: str) -> Path:
        return self._outbox / f"{task_id}.update"

    def trained_path(self, task: pb.TaskAssigned) -> Path:
        """The plain model behind the update of a round, whichever attempt it is for."""
        return self._trained / f"{_round_name(task)}.trained"

    def fresh_final(self, run_id: str) -> Path:
        """An empty folder for the final model of a run."""
        folder = self._final / run_id
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def checkpoint_path(self, run_id: str) -> Path:
        """The newest model that was opened here in a run of a joint key."""
        return self._checkpoints / f"{run_id}.model"

    def drop_models(self, but: Collection[bytes] = ()) -> None:
        """Delete all community models but these, for a new one to come."""
        kept = {digest.hex() for digest in but}
        for path in self._models.glob("*.model"):
            if path.stem not in kept:
                path.unlink()
        self._drop_plain()

    def _drop_plain(self) -> None:
        for path in self._models.glob("*.plain*"):
            path.unlink()

    def tidy(self, tasks: Tasks) -> None:
        """Delete what a former process left and this one cannot use.

        Opened models are among it: they are not synced, and opening one again is cheap.
        """
        self._drop_plain()
        shutil.rmtree(self.verification, ignore_errors=True)
        self.sweep(tasks, writing=False)

    def sweep(self, tasks: Tasks, *, writing: bool) -> None:
        """Delete what is for no task any more.

        With `writing` a task that was stopped may still be at it: what it has not finished is left
        for the next time.
        """
        rounds = {_round_name(job.assigned) for job in tasks.jobs.values() if _trains(job.assigned)}
        for folder, suffix, wanted in (
            (self._outbox, ".update", tasks.jobs.keys()),
            (self._trained, ".trained", rounds),
        ):
            for path in folder.iterdir():
                over = path.name.rpartition(suffix)[0] not in wanted
                if over and not (writing and path.name.endswith(PARTIAL)):
                    path.unlink(missing_ok=True)


def is_intact(path: Path, digest: bytes) -> bool:
    """Whether `path` is a model file with this content, which a power cut may have spoilt."""
    try:
        with open_model(path) as model:
            return model.digest() == digest
    except (FileNotFoundError, MachineError):
        return False


def _round_name(task: pb.TaskAssigned) -> str:
    return f"{task.run_id}.{task.round}"


def _trains(task: pb.TaskAssigned) -> bool:
    return task.kind in (pb.INITIALISE, pb.TRAIN)
