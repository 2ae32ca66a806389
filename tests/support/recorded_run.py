"""A whole run of a controller's core in a test, with the records of its rounds in a folder."""

from __future__ import annotations

from pathlib import Path

from round_world import World, plan

from metisfl.controller.record import record_of
from metisfl.controller.round_files import write_record
from metisfl.controller.state import Phase
from metisfl.proto import events_pb2 as pb
from metisfl.proto.records import pack_record, record_digest


def recorded(folder: Path, rounds: int = 3, *, fails: bool = False, stops: bool = False) -> World:
    """A run with all its records in `folder`; in its last round it `fails` or is stopped."""
    world = World()
    world.start(plan(rounds))
    known = b""
    while world.run.phase is not Phase.FINISHED:
        if stops and world.run.round == rounds:
            world.log_event(pb.RunStopped(run_id="r1", reason="enough"), "driver:d")
        for task_id in list(world.run.tasks):
            if fails and world.run.round == rounds:
                name = task_id.rsplit(".", 1)[1]
                failed = pb.TaskFailed(task_id=task_id, learner=name, reason="no data")
                world.log_event(failed, f"learner:{name}")
            else:
                world.complete(task_id)
            if world.run.record != known:
                known = _write(world, folder)
        while world.under_way:
            world.perform(next(iter(world.under_way)))
            if world.run.record != known:
                known = _write(world, folder)
    return world


def _write(world: World, folder: Path) -> bytes:
    record = record_of(world.run)
    assert record is not None
    assert record_digest(pack_record(record)) == world.run.record
    write_record(folder, record)
    return world.run.record
