"""A snapshot is the whole state: what comes back is what the log gave (see also test_round.py)."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from round_world import World, plan

from metisfl.controller.snapshot import RUN, TASK, pack, unpack
from metisfl.controller.state import Run, Task, Terms
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError


def advanced() -> Run:
    """A state that has something in most of its fields."""
    world = World()
    world.start(plan())
    world.complete("r1.0.initialise.ada")
    world.perform_all()
    for name in ("ada", "bob"):
        world.complete(f"r1.1.train.{name}")
    lapsed = pb.LeaseEnded(task_id="r1.1.train.cyd", learner="cyd", silent_s=6)
    world.log_event(lapsed, "controller")
    world.perform_all()
    world.log_event(pb.LearnerLeft(learner="cyd", reason="reboot"), "learner:cyd")
    world.log_event(plan(run_id="r2"), "driver:d")
    return world.run


def test_every_field_of_the_state_is_in_the_table() -> None:
    assert {field.name for field in fields(Run)} == {*RUN, "terms"}
    assert {field.name for field in fields(Task)} == {*TASK}


def test_the_state_comes_back_as_it_was_and_gives_the_same_bytes() -> None:
    run = advanced()
    again = unpack(pack(run), None)
    assert again == run
    assert pack(again) == pack(run)


def test_the_terms_are_those_of_the_key_in_use() -> None:
    terms = Terms(weight_sum_max=9)
    assert unpack(pack(advanced()), terms) == replace(advanced(), terms=terms)


@given(st.data())
def test_other_bytes_are_an_error_that_says_what_to_do(data: st.DataObject) -> None:
    whole = pack(Run("f"))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    for other in (cut, data.draw(st.binary(max_size=100)), b"\x92\x63" + whole[2:]):
        with pytest.raises(MachineError, match="restore a copy"):
            unpack(other, None)
