"""What a run calls for next: the synchronous protocol.

Rule: `decide` changes nothing. Its effects are events to publish or folds to run, and they come
back through the log, where `round.apply` takes them. Asking twice is harmless: every effect has a
key, and the conductor lets a key out once.

A round closes when every invited learner has answered or gone silent for longer than its lease.
It counts if at least `quorum` updates are in. Else the run fails and says who was missing; one that
waits for its quorum asks the silent again. If an encrypted update did not fit the round's
exponents, the round opens again with larger ones, for all who have an update. One that would be
more of the sum than its sites open is left out, and the others weigh anew if it weighed them down.
The model of a joint key is opened before it is scored: all sites of the key give their partials. If
one is silent the run fails, unless it waits for its quorum; then that site is asked again.
A run that a driver has stopped calls for its end and for nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from metisfl.controller import messages
from metisfl.controller.effects import Contribution, Effect, Fold, Publish
from metisfl.controller.lease import Wait
from metisfl.controller.plan import largest
from metisfl.controller.quorum import askable, reachable
from metisfl.controller.state import Phase, Run, Status, Task, Terms, present
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import check_shares

__all__ = ["decide", "waits"]

LIGHT: Final = 2.0  # a mean weight of half the promised one loses a bit; below, it is made good


def decide(run: Run) -> tuple[Effect, ...]:
    """Return what the state calls for. Pure: the same state gives the same effects."""
    refusals = messages.refusals(run)
    plan = run.plan
    if plan is None or run.phase is Phase.FINISHED:
        return refusals
    return (*refusals, *messages.admissions(run, plan), *_DECISIONS[run.phase](run, plan))


def _decide_gathering(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    here = present(run, plan)
    everyone_known = all(name in run.members or name in run.absent for name in plan.learners)
    if not everyone_known:
        return ()
    if len(here) < plan.quorum:
        why = f"{len(here)} learners are here; the quorum is {plan.quorum}"
        return () if reachable(run, plan) else (messages.failed(run, plan, why),)
    return (messages.round_opened(run, plan, 0, here[:1]),)


def _decide_training(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    pending = messages.assignments(run, plan) + messages.cancellations(run)
    if not run.settled:
        return pending
    if again := _rescaled(run, plan):
        return (*pending, again)
    counted = _contributions(run)
    if run.round == 0 and not counted:
        left = [name for name in present(run, plan) if name not in run.tried]
        if left:
            return (*pending, messages.round_opened(run, plan, 0, left[:1]))
        why = "no learner could build the initial model"
        return (*pending, messages.failed(run, plan, why))
    if run.round > 0 and len(counted) < plan.quorum:
        return (*pending, *_short(run, plan, len(counted)))
    if run.round > 0 and run.terms and (unequal := _unequal(run, plan, run.terms, counted)):
        return (*pending, *unequal)
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


def _short(run: Run, plan: pb.RunStarted, counted: int) -> tuple[Effect, ...]:
    """A round that has too few updates: ask again, wait for somebody to come, or fail."""
    if not reachable(run, plan):
        why = f"round {run.round} has {counted} updates; the quorum is {plan.quorum}"
        return (messages.failed(run, plan, why),)
    if not (asked := askable(run, plan)):
        return ()
    attempt = run.attempt + 1
    return (
        messages.round_opened(run, plan, run.round, asked, attempt=attempt, keeps_updates=True),
    )


def _unequal(
    run: Run, plan: pb.RunStarted, terms: Terms, counted: tuple[Contribution, ...]
) -> tuple[Effect, ...]:
    """What an encrypted sum asks for before its sites would open it; nothing if they will.

    Who is too large a part of it is left out. If the reference weight was made of what that one
    said, the weights of the others are so small that the grid of the sum would show: they seal
    their updates again, for a reference of their own.
    """
    if len(counted) < terms.min_contributors:  # the quorum is made for another key
        why = check_shares(_shares(counted), terms.min_contributors, 1.0)
        return (messages.failed(run, plan, f"round {run.round}: {why}"),)
    if why := check_shares(_shares(counted), 1, terms.max_share):
        most = max(counted, key=lambda one: one.weight)
        return (messages.unusable(run, most.learner, most.task_id, f"left out of the sum: {why}"),)
    mean = math.fsum(one.weight for one in counted) / len(counted)
    # Who has declared nothing may weigh no more than the reference.
    reference = max([mean, *(c.weight for c in counted if not run.declared_by(c.learner))])
    if not _weighed_down(run, terms, counted) or run.reference_weight <= LIGHT * reference:
        return ()
    here = set(present(run, plan))
    again = [one.learner for one in counted if one.learner in here]
    if len(again) < plan.quorum:
        return _short(run, plan, len(again))
    attempt = run.attempt + 1
    return (
        messages.round_opened(run, plan, run.round, again, attempt=attempt, reference=reference),
    )


def _weighed_down(run: Run, terms: Terms, counted: tuple[Contribution, ...]) -> bool:
    """Whether an update that is in was left out for being too large a part of the sum."""
    return any(
        check_shares([*_shares(counted), ("", float(t.completion.examples))], 1, terms.max_share)
        for t in run.tasks.values()
        if t.status is Status.FAILED and t.completion is not None
    )


def _shares(counted: tuple[Contribution, ...]) -> list[tuple[str, float]]:
    return [(one.learner, one.weight) for one in counted]


def _rescaled(run: Run, plan: pb.RunStarted) -> Publish | None:
    """The open round with larger exponents, if an update did not fit; None if all did."""
    if not any(task.status is Status.EXCEEDED for task in run.tasks.values()):
        return None
    waiting = {t.learner for t in run.tasks.values() if t.status is Status.EXCEEDED}
    able = waiting | {t.learner for t in run.tasks.values() if t.counts}
    if reachable(run, plan) and len(able) < plan.quorum:
        able |= set(askable(run, plan))
    invited = [name for name in present(run, plan) if name in able]
    # Not in vain: for someone who is still here, and only if there will be enough of them.
    if waiting.isdisjoint(invited) or (run.round > 0 and len(invited) < plan.quorum):
        return None
    exponents = largest([run.exponents, *(task.exponents for task in run.tasks.values())])
    return messages.round_opened(
        run, plan, run.round, invited, attempt=run.attempt + 1, exponents=exponents
    )


def _decide_opening(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    pending = messages.assignments(run, plan) + messages.cancellations(run)
    waited_for = (Status.LAPSED,) if plan.waits_for_quorum else ()
    tasks = [task for task in run.tasks.values() if task.status not in waited_for]
    if any(task.settled and not task.counts for task in tasks):
        why = (
            f"round {run.round} is folded and cannot be opened: every site of the joint key has to "
            "give its partial. What earlier rounds gave is not lost: make a key with the sites "
            "that are there (`metisfl keys ceremony`), and go on from it"
        )
        return (*pending, messages.failed(run, plan, why))
    if not run.settled or len(tasks) < len(run.tasks):
        return pending
    fold = Fold(
        key=f"ModelOpened:{plan.run_id}:{run.round}",
        run_id=plan.run_id,
        round=run.round,
        base_digest=b"",
        contributions=_contributions(run),
        reference_weight=1.0,
        exponents=(),
        opens=run.model_digest,
    )
    return (*pending, fold)


def _decide_evaluating(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    pending = messages.assignments(run, plan) + messages.cancellations(run)
    if not run.settled:
        return pending
    if run.round == plan.rounds:
        return (*pending, messages.completed(run, plan))
    here = present(run, plan)
    if len(here) >= plan.quorum:
        return (*pending, messages.round_opened(run, plan, run.round + 1, here))
    if reachable(run, plan):
        return pending
    why = f"{len(here)} learners are left after round {run.round}; the quorum is {plan.quorum}"
    return (*pending, messages.failed(run, plan, why))


def _decide_stopping(run: Run, plan: pb.RunStarted) -> tuple[Effect, ...]:
    return (messages.stopped(run, plan),)


_DECISIONS: Mapping[Phase, Callable[[Run, pb.RunStarted], tuple[Effect, ...]]] = MappingProxyType(
    {
        Phase.GATHERING: _decide_gathering,
        Phase.TRAINING: _decide_training,
        Phase.OPENING: _decide_opening,
        Phase.EVALUATING: _decide_evaluating,
        Phase.STOPPING: _decide_stopping,
    }
)


def _contributions(run: Run) -> tuple[Contribution, ...]:
    weighted = run.round > 0 and run.phase is Phase.TRAINING
    return tuple(
        Contribution(
            learner=task.learner,
            task_id=task.task_id,
            digest=task.stored_digest,
            weight=float(task.completion.examples) if weighted else 1.0,
        )
        for task in sorted(run.tasks.values(), key=_by_learner)
        if task.counts and task.completion is not None
    )


def _by_learner(task: Task) -> str:
    return task.learner


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
