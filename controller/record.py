"""The record of a round, read off the run's state.

Rule: a record exists once its round is over, evaluation included, and is a function of the state
alone: writing it again after a restart gives the same bytes.
"""

from __future__ import annotations

from dataclasses import replace

from metisfl.controller.state import Phase, Run, missing
from metisfl.proto.records import Counted, Missing, RoundRecord, pool_metrics

__all__ = ["record_of"]


def record_of(run: Run) -> RoundRecord | None:
    """Return the record of the round that is over in this state, or None while one is open.

    A round that failed or was stopped, or whose model was never opened, has one, too: without a
    model, and with everyone among the missing.
    """
    if run.phase is Phase.FINISHED:
        return _open_round(run)
    closed, plan = run.closed, run.plan
    if closed is None or plan is None or closed.round != run.round or not run.settled:
        return None
    if run.unopened:
        return None
    trained = {task.learner: task for task in run.trained.values()}
    evaluation, unevaluated = {}, []
    for task in sorted(run.tasks.values(), key=lambda task: task.learner):
        if task.counts and task.completion is not None:
            evaluation[task.learner] = dict(task.completion.metrics)
        else:
            unevaluated.append(missing(task))
    counted = []
    for one in closed.counted:
        completion = trained[one.learner].completion
        assert completion is not None, "what counted was completed"
        counted.append(
            Counted(
                learner=one.learner,
                weight=one.weight,
                update_digest=one.update_digest,
                examples=completion.examples,
                training_s=completion.training_s,
                metrics=dict(sorted(completion.metrics.items())),
            )
        )
    return RoundRecord(
        run_id=plan.run_id,
        round=run.round,
        previous=_previous(run),
        model_digest=closed.model_digest,
        opened_ns=run.opened_ns,
        closed_ns=run.closed_ns,
        evaluated_ns=max([run.closed_ns, *(task.settled_ns for task in run.tasks.values())]),
        invited=tuple(
            sorted([c.learner for c in closed.counted] + [m.learner for m in closed.missing])
        ),
        counted=tuple(counted),
        missing=tuple(Missing(one.learner, one.kind, one.reason) for one in closed.missing),
        evaluation={name: dict(sorted(metrics.items())) for name, metrics in evaluation.items()},
        unevaluated=tuple(unevaluated),
        metrics=pool_metrics(evaluation.values()),
    )


def _previous(run: Run) -> bytes:
    """The digest of the record before this round's, which may be in the state already."""
    return run.previous_record if run.recorded == run.round else run.record


def _open_round(run: Run) -> RoundRecord | None:
    """The record of the round that was open when its run ended, if one was."""
    closed = run.closed is not None and run.closed.round == run.round and not run.unopened
    if run.plan is None or not run.tasks or closed:
        return None
    tasks = sorted(run.tasks.values(), key=lambda task: task.learner)
    absent = {**run.left_out, **{task.learner: missing(task) for task in tasks}}
    kind, end = ("stopped", "run was stopped") if run.stopped else ("failed", "round failed")
    over_ns = max(task.settled_ns for task in tasks)
    return RoundRecord(
        run_id=run.plan.run_id,
        round=run.round,
        previous=_previous(run),
        model_digest=b"",
        opened_ns=run.opened_ns,
        closed_ns=over_ns,
        evaluated_ns=over_ns,
        invited=tuple(sorted(absent)),
        counted=(),
        missing=tuple(
            one if one.reason else replace(one, kind=kind, reason=f"answered, but the {end}")
            for _, one in sorted(absent.items())
        ),
        evaluation={},
        unevaluated=(),
        metrics={},
    )
