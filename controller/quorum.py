"""Who may still bring an update to this round, or the next, where a run waits for its quorum.

Rule: silence is waited for, a refusal is not. Who has said that it cannot (it failed or left) makes
up no quorum; who was silent or has not come is asked again, as often as it takes. A run that does
not wait fails with the first round that lacks its quorum.
"""

from __future__ import annotations

from metisfl.controller.state import Phase, Run, Status, present
from metisfl.proto import events_pb2 as pb

__all__ = ["askable", "reachable"]


def reachable(run: Run, plan: pb.RunStarted) -> bool:
    """Whether this run waits, and enough learners have not said that they cannot."""
    return plan.waits_for_quorum and len(_able(run, plan)) >= plan.quorum


def askable(run: Run, plan: pb.RunStarted) -> list[str]:
    """Who is here, may bring an update, and has none yet, by name."""
    have = {t.learner for t in run.tasks.values() if t.counts or t.status is Status.EXCEEDED}
    able = _able(run, plan) - have
    return [name for name in present(run, plan) if name in able]


def _able(run: Run, plan: pb.RunStarted) -> set[str]:
    here = set(plan.learners) - run.gone
    if run.phase is not Phase.TRAINING:
        return here  # what went wrong in the round before does not count against the next
    failed = {task.learner for task in run.tasks.values() if task.status is Status.FAILED}
    return here - run.left_out.keys() - failed
