"""What an assignment means here: the event it is, the job that does it, or why it is refused.

Rule: a site has one privacy mode, and which one is decided at the site, by whether it holds a key.
No task of another mode is begun.
"""

from __future__ import annotations

from dataclasses import replace

import structlog

from metisfl.broker.client import Record
from metisfl.learner import task as t
from metisfl.learner.home import Home
from metisfl.learner.trainer import Hyperparameters
from metisfl.learner.worker_messages import Job, Opening, Result, Sealing
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import JOINT
from metisfl.proto.errors import PeerError
from metisfl.proto.events import decode, may_send

__all__ = ["event_of", "job_of", "outcome_of", "refusal"]

_log = structlog.get_logger()


def event_of(record: Record) -> t.Event | None:
    """Translate a record into an event of ours; what is not for a learner is None."""
    try:
        message = decode(record.type, record.payload)
    except PeerError as error:
        _log.warning("event refused", publisher=record.publisher, why=str(error))
        return None
    if not may_send(record.publisher, message):
        _log.warning("event refused", publisher=record.publisher, why=f"it sends {record.type}")
        return None
    if isinstance(message, pb.RunFinished):
        outcome = pb.RunFinished.Outcome.Name(message.outcome)
        _log.info("run finished", run=message.run_id, outcome=outcome, record=message.record.hex())
    return t.told_by(message)


def refusal(task: pb.TaskAssigned, privacy: str) -> str:
    """Why a site of this privacy mode does not do the task, for the round's record; "" if it does.

    A task without a privacy mode is a plain one.
    """
    asked = task.privacy or "plain"
    if asked == privacy:
        return ""
    if privacy == "plain":
        return (
            f"the task's privacy mode is {asked!r} and this site has no key for it; open the "
            "federation's key here with `metisfl keys open`, then start the learner again"
        )
    return (
        f"the task's privacy mode is {asked!r} and this site holds a {privacy} key, so nothing "
        f"leaves it in any other way; run with privacy = {privacy!r}, or take the key away"
    )


def job_of(
    task: pb.TaskAssigned, home: Home, trained: t.Outcome | None, mark: t.Mark | None = None
) -> Job:
    """The job that does a task. With `trained` an earlier attempt did all but the sealing.

    `mark` says what this site has given in the run so far.
    """
    encrypted = task.privacy in ("ckks", JOINT)
    given = task.hyperparameters
    return Job(
        kind="seal" if trained is not None else _KINDS[task.kind],  # type: ignore[arg-type]
        seed=task.seed,
        model_path=home.model_path(task.model_digest) if task.model_digest else None,
        update_path=home.update_path(task.task_id),
        hyperparameters=Hyperparameters(given.epochs, given.batch_size, given.learning_rate),
        keep_folder=home.fresh_final(task.run_id) if task.keep_model else None,
        continues_path=home.checkpoint_path(task.continues) if task.continues else None,
        opening=_opening(task, home, mark) if encrypted and task.model_digest else None,
        sealing=_sealing(task, home, trained) if encrypted and task.kind in _SEALED else None,
    )


_KINDS = {
    pb.INITIALISE: "initialise",
    pb.TRAIN: "train",
    pb.OPEN: "open",
    pb.EVALUATE: "evaluate",
}
_SEALED = (pb.INITIALISE, pb.TRAIN)


def _opening(task: pb.TaskAssigned, home: Home, mark: t.Mark | None) -> Opening:
    # Round 1 trains from the model of round 0; a round is opened and evaluated with its own.
    initial = task.round == (1 if task.kind == pb.TRAIN else 0)
    opening = Opening(home.plain_path(task.model_digest), task.initial_seed, initial)
    if task.kind == pb.OPEN:
        given = mark.given_digest if mark is not None and mark.given_round == task.round else b""
        return replace(opening, model_digest=task.model_digest, own=(task.learner, given))
    if task.partials_digest:
        return replace(
            opening,
            partials_path=home.model_path(task.partials_digest),
            model_digest=task.model_digest,
            checkpoint_path=home.checkpoint_path(task.run_id),
        )
    return opening


def _sealing(task: pb.TaskAssigned, home: Home, trained: t.Outcome | None) -> Sealing:
    return Sealing(
        trained_path=home.trained_path(task),
        exponents=tuple(task.exponents),
        reference_weight=None if task.kind == pb.INITIALISE else task.reference_weight,
        examples=0 if trained is None else trained.examples,
    )


def outcome_of(result: Result, trained: t.Outcome | None) -> t.Outcome:
    """What a job gave; with `trained` it only sealed what that had given."""
    if trained is not None:
        return replace(trained, update_digest=result.digest, exponents=result.exponents)
    return t.Outcome(
        result.digest,
        result.examples,
        result.batches,
        dict(result.metrics),
        result.training_s,
        result.exponents,
        result.trained_digest,
    )
