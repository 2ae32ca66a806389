"""What a controller says of itself once a second: the round, and whom it waits for.

Rule: whoever is awaited is named, with the time since which nothing was heard of it and what its
lease still has. A wait that is not for a learner's answer is said in words.

Pure: times come in.
"""

from __future__ import annotations

from typing import Final

from metisfl.controller.lease import Leases
from metisfl.controller.quorum import reachable
from metisfl.controller.state import Phase, Run, Status, present
from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import AWAITED_MAX

__all__ = ["status_of"]

NAMED_MAX: Final = 8


def status_of(run: Run, leases: Leases, now: float, unix_ns: int) -> pb.ControllerStatus:
    """The state in an event. `now` is the leases' monotonic time, `unix_ns` the same moment's."""
    plan = run.plan
    if plan is None:
        return pb.ControllerStatus(phase=run.phase.value, waits_for="a driver that asks for a run")
    awaited = sorted(
        leases.heard.values(), key=lambda one: (one[1] + one[0].lease_s, one[0].learner)
    )
    return pb.ControllerStatus(
        run_id=plan.run_id,
        phase=run.phase.value,
        round=run.round,
        rounds=plan.rounds,
        quorum=plan.quorum,
        counted=sum(task.counts for task in run.tasks.values()),
        invited=len(run.tasks),
        waits_for=_waits_for(run, plan, len(awaited)),
        awaited=[
            pb.Awaited(
                learner=wait.learner,
                task_id=wait.task_id,
                since_unix_ns=unix_ns - round((now - since) * 1e9),
                lease_left_s=max(0.0, since + wait.lease_s - now),
            )
            for wait, since in awaited[:AWAITED_MAX]
        ],
        awaited_total=len(awaited),
    )


def _waits_for(run: Run, plan: pb.RunStarted, awaited: int) -> str:
    if run.phase is Phase.FINISHED:
        return "a driver that asks for a run"
    if run.phase is Phase.STOPPING:
        return ""
    if run.settled:
        here = len(present(run, plan))
        short = here < plan.quorum and reachable(run, plan)
        if run.phase is Phase.GATHERING and not short:
            return f"learners to join: {here} of {len(plan.learners)} are here"
        if short:
            return f"the quorum: {here} of {plan.quorum} learners are here"
        return ""
    if run.phase is Phase.OPENING:
        names = sorted(task.learner for task in run.tasks.values() if not task.settled)
        more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
        return f"the partials of {', '.join(names[:NAMED_MAX])}{more}"
    if run.phase is Phase.TRAINING and _asked_again(run):
        counted = sum(task.counts for task in run.tasks.values())
        return f"the quorum: round {run.round} has {counted} of {plan.quorum} updates"
    return f"{awaited} learners" if awaited != 1 else "1 learner"


def _asked_again(run: Run) -> bool:
    """Whether this is an attempt for want of a quorum."""
    return run.attempt > run.rescaled and any(
        task.status in (Status.INVITED, Status.ASSIGNED) for task in run.tasks.values()
    )
