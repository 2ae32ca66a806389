"""What a run calls for next: the synchronous protocol.

Rule: `decide` changes nothing. Its effects are events to publish or folds to run, and they come
back through the log, where `round.apply` takes them. Asking twice is harmless: every effect has a
key, and the shell runs a key once.

A round closes when every invited learner has answered or gone silent for longer than its lease.
It counts if at least `quorum` updates are in; else the run fails and says who was missing. If an
encrypted update did not fit the round's exponents, the round opens again with larger ones, for all
who have an update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from google.protobuf.message import Message

from metisfl.controller.lease import Wait
from metisfl.controller.plan import largest, reference_weight
from metisfl.controller.state import Phase, Run, Status, Task, present
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.ckks import check_shares
from metisfl.proto.events import PAYLOAD_BYTES_MAX, REASON_CHARACTERS_MAX

__all__ = [
    "Contribution",
    "Effect",
    "Fold",
    "Publish",
    "decide",
    "key_of",
    "round_closed",
    "seed_of",
    "waits",
]

_ABSENCE_BYTES: Final = 16  # what an Absence takes beside its two texts


@dataclass(frozen=True, slots=True)
class Publish:
    key: str
    topic: str
    message: Message
    correlation_id: str


@dataclass(frozen=True, slots=True)
class Contribution:
    learner: str
    task_id: str
    digest: bytes
    weight: float


@dataclass(frozen=True, slots=True)
class Fold:
    """Make the community model of a round, learners in the order of their names."""

    key: str  # that of the RoundClosed which it becomes
    run_id: str
    round: int
    base_digest: bytes  # empty for round 0
    contributions: tuple[Contribution, ...]
    reference_weight: float
    exponents: tuple[int, ...]  # none in plain mode; none in round 0: all are 0


Effect = Publish | Fold


def key_of(message: Message) -> str:
    """Name what an event settles, so that an effect and the event it became can be matched."""
    kind = message.DESCRIPTOR.name
    if isinstance(message, pb.RoundOpened):
        return f"{kind}:{message.run_id}:{message.round}:{message.attempt}"
    if isinstance(message, pb.RoundClosed):
        return f"{kind}:{message.run_id}:{message.round}"
    if isinstance(message, (pb.RunStarted, pb.RunFinished)):
        return f"{kind}:{message.run_id}"
    task_id = getattr(message, "task_id", "")
    return f"{kind}:{task_id}" if task_id else f"{kind}:learner:{message.learner}"  # type: ignore[attr-defined]


def seed_of(run_seed: int, round_number: int, learner: str) -> int:
    """Derive a task's seed, 0 to 2^63 - 1, from nothing but the run, the round and the learner."""
    text = f"metisfl-seed-1|{run_seed}|{round_number}|{learner}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def decide(run: Run) -> tuple[Effect, ...]:
    """Return what the state calls for. Pure: the same state gives the same effects."""
    plan = run.plan
    refusals = tuple(_refuse(run, run_id, why) for run_id, why in sorted(run.refused.items()))
    if plan is None or run.phase is Phase.FINISHED:
        return refusals
    admissions = tuple(
        _publish(topics.ledger_topic(run.federation, name), pb.MemberAdmitted(learner=name))
        for name in sorted(run.asking)
        if name in plan.learners
    )
    return refusals + admissions + _DECISIONS[run.phase](run, plan)


def _decide_gathering(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    here = present(run, plan)
    everyone_known = all(name in run.members or name in run.absent for name in plan.learners)
    if not everyone_known:
        return ()
    if len(here) < plan.quorum:
        return (_fail(run, plan, f"{len(here)} learners are here; the quorum is {plan.quorum}"),)
    return (_open_round(run, plan, 0, here[:1]),)


def _decide_training(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    pending = _assignments(run, plan) + _cancellations(run)
    if not all(task.settled for task in run.tasks.values()):
        return pending
    if again := _opened_again(run, plan):
        return (*pending, again)
    counted = _contributions(run)
    if run.round == 0 and not counted:
        left = [name for name in present(run, plan) if name not in run.tried]
        if left:
            return (*pending, _open_round(run, plan, 0, left[:1]))
        return (*pending, _fail(run, plan, "no learner could build the initial model"))
    if run.round > 0 and len(counted) < plan.quorum:
        why = f"round {run.round} has {len(counted)} updates; the quorum is {plan.quorum}"
        return (*pending, _fail(run, plan, why))
    if run.round > 0 and (why := _dominated(run, counted)):
        return (*pending, _fail(run, plan, why))
    fold = Fold(
        key=f"RoundClosed:{plan.run_id}:{run.round}",
        run_id=plan.run_id,
        round=run.round,
        base_digest=run.model_digest,
        contributions=counted,
        reference_weight=run.reference_weight,
        exponents=run.exponents,
    )
    return (*pending, fold)


def _dominated(run: Run, counted: tuple[Contribution, ...]) -> str:
    """Why the sites would not open the sum: one of them is nearly all of it; "" if they will."""
    if run.terms is None:
        return ""
    shares = [(one.learner, one.weight / run.reference_weight) for one in counted]
    why = check_shares(shares, run.terms.min_contributors, run.terms.max_share)
    return f"round {run.round}: {why}" if why else ""


def _opened_again(run: Run, plan: pb.RunStarted) -> Publish | None:
    """The open round with larger exponents, if an update did not fit; None if all did."""
    if not any(task.status is Status.EXCEEDED for task in run.tasks.values()):
        return None
    waiting = {t.learner for t in run.tasks.values() if t.status is Status.EXCEEDED}
    able = waiting | {t.learner for t in run.tasks.values() if t.counts}
    invited = [name for name in present(run, plan) if name in able]
    # Not in vain: for someone who is still here, and only if there will be enough of them.
    if waiting.isdisjoint(invited) or (run.round > 0 and len(invited) < plan.quorum):
        return None
    exponents = largest([run.exponents, *(task.exponents for task in run.tasks.values())])
    return _open_round(run, plan, run.round, invited, run.attempt + 1, exponents)


def _decide_evaluating(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    pending = _assignments(run, plan) + _cancellations(run)
    if not all(task.settled for task in run.tasks.values()):
        return pending
    if run.round < plan.rounds:
        here = present(run, plan)
        if len(here) >= plan.quorum:
            return (*pending, _open_round(run, plan, run.round + 1, here))
        why = f"{len(here)} learners are left after round {run.round}; the quorum is {plan.quorum}"
        return (*pending, _fail(run, plan, why))
    done = pb.RunFinished(
        run_id=plan.run_id,
        outcome=pb.RunFinished.COMPLETED,
        model_digest=run.model_digest,
        rounds=run.round,
    )
    return (*pending, _publish(topics.run_topic(run.federation), done, plan.run_id))


_DECISIONS: Mapping[Phase, Callable[[Run, pb.RunStarted], tuple[Effect, ...]]] = MappingProxyType(
    {
        Phase.GATHERING: _decide_gathering,
        Phase.TRAINING: _decide_training,
        Phase.EVALUATING: _decide_evaluating,
    }
)


def _publish(topic: str, message: Message, correlation_id: str = "") -> Publish:
    return Publish(key_of(message), topic, message, correlation_id)


def _open_round(
    run: Run,
    plan: pb.RunStarted,
    number: int,
    invited: list[str],
    attempt: int = 0,
    exponents: tuple[int, ...] | None = None,
) -> Publish:
    kind = "initialise" if number == 0 else "train"
    again = f"again{attempt}." if attempt else ""
    opened = pb.RoundOpened(
        run_id=plan.run_id,
        round=number,
        model_digest=run.model_digest,
        invited=[
            pb.Invitation(learner=name, task_id=f"{plan.run_id}.{number}.{kind}.{again}{name}")
            for name in invited
        ],
        attempt=attempt,
        reference_weight=(
            run.reference_weight if attempt else reference_weight(map(run.declared_by, invited))
        ),
        exponents=run.exponents if exponents is None else exponents,
    )
    # Not a broadcast: an invited learner gets its task, and the others have nothing to do.
    return _publish(topics.ledger_topic(run.federation, topics.ALL), opened, plan.run_id)


def _refuse(run: Run, run_id: str, why: str) -> Publish:
    refused = pb.RunFinished(run_id=run_id, outcome=pb.RunFinished.FAILED, reason=why)
    return _publish(topics.run_topic(run.federation), refused, run_id)


def _fail(run: Run, plan: pb.RunStarted, why: str) -> Publish:
    reasons = {name: run.absent[name] for name in plan.learners if name in run.absent}
    reasons |= {task.learner: task.reason for task in run.tasks.values() if task.reason}
    failed = pb.RunFinished(
        run_id=plan.run_id,
        outcome=pb.RunFinished.FAILED,
        reason="; ".join([why, *(f"{name}: {reason}" for name, reason in reasons.items())])[
            :REASON_CHARACTERS_MAX
        ],
        model_digest=run.model_digest,
        rounds=max(run.round - 1, 0) if run.phase is Phase.TRAINING else run.round,
    )
    return _publish(topics.run_topic(run.federation), failed, plan.run_id)


def _assignments(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    last = run.phase is Phase.EVALUATING and run.round == plan.rounds
    return tuple(
        _publish(
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
            ),
            task.task_id,
        )
        for task in run.tasks.values()
        if task.status is Status.INVITED
    )


def _cancellations(run: Run) -> tuple[Effect, ...]:
    return tuple(
        _publish(
            topics.task_topic(run.federation, task.learner),
            pb.TaskCancelled(task_id=task.task_id, reason=task.reason),
            task.task_id,
        )
        for task in run.tasks.values()
        if task.status is Status.LAPSED and not task.cancelled
    )


def _contributions(run: Run) -> tuple[Contribution, ...]:
    return tuple(
        Contribution(
            learner=task.learner,
            task_id=task.task_id,
            digest=task.stored_digest,
            weight=1.0 if run.round == 0 else float(task.completion.examples),
        )
        for task in sorted(run.tasks.values(), key=_by_learner)
        if task.counts and task.completion is not None
    )


def _by_learner(task: Task) -> str:
    return task.learner


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
    )
    asked = {**run.left_out, **{task.learner: task.reason for task in run.tasks.values()}}
    missing = sorted(asked.keys() - counted)
    share_bytes = (PAYLOAD_BYTES_MAX - closed.ByteSize()) // max(1, len(missing))
    for name in missing:
        reason = asked[name].encode()[: share_bytes - len(name) - _ABSENCE_BYTES]
        closed.missing.add(learner=name, reason=reason.decode(errors="ignore"))
    return _publish(topics.run_topic(run.federation), closed, fold.run_id)


def waits(run: Run) -> tuple[Wait, ...]:
    """Who is awaited now: the leases that the shell must watch."""
    plan = run.plan
    if plan is None or run.phase is Phase.FINISHED:
        return ()
    if run.phase is Phase.GATHERING:
        missing = (n for n in plan.learners if n not in run.members and n not in run.absent)
        return tuple(Wait(name, "", plan.lease_s) for name in missing)
    return tuple(
        Wait(task.learner, task.task_id, plan.lease_s)
        for task in run.tasks.values()
        if not task.settled and task.status is not Status.INVITED
    )
