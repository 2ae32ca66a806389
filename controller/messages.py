"""The events that a decision becomes.

Rule: each is a function of the state alone, the same whenever it is made. A task's seed comes from
the run, the round and the learner: a task is the same whoever asks for it, and however often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from metisfl.controller.effects import Effect, Fold, Publish, publish
from metisfl.controller.plan import reference_weight, uncounted
from metisfl.controller.state import Phase, Run, Status, missing
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.events import PAYLOAD_BYTES_MAX, REASON_CHARACTERS_MAX

__all__ = [
    "admissions",
    "assignments",
    "cancellations",
    "completed",
    "failed",
    "model_opened",
    "refusals",
    "round_closed",
    "round_opened",
    "seed_of",
    "stopped",
    "unusable",
]

_ABSENCE_BYTES: Final = 26  # what an Absence takes beside its name and reason


def admissions(run: Run, plan: pb.RunStarted) -> tuple[Publish, ...]:
    return tuple(
        publish(topics.ledger_topic(run.federation, name), pb.MemberAdmitted(learner=name))
        for name in sorted(run.asking)
        if name in plan.learners
    )


def refusals(run: Run) -> tuple[Publish, ...]:
    """The ends of runs that were asked for in vain."""
    return tuple(
        publish(
            topics.run_topic(run.federation),
            pb.RunFinished(run_id=run_id, outcome=pb.RunFinished.FAILED, reason=why),
            run_id,
        )
        for run_id, why in sorted(run.refused.items())
    )


def seed_of(run_seed: int, round_number: int, learner: str) -> int:
    """Derive a task's seed, 0 to 2^63 - 1, from nothing but the run, the round and the learner."""
    text = f"metisfl-seed-1|{run_seed}|{round_number}|{learner}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def round_opened(
    run: Run,
    plan: pb.RunStarted,
    number: int,
    invited: Iterable[str],
    *,
    attempt: int = 0,
    exponents: tuple[int, ...] | None = None,
    reference: float | None = None,
    keeps_updates: bool = False,
) -> Publish:
    """Open round `number`, or with `attempt` the open one again.

    Exponents: the run's if None. Reference weight, if None: that of the attempt before, or what
    those declared who can count.
    """
    names = list(invited)
    if reference is None:
        declared = {name: run.declared_by(name) for name in names}
        out = uncounted(plan, run.terms, declared)
        mean = reference_weight(examples for name, examples in declared.items() if name not in out)
        reference = run.reference_weight if attempt else mean
    kind = "initialise" if number == 0 else "train"
    again = f"again{attempt}." if attempt else ""
    opened = pb.RoundOpened(
        run_id=plan.run_id,
        round=number,
        model_digest=run.model_digest,
        invited=[
            pb.Invitation(learner=name, task_id=f"{plan.run_id}.{number}.{kind}.{again}{name}")
            for name in names
        ],
        attempt=attempt,
        reference_weight=reference,
        exponents=run.exponents if exponents is None else exponents,
        keeps_updates=keeps_updates,
    )
    # Not a broadcast: an invited learner gets its task, and the others have nothing to do.
    return publish(topics.ledger_topic(run.federation, topics.ALL), opened, plan.run_id)


def completed(run: Run, plan: pb.RunStarted) -> Publish:
    return _finished(run, plan, pb.RunFinished.COMPLETED, "")


def failed(run: Run, plan: pb.RunStarted, why: str) -> Publish:
    """End the run, with what is known of everyone who was missing."""
    reasons = {name: run.absent[name] for name in plan.learners if name in run.absent}
    reasons |= {task.learner: task.reason for task in run.tasks.values() if task.reason}
    told = "; ".join([why, *(f"{name}: {reason}" for name, reason in reasons.items())])
    return _finished(run, plan, pb.RunFinished.FAILED, told)


def stopped(run: Run, plan: pb.RunStarted) -> Publish:
    """End the run because a driver wants it; learners let go of what they were asked, as ever."""
    return _finished(run, plan, pb.RunFinished.STOPPED, run.stopped)


def _finished(
    run: Run, plan: pb.RunStarted, outcome: pb.RunFinished.Outcome, reason: str
) -> Publish:
    """The end, with the model and the record of the last round that was closed, and opened."""
    closed = 0 if run.closed is None else run.closed.round
    finished = pb.RunFinished(
        run_id=plan.run_id,
        outcome=outcome,
        reason=reason[:REASON_CHARACTERS_MAX],
        model_digest=run.opened_digest if run.unopened else run.model_digest,
        rounds=max(0, closed - 1) if run.unopened else closed,
        record=run.record,
    )
    return publish(topics.run_topic(run.federation), finished, plan.run_id)


def assignments(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    """The tasks of those who are invited and have not been told."""
    last = run.phase is Phase.EVALUATING and run.round == plan.rounds
    return tuple(
        publish(
            topics.task_topic(run.federation, task.learner),
            pb.TaskAssigned(
                task_id=task.task_id,
                run_id=plan.run_id,
                round=run.round,
                kind=task.kind,  # type: ignore[arg-type]
                learner=task.learner,
                model_digest=run.model_digest,
                seed=seed_of(plan.seed, run.round, task.learner),
                lease_s=plan.lease_s,
                hyperparameters=plan.hyperparameters,
                keep_model=last,
                attempt=run.attempt,
                reference_weight=run.reference_weight,
                exponents=run.exponents if run.phase is Phase.TRAINING else (),
                privacy=plan.privacy,
                initial_seed=seed_of(plan.seed, 0, run.initialiser or task.learner),
                partials_digest=run.partials_digest,
                continues=plan.continues if task.kind == pb.INITIALISE else "",
            ),
            task.task_id,
        )
        for task in run.tasks.values()
        if task.status is Status.INVITED
    )


def unusable(run: Run, learner: str, task_id: str, reason: str) -> Publish:
    """An update that is in cannot be part of the sum: the others are summed without it."""
    told = pb.UpdateUnusable(
        task_id=task_id, learner=learner, reason=reason[:REASON_CHARACTERS_MAX]
    )
    return publish(topics.ledger_topic(run.federation, learner), told, task_id)


def cancellations(run: Run) -> tuple[Effect, ...]:
    """Who fell silent need not go on with its task."""
    return tuple(
        publish(
            topics.task_topic(run.federation, task.learner),
            pb.TaskCancelled(task_id=task.task_id, reason=task.reason),
            task.task_id,
        )
        for task in run.tasks.values()
        if task.status is Status.LAPSED and not task.cancelled
    )


def round_closed(run: Run, fold: Fold, model_digest: bytes) -> Publish:
    """Turn a finished fold into the event that closes its round."""
    counted = {one.learner for one in fold.contributions}
    closed = pb.RoundClosed(
        run_id=fold.run_id,
        round=fold.round,
        model_digest=model_digest,
        counted=[
            pb.Contribution(
                learner=one.learner,
                task_id=one.task_id,
                weight=one.weight,
                update_digest=one.digest,
            )
            for one in fold.contributions
        ],
        reference_weight=fold.reference_weight,
        previous_record=run.record,
    )
    asked = {**run.left_out, **{task.learner: missing(task) for task in run.tasks.values()}}
    absent = sorted(asked.keys() - counted)
    share_bytes = (PAYLOAD_BYTES_MAX - closed.ByteSize()) // max(1, len(absent))
    for name in absent:
        reason = asked[name].reason.encode()[: share_bytes - len(name) - _ABSENCE_BYTES]
        closed.missing.add(
            learner=name, kind=asked[name].kind, reason=reason.decode(errors="ignore")
        )
    return publish(topics.run_topic(run.federation), closed, fold.run_id)


def model_opened(run: Run, fold: Fold, partials_digest: bytes) -> Publish:
    """Turn a finished fold of partials into the event that opens its round's model."""
    opened = pb.ModelOpened(
        run_id=fold.run_id,
        round=fold.round,
        model_digest=fold.opens,
        partials_digest=partials_digest,
    )
    return publish(topics.run_topic(run.federation), opened, fold.run_id)
