"""Whatever bytes arrive, decode gives a message within its limits or a PeerError."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import PeerError
from metisfl.proto.events import (
    EVENT_TYPES,
    LIMITS,
    PAYLOAD_BYTES_MAX,
    decode,
    encode,
    may_send,
)

COMPLETED = pb.TaskCompleted(
    task_id="t", learner="ada", update_digest=bytes(32), examples=3, metrics={"loss": 0.5}
)


def test_every_field_of_every_event_has_a_limit() -> None:
    for name, limits in LIMITS.items():
        fields = {field.name for field in pb.DESCRIPTOR.message_types_by_name[name].fields}
        assert set(limits) == fields, name


def test_every_message_of_the_schema_is_an_event_or_named_as_a_part() -> None:
    frames = {"Envelope", "Hello", "Welcome"}
    assert set(pb.DESCRIPTOR.message_types_by_name) - frames == set(LIMITS)


def test_an_event_comes_back_as_it_was() -> None:
    assert decode(*encode(COMPLETED)) == COMPLETED


@given(st.sampled_from(sorted(EVENT_TYPES)), st.binary(max_size=200))
def test_any_bytes_are_an_event_or_a_peer_error(name: str, payload: bytes) -> None:
    try:
        message = decode(name, payload)
    except PeerError:
        return
    assert encode(message)[0] == name


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_damaged_event_is_an_event_or_a_peer_error(position: int, byte: int) -> None:
    name, payload = encode(COMPLETED)
    damaged = bytearray(payload)
    damaged[position % len(damaged)] = byte
    with contextlib.suppress(PeerError):
        encode(decode(name, bytes(damaged)))


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.LearnerJoined(learner="Ada Lovelace"), "is not a name"),
        (pb.TaskFailed(task_id="t" * 201, learner="ada"), "201 characters; allowed are 1 to 200"),
        (pb.Progress(task_id="t", learner="a", state="x", fraction=2), "allowed are 0 to 1"),
        (
            pb.TaskCompleted(task_id="t", learner="a", metrics={"loss": float("nan")}),
            "it must be finite",
        ),
        (pb.UpdateStored(task_id="t", learner="a", digest=b"short"), "a SHA-256 digest has 32"),
        (pb.TaskCancelled(task_id="../keys"), "is '../keys'; allowed are letters, digits"),
        (pb.RunFinished(run_id="..", outcome=pb.RunFinished.FAILED), "is '..'; allowed"),
    ],
)
def test_a_limit_is_named_to_the_peer_and_to_us(message: pb.TaskFailed, complaint: str) -> None:
    name = message.DESCRIPTOR.name
    with pytest.raises(PeerError, match=complaint):
        decode(name, message.SerializeToString())
    with pytest.raises(ValueError, match=complaint):
        encode(message)


def test_an_unknown_type_and_a_flood_of_bytes_are_refused() -> None:
    with pytest.raises(PeerError, match="unknown event type 'Shutdown'"):
        decode("Shutdown", b"")
    with pytest.raises(PeerError, match=f"at most {PAYLOAD_BYTES_MAX}"):
        decode("TaskFailed", bytes(PAYLOAD_BYTES_MAX + 1))


@pytest.mark.parametrize("message", [pb.RunStarted(run_id="r"), pb.RunStopped(run_id="r")])
def test_only_drivers_begin_and_stop_runs(message: pb.RunStarted | pb.RunStopped) -> None:
    assert may_send("driver:ops", message)
    for other in ("controller", "learner:ada", "learner:driver", "broker", "drivers:ops", ""):
        assert not may_send(other, message)


def test_a_learner_says_the_steps_of_a_ceremony_for_itself_alone() -> None:
    step = pb.CeremonyStep(ceremony=bytes(16), learner="ada", step=1, signature=bytes(64))
    assert may_send("learner:ada", step)
    for other in ("learner:bob", "controller", "driver:ada", "broker"):
        assert not may_send(other, step)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"ceremony": bytes(15)}, "ceremony has 15 bytes; it has 16"),
        ({"step": 0}, "step is 0; allowed are 1 to 5"),
        ({"step": 6}, "step is 6; allowed are 1 to 5"),
        ({"body": bytes(128 * 1024 + 1)}, "body has 131073 bytes; at most 131072"),
        ({"signature": bytes(65)}, "signature has 65 bytes; it has 64"),
    ],
)
def test_a_step_of_a_ceremony_has_limits(change: dict[str, Any], complaint: str) -> None:
    good = {"ceremony": bytes(16), "learner": "ada", "step": 1, "signature": bytes(64)}
    step = pb.CeremonyStep(**{**good, **change})
    with pytest.raises(PeerError, match=complaint):
        decode("CeremonyStep", step.SerializeToString())
