"""Who may upload what is decided by the open tasks alone, and a refusal says what is wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metisfl.controller.admission import Admission, Expected, Refusal
from metisfl.controller.store import ModelStore
from metisfl.proto.bulk import Code, Open
from metisfl.proto.chunk import federation_digest
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor, manifest_of, serialise_manifest

FEDERATION = federation_digest("demo", "run-1")
ADA, BOB = "learner:ada", "learner:bob"


def tensor(name: str, *shape: int) -> Tensor:
    return Tensor(name, np.zeros(shape, np.float32), trainable=True)


def an_open(*tensors: Tensor, task: str = "t", digest: bytes = b"d" * 32) -> Open:
    manifest = manifest_of(tensors)
    return Open(task, FEDERATION, digest, manifest.payload_bytes, serialise_manifest(manifest))


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path)


@pytest.fixture
def admission(store: ModelStore) -> Admission:
    admission = Admission(store)
    admission.expect({"t": Expected(ADA, federation=FEDERATION)})
    return admission


def a_model(store: ModelStore, *tensors: Tensor) -> bytes:
    draft = store.draft(0)
    return store.put(draft, write_model(draft, tensors))


def test_the_learner_that_holds_the_task_may_upload(admission: Admission) -> None:
    assert admission.judge(an_open(tensor("w", 3)), ADA) is None


def test_another_learner_may_not(admission: Admission) -> None:
    refusal = Refusal(Code.NOT_YOURS, "task t is not learner:bob's")
    assert admission.judge(an_open(tensor("w", 3)), BOB) == refusal


def test_a_task_that_is_not_open_is_nobodys(admission: Admission) -> None:
    refusal = admission.judge(an_open(task="old"), ADA)
    assert refusal is not None
    assert refusal.code is Code.UNKNOWN_TASK
    assert refusal.reason == "task old is not open: its round is over, or it never was"


@pytest.mark.parametrize(
    ("federation", "run", "welcome"),
    [("demo", "run-1", True), ("demo", "run-2", False), ("other", "run-1", False)],
)
def test_an_update_is_of_one_run_of_one_federation(
    admission: Admission, federation: str, run: str, welcome: bool
) -> None:
    admission.expect({"t": Expected(ADA, federation=federation_digest(federation, run))})
    refusal = admission.judge(an_open(), ADA)
    assert (refusal is None) == welcome
    assert refusal is None or refusal.code is Code.OTHER_FEDERATION


def test_what_was_refused_once_is_refused_again_and_a_new_update_is_not(
    admission: Admission,
) -> None:
    refusal = Refusal(Code.NON_FINITE, "tensor 'w' holds NaN")
    admission.remember("t", b"d" * 32, refusal)
    assert admission.judge(an_open(), ADA) == refusal
    assert admission.judge(an_open(digest=b"e" * 32), ADA) is None
    admission.expect({})
    admission.expect({"t": Expected(ADA)})
    assert admission.judge(an_open(), ADA) is None, "the task is a new one"


def test_without_a_model_any_manifest_will_do(admission: Admission) -> None:
    assert admission.manifest(an_open(tensor("w", 3))) == manifest_of([tensor("w", 3)])


@pytest.mark.parametrize(
    ("tensors", "story"),
    [
        ([tensor("w", 2, 3), tensor("b", 3)], ""),
        ([tensor("w", 2, 3)], "tensor 'b' exists in the federation and not here"),
        ([tensor("w", 3, 2), tensor("b", 3)], r"'w' is \(3, 2\) here and \(2, 3\) in the federat"),
        ([tensor("b", 3), tensor("w", 2, 3)], "the same tensors in another order"),
    ],
)
def test_an_update_has_the_manifest_of_its_model(
    store: ModelStore, admission: Admission, tensors: list[Tensor], story: str
) -> None:
    digest = a_model(store, tensor("w", 2, 3), tensor("b", 3))
    admission.expect({"t": Expected(ADA, digest)})
    if not story:
        assert admission.manifest(an_open(*tensors)) == manifest_of(tensors)
        return
    with pytest.raises(PeerError, match=story):
        admission.manifest(an_open(*tensors))


def test_the_model_is_read_once_for_all_learners(store: ModelStore, admission: Admission) -> None:
    digest = a_model(store, tensor("w", 3))
    admission.expect({"t": Expected(ADA, digest), "u": Expected(BOB, digest)})
    admission.manifest(an_open(tensor("w", 3)))
    store.delete(digest)
    admission.manifest(an_open(tensor("w", 3), task="u"))


def test_a_model_that_is_not_here_is_this_machines_fault(admission: Admission) -> None:
    admission.expect({"t": Expected(ADA, b"x" * 32)})
    with pytest.raises(MachineError, match="no model 7878"):
        admission.manifest(an_open(tensor("w", 3)))


def test_bytes_that_are_no_manifest_are_the_peers_error(admission: Admission) -> None:
    with pytest.raises(PeerError):
        admission.manifest(Open("t", FEDERATION, bytes(32), 4, b"\xff"))


def test_an_open_must_agree_with_its_manifest(admission: Admission) -> None:
    manifest = serialise_manifest(manifest_of([tensor("w", 3)]))
    with pytest.raises(PeerError, match="announces 4 payload bytes and its manifest has 12"):
        admission.manifest(Open("t", FEDERATION, bytes(32), 4, manifest))
