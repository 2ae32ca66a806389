"""Each learner is told in words what became of its update, and no update disturbs another."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from metisfl.controller.admission import REJECTED_MAX, Admission, Expected
from metisfl.proto.bulk import Code, Credit, Open, Stored
from metisfl.proto.chunk import federation_digest, task_digest
from metisfl.proto.credit import BUDGET_CHUNKS, RECLAIM_S
from metisfl.proto.model_file import ModelFile

FEDERATION = federation_digest("demo", "run-1")
ADA, BOB = "learner:ada", "learner:bob"
Models = Callable[..., ModelFile]


def test_an_update_is_stored_announced_and_acknowledged_in_this_order(
    desk: Any, model: ModelFile
) -> None:
    desk.open(model)
    assert desk.answer() == Credit(task_digest("t"), 0, 3)
    desk.chunk(model, 0)
    desk.chunk(model, 1)
    desk.work()
    assert desk.answer() == Credit(task_digest("t"), 2, 3)
    assert desk.stored == []
    desk.chunk(model, 2)
    desk.work()
    assert desk.answer() == Stored(task_digest("t"), model.digest())
    assert desk.stored == [("t", model.digest(), model.path.stat().st_size)]


def test_a_small_update_needs_no_credit(desk: Any, small: ModelFile) -> None:
    frame = Open("t", FEDERATION, small.digest(), small.payload_bytes, small.manifest_bytes)
    desk.uploads.open(frame, ADA, ADA.encode(), 0.0)
    desk.chunk(small, 0)
    desk.work()
    assert [type(frame) for _, frame in desk.sent] == [Stored]


def test_a_repeated_open_of_a_stored_update_is_answered_at_once(
    desk: Any, small: ModelFile
) -> None:
    desk.upload(small)
    desk.sent.clear()
    desk.open(small)
    assert [frame for _, frame in desk.sent] == [Stored(task_digest("t"), small.digest())]
    assert len(desk.stored) == 1


def test_another_update_for_a_stored_task_is_refused(
    desk: Any, small: ModelFile, model: ModelFile
) -> None:
    desk.upload(small)
    desk.open(model)
    code, reason = desk.refusal()
    assert code == Code.OTHER_UPDATE
    assert small.digest().hex() in reason


def test_who_may_not_upload_is_told_why_and_the_owner_is_not_bothered(
    desk: Any, small: ModelFile
) -> None:
    desk.open(small, "t", BOB)
    assert desk.refusal(BOB) == (Code.NOT_YOURS, "task t is not learner:bob's")
    assert desk.refused == []


def test_an_update_that_cannot_be_used_is_refused_to_both(desk: Any) -> None:
    desk.uploads.open(Open("t", FEDERATION, bytes(32), 4, b"\xff"), ADA, ADA.encode(), 0.0)
    code, reason = desk.refusal()
    assert code == Code.BAD_MANIFEST
    assert desk.refused == [("t", ADA, reason)]


def test_offers_that_cannot_be_used_cost_few_looks_and_few_lines(
    desk: Any, small: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bytes] = []
    look = Admission.manifest

    def looked(admission: Admission, frame: Open) -> Any:
        looks.append(frame.digest)
        return look(admission, frame)

    monkeypatch.setattr(Admission, "manifest", looked)
    with capture_logs() as logs:
        for number in [*range(100), *range(100)]:
            digest = number.to_bytes(32, "big")
            desk.uploads.open(Open("t", FEDERATION, digest, 4, b"\xff"), ADA, ADA.encode(), 0.0)
            assert desk.refusal()[0] == Code.BAD_MANIFEST
    assert len(looks) == len(set(looks)) == REJECTED_MAX, "each once, and then none"
    assert "8 updates for task t were refused; it gets no more chances" in desk.refusal()[1]
    assert [line["count"] for line in logs] == [1, 2, 4, 8, 16, 32, 64, 128]
    with capture_logs() as logs:
        desk.open(small, "t", BOB)
    assert [line["learner"] for line in logs] == [BOB], "nobody hides behind another's lines"
    desk.expect({"u": Expected(ADA)})
    desk.upload(small, "u")
    assert [task for task, _, _ in desk.stored] == ["u"], "a new task has its chances"


def test_a_learner_that_made_a_new_update_starts_anew(
    desk: Any, model: ModelFile, a_model: Models
) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    new = a_model(2.5, 2.0)
    desk.upload(new)
    assert [digest for _, digest, _ in desk.stored] == [new.digest()]


def test_somebody_elses_chunks_are_dropped(desk: Any, model: ModelFile) -> None:
    desk.open(model)
    desk.chunk(model, 0, who=BOB)
    assert desk.counts["chunks_unknown"] == 1
    desk.upload(model)
    assert len(desk.stored) == 1


def test_nan_is_refused_with_the_tensor_and_refused_again_at_once(
    desk: Any, a_model: Models
) -> None:
    model = a_model(0.1, float("nan"))
    desk.upload(model)
    code, reason = desk.refusal()
    assert (code, desk.refused) == (Code.NON_FINITE, [("t", ADA, reason)])
    assert "tensor 'w' holds NaN" in reason
    desk.sent.clear()
    desk.open(model)
    assert desk.refusal() == (code, reason)
    assert list(desk.spool.folder.iterdir()) == []


def test_a_wrong_digest_is_refused_at_the_end(desk: Any, small: ModelFile) -> None:
    desk.open(small, digest=b"x" * 32)
    desk.chunk(small, 0)
    desk.work()
    assert desk.refusal()[0] == Code.DIGEST_MISMATCH
    assert len(desk.refused) == 1


def test_damaged_chunks_are_asked_for_again_and_the_third_ends_it(
    desk: Any, model: ModelFile
) -> None:
    desk.open(model)
    desk.chunk(model, 0, damage=True)
    assert desk.answer() == Credit(task_digest("t"), 0, 3, rewind=True)
    desk.chunk(model, 0)
    desk.work()
    assert desk.answer() == Credit(task_digest("t"), 1, 3)
    for _ in range(3):
        desk.chunk(model, 1, damage=True)
    assert desk.refusal()[0] == Code.DAMAGED
    assert desk.counts["chunks_damaged"] == 4


def test_a_gap_is_asked_for_once(desk: Any, model: ModelFile) -> None:
    desk.open(model)
    desk.sent.clear()
    for index in (2, 2, 1):
        desk.chunk(model, index)
    assert [frame for _, frame in desk.sent] == [Credit(task_digest("t"), 0, 3, rewind=True)]


def test_chunks_of_another_update_than_was_opened_end_it(desk: Any, model: ModelFile) -> None:
    desk.open(model)
    desk.chunk(model, 0, manifest=b"another")
    assert desk.refusal()[0] == Code.BAD_FRAME


def test_a_full_disk_refuses_one_update_and_lets_the_others_go_on(
    desk: Any, model: ModelFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.expect({"t": Expected(ADA), "u": Expected(BOB)})
    desk.open(model)
    desk.open(model, "u", BOB)
    real = os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with capture_logs() as logs:
        desk.chunk(model, 0)
    monkeypatch.setattr(os, "pwrite", real)
    assert desk.refusal()[0] == Code.NO_SPACE
    assert "No space left on device" in desk.refusal()[1]
    assert [line["log_level"] for line in logs] == ["error"]
    desk.upload(model, "u", BOB)
    assert [task for task, _, _ in desk.stored] == ["u"]
    desk.upload(model)
    assert [task for task, _, _ in desk.stored] == ["u", "t"], "there is room again"


def many(count: int) -> Sequence[tuple[str, str]]:
    return [(f"t{number}", f"learner:l{number}") for number in range(count)]


def test_eighty_uploads_stay_within_the_budget_and_all_end(desk: Any, a_model: Models) -> None:
    learners = many(BUDGET_CHUNKS + 16)
    desk.expect({task: Expected(who) for task, who in learners})
    model = a_model(2)
    for task, who in learners:
        desk.open(model, task, who)
    sent = dict.fromkeys(learners, 0)
    while len(desk.stored) < len(learners):
        before = sum(sent.values())
        for task, who in learners:
            answer = desk.answer(who)
            if isinstance(answer, Credit) and sent[task, who] < answer.limit:
                desk.chunk(model, sent[task, who], task, who)
                sent[task, who] += 1
                desk.work()
        assert sum(sent.values()) > before, "nobody has credit and nobody gets any"
    assert desk.counts["upload_chunks_granted_max"] <= BUDGET_CHUNKS


def test_the_credit_of_the_silent_and_of_the_gone_is_given_to_others(
    desk: Any, a_model: Models
) -> None:
    learners = many(4)
    desk.expect({task: Expected(who) for task, who in learners})
    window = BUDGET_CHUNKS // 2
    model = a_model(BUDGET_CHUNKS)
    for task, who in learners:
        desk.open(model, task, who)
    assert desk.answer(learners[2][1]) == Credit(task_digest("t2"), 0, 0)
    desk.uploads.unreachable({learners[0][1].encode()})
    desk.work(1.0)
    assert desk.answer(learners[2][1]) != Credit(task_digest("t2"), 0, 0), "l0 is gone"
    desk.open(model, *learners[3], now=RECLAIM_S / 2)
    desk.uploads.tick(RECLAIM_S)
    desk.work(RECLAIM_S)
    assert desk.answer(learners[3][1]) == Credit(task_digest("t3"), 0, window), "two are silent"
    desk.chunk(model, 0, *learners[1], now=RECLAIM_S)  # it was only slow
    desk.work(RECLAIM_S)
    assert desk.counts["chunks_received"] == 1


def test_refusals_that_a_peer_can_repeat_at_will_do_not_fill_the_log(
    desk: Any, small: ModelFile
) -> None:
    with capture_logs() as logs:
        for _ in range(100):
            desk.open(small, "closed")
    assert len(logs) == 7
    assert desk.counts["refused_unknown_task"] == 100


def test_who_waits_hears_a_word_every_half_second(desk: Any, model: ModelFile) -> None:
    desk.open(model)
    desk.sent.clear()
    desk.uploads.tick(0.4)
    assert desk.sent == []
    desk.uploads.tick(0.5)
    assert desk.answer() == Credit(task_digest("t"), 0, 3)
