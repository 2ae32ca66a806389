"""Each learner is told in words what became of its update, and no update disturbs another."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from metisfl.controller.admission import Admission, Expected
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import Uploads
from metisfl.native_c import crc32c
from metisfl.proto.bulk import Chunk, Code, Credit, Frame, Open, Refused, Stored
from metisfl.proto.chunk import (
    CHUNK_BYTES,
    chunk_count,
    chunk_extent,
    describe_chunk,
    federation_digest,
    short_digest,
    task_digest,
)
from metisfl.proto.credit import BUDGET_CHUNKS, RECLAIM_S
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.tensors import Tensor

FEDERATION = federation_digest("demo", "run-1")
ADA, BOB = "learner:ada", "learner:bob"


def a_model(path: Path, chunks: float, *, fill: float = 1.0, name: str = "w") -> ModelFile:
    values = np.full(int(chunks * CHUNK_BYTES / 4), fill, np.float32)
    write_model(path, [Tensor(name, values, trainable=True)])
    return open_model(path)


class Desk:
    """Uploads with everything that it sends and announces written down."""

    def __init__(self, home: Path, **limits: int) -> None:
        self.store = ModelStore(home / "models")
        self.spool = Spool(home / "spool", **limits)
        self.sent: list[tuple[bytes, Frame]] = []
        self.stored: list[tuple[str, bytes, int]] = []
        self.refused: list[tuple[str, str, str]] = []
        self.counts: Counter[str] = Counter()
        self.uploads = Uploads(
            self.spool,
            Admission(self.store),
            lambda route, frame: self.sent.append((route, frame)) is None,
            lambda *what: self.stored.append(what),
            lambda *what: self.refused.append(what),
            self.counts,
        )

    def expect(self, expected: Mapping[str, Expected]) -> None:
        self.uploads.expect(expected, 0.0)

    def open(
        self, model: ModelFile, task: str = "t", who: str = ADA, *, now: float = 0.0, **other: bytes
    ) -> None:
        said = {"federation": FEDERATION, "digest": model.digest(), **other}
        frame = Open(
            task, said["federation"], said["digest"], model.payload_bytes, model.manifest_bytes
        )
        self.uploads.open(frame, who, who.encode(), now)
        self.uploads.work(now)

    def chunk(
        self,
        model: ModelFile,
        index: int,
        task: str = "t",
        who: str = ADA,
        *,
        now: float = 0.0,
        damage: bool = False,
        manifest: bytes | None = None,
    ) -> None:
        start, stop = chunk_extent(index, model.payload_bytes)
        payload = bytearray(model.pread(start, stop - start))
        header = describe_chunk(
            model.manifest,
            index,
            payload,
            federation=FEDERATION,
            manifest_digest=short_digest(manifest or model.manifest_bytes),
            subject=task_digest(task),
            crc32c=crc32c,
        )
        payload[0] ^= damage
        self.uploads.chunk(Chunk(header, payload), who, who.encode(), now)

    def work(self, now: float = 0.0) -> None:
        while self.uploads.work(now):
            pass

    def answer(self, who: str = ADA) -> Frame:
        """The last frame that somebody was sent."""
        return [frame for route, frame in self.sent if route == who.encode()][-1]

    def refusal(self, who: str = ADA) -> tuple[int, str]:
        answer = self.answer(who)
        assert isinstance(answer, Refused), f"not refused but {answer}"
        return answer.code, answer.reason

    def upload(self, model: ModelFile, task: str = "t", who: str = ADA) -> None:
        self.open(model, task, who)
        for index in range(chunk_count(model.payload_bytes)):
            self.chunk(model, index, task, who)
            self.work()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    desk.expect({"t": Expected(ADA, federation=FEDERATION)})
    yield desk
    desk.uploads.close()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ModelFile]:
    with a_model(tmp_path / "m.model", 2.5) as model:
        yield model


@pytest.fixture
def small(tmp_path: Path) -> Iterator[ModelFile]:
    with a_model(tmp_path / "s.model", 0.1) as model:
        yield model


def test_an_update_is_stored_announced_and_acknowledged_in_this_order(
    desk: Desk, model: ModelFile
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


def test_a_small_update_needs_no_credit(desk: Desk, small: ModelFile) -> None:
    frame = Open("t", FEDERATION, small.digest(), small.payload_bytes, small.manifest_bytes)
    desk.uploads.open(frame, ADA, ADA.encode(), 0.0)
    desk.chunk(small, 0)
    desk.work()
    assert [type(frame) for _, frame in desk.sent] == [Stored]


def test_a_repeated_open_of_a_stored_update_is_answered_at_once(
    desk: Desk, small: ModelFile
) -> None:
    desk.upload(small)
    desk.sent.clear()
    desk.open(small)
    assert [frame for _, frame in desk.sent] == [Stored(task_digest("t"), small.digest())]
    assert len(desk.stored) == 1


def test_another_update_for_a_stored_task_is_refused(
    desk: Desk, small: ModelFile, model: ModelFile
) -> None:
    desk.upload(small)
    desk.open(model)
    code, reason = desk.refusal()
    assert code == Code.OTHER_UPDATE
    assert small.digest().hex() in reason


def test_a_learner_that_made_a_new_update_starts_anew(
    desk: Desk, model: ModelFile, tmp_path: Path
) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    with a_model(tmp_path / "new.model", 2.5, fill=2.0) as new:
        desk.open(new)
        assert desk.answer() == Credit(task_digest("t"), 0, 3)
        desk.upload(new)
        assert [digest for _, digest, _ in desk.stored] == [new.digest()]


@pytest.mark.parametrize(
    ("task", "who", "said", "code", "story"),
    [
        ("old", ADA, {}, Code.UNKNOWN_TASK, "task old is not open: its round is over"),
        ("t", BOB, {}, Code.NOT_YOURS, "task t is not learner:bob's"),
        ("t", ADA, {"federation": bytes(16)}, Code.OTHER_FEDERATION, "another federation or run"),
    ],
)
def test_who_may_not_upload_is_told_why_and_the_owner_is_not_bothered(
    desk: Desk,
    model: ModelFile,
    task: str,
    who: str,
    said: dict[str, bytes],
    code: Code,
    story: str,
) -> None:
    desk.open(model, task, who, **said)
    assert desk.refusal(who)[0] == code
    assert story in desk.refusal(who)[1]
    assert desk.refused == []


def test_somebody_elses_chunks_are_dropped(desk: Desk, model: ModelFile) -> None:
    desk.open(model)
    desk.chunk(model, 0, who=BOB)
    assert desk.counts["chunks_unknown"] == 1
    desk.upload(model)
    assert len(desk.stored) == 1


def test_an_update_unlike_the_model_is_refused_with_the_difference(
    desk: Desk, model: ModelFile, small: ModelFile
) -> None:
    draft = desk.store.draft(0)
    a_model(draft, 0.1, name="kernel").close()
    digest = desk.store.put(draft)
    desk.expect({"t": Expected(ADA, digest)})
    desk.open(small)
    story = "tensor 'w' exists here and not in the federation"
    assert desk.refusal() == (Code.BAD_MANIFEST, story)
    assert desk.refused == [("t", ADA, story)]
    with a_model(model.path.with_name("k.model"), 0.1, fill=5.0, name="kernel") as same:
        desk.upload(same)
    assert len(desk.stored) == 1


def test_a_manifest_that_is_none_is_refused(desk: Desk) -> None:
    desk.uploads.open(Open("t", FEDERATION, bytes(32), 4, b"\xff"), ADA, ADA.encode(), 0.0)
    assert desk.refusal()[0] == Code.BAD_MANIFEST


def test_the_open_frame_must_agree_with_its_manifest(desk: Desk, small: ModelFile) -> None:
    frame = Open("t", FEDERATION, bytes(32), 4, small.manifest_bytes)
    desk.uploads.open(frame, ADA, ADA.encode(), 0.0)
    assert "announces 4 payload bytes and its manifest has 26212" in desk.refusal()[1]


def test_nan_is_refused_with_the_tensor_and_refused_again_at_once(
    desk: Desk, tmp_path: Path
) -> None:
    with a_model(tmp_path / "nan.model", 0.1, fill=float("nan")) as model:
        desk.upload(model)
        code, reason = desk.refusal()
        assert (code, desk.refused) == (Code.NON_FINITE, [("t", ADA, reason)])
        assert "tensor 'w' holds NaN" in reason
        desk.sent.clear()
        desk.open(model)
        assert desk.refusal() == (code, reason)
    assert list(desk.spool.folder.iterdir()) == []


def test_a_wrong_digest_is_refused_at_the_end(desk: Desk, small: ModelFile) -> None:
    desk.open(small, digest=b"x" * 32)
    desk.chunk(small, 0)
    desk.work()
    assert desk.refusal()[0] == Code.DIGEST_MISMATCH
    assert len(desk.refused) == 1


def test_a_part_that_the_disk_has_damaged_is_fetched_again(
    desk: Desk, model: ModelFile, tmp_path: Path
) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    desk.work()
    desk.uploads.close()
    path = desk.spool.part_path("t")
    with open(path, "r+b") as part:
        part.seek(model.payload_offset)
        part.write(b"damaged!")
    again = Desk(tmp_path)
    again.expect({"t": Expected(ADA)})
    with capture_logs() as logs:
        again.open(model)
        for index in (1, 2):
            again.chunk(model, index)
        again.work()
    assert [line["event"] for line in logs] == ["spooled part damaged"]
    assert again.refused == [], "it was not the learner's fault"
    again.upload(model)  # after a silence it asks again
    assert len(again.stored) == 1


def test_damaged_chunks_are_asked_for_again_and_the_third_ends_it(
    desk: Desk, model: ModelFile
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


def test_a_gap_is_asked_for_once(desk: Desk, model: ModelFile) -> None:
    desk.open(model)
    desk.sent.clear()
    for index in (2, 2, 1):
        desk.chunk(model, index)
    assert [frame for _, frame in desk.sent] == [Credit(task_digest("t"), 0, 3, rewind=True)]


def test_chunks_of_another_update_than_was_opened_end_it(desk: Desk, model: ModelFile) -> None:
    desk.open(model)
    desk.chunk(model, 0, manifest=b"another")
    assert desk.refusal()[0] == Code.BAD_FRAME


def test_an_upload_whose_round_closes_is_told_and_its_part_deleted(
    desk: Desk, model: ModelFile
) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    desk.expect({})
    assert desk.refusal()[0] == Code.UNKNOWN_TASK
    assert list(desk.spool.folder.iterdir()) == []
    desk.chunk(model, 1)
    desk.work()
    assert desk.stored == []


def test_parts_of_closed_rounds_are_deleted_and_complete_updates_are_not(
    desk: Desk, model: ModelFile, small: ModelFile
) -> None:
    desk.upload(small)
    desk.spool.part_path("old").write_bytes(b"")
    desk.expect({})
    assert [path.name for path in desk.spool.folder.iterdir()] == ["t.update"]


def test_after_a_restart_only_the_rest_is_sent(
    desk: Desk, model: ModelFile, tmp_path: Path
) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    desk.chunk(model, 1)
    desk.uploads.close()
    again = Desk(tmp_path)
    again.expect({"t": Expected(ADA)})
    again.open(model)
    assert again.answer() == Credit(task_digest("t"), 2, 3)
    again.chunk(model, 2)
    again.work()
    assert again.stored == [("t", model.digest(), model.path.stat().st_size)]
    assert again.counts["chunks_received"] == 1


def test_an_update_that_nobody_knew_of_is_announced_after_a_restart(
    desk: Desk, model: ModelFile, tmp_path: Path
) -> None:
    desk.upload(model)
    again = Desk(tmp_path)
    again.expect({"t": Expected(ADA)})
    again.open(model)  # while it is being read
    again.work()
    assert again.stored == desk.stored
    assert again.answer() == Stored(task_digest("t"), model.digest())
    known = Desk(tmp_path)
    known.expect({"t": Expected(ADA, stored_digest=model.digest())})
    known.open(model)
    assert known.answer() == Stored(task_digest("t"), model.digest())
    assert known.stored == [], "its owner knows already"


def test_an_unusable_update_of_a_former_process_is_asked_for_again(
    desk: Desk, small: ModelFile
) -> None:
    desk.spool.update_path("t").write_bytes(b"METISMDL and then the disk was full")
    desk.expect({})
    with capture_logs() as logs:
        desk.expect({"t": Expected(ADA)})
    assert logs[0]["event"] == "spooled update unusable"
    desk.upload(small)
    assert len(desk.stored) == 1


def test_a_full_disk_refuses_one_update_and_lets_the_others_go_on(
    desk: Desk, model: ModelFile, monkeypatch: pytest.MonkeyPatch
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


def test_eighty_uploads_stay_within_the_budget_and_all_end(desk: Desk, tmp_path: Path) -> None:
    learners = many(BUDGET_CHUNKS + 16)
    desk.expect({task: Expected(who) for task, who in learners})
    with a_model(tmp_path / "two.model", 2) as model:
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
    desk: Desk, tmp_path: Path
) -> None:
    learners = many(3)
    desk.expect({task: Expected(who) for task, who in learners})
    with a_model(tmp_path / "big.model", BUDGET_CHUNKS) as model:
        for task, who in learners:
            desk.open(model, task, who)
        assert desk.answer(learners[2][1]) == Credit(task_digest("t2"), 0, 0)
        desk.uploads.unreachable({learners[0][1].encode()})
        desk.work(1.0)
        assert desk.answer(learners[2][1]) == Credit(task_digest("t2"), 0, BUDGET_CHUNKS // 2)
        desk.uploads.tick(RECLAIM_S)
        desk.work(RECLAIM_S)
        desk.chunk(model, 0, *learners[1], now=RECLAIM_S)  # it was only slow
        desk.work(RECLAIM_S)
        assert desk.counts["chunks_received"] == 1


def test_nobody_is_refused_before_the_owner_has_said_what_is_open(
    tmp_path: Path, small: ModelFile, model: ModelFile
) -> None:
    desk = Desk(tmp_path)
    desk.open(model, "t", ADA)
    desk.open(small, "t", ADA)
    desk.open(small, "old", BOB)
    assert desk.sent == [], "its round may be open, for all we know"
    desk.expect({"t": Expected(ADA)})
    desk.work()
    assert desk.answer() == Credit(task_digest("t"), 0, 1)
    assert desk.refusal(BOB)[0] == Code.UNKNOWN_TASK
    desk.uploads.close()


def test_an_update_larger_than_any_may_be_is_refused(tmp_path: Path, small: ModelFile) -> None:
    desk = Desk(tmp_path, update_bytes_max=1000)
    desk.expect({"t": Expected(ADA)})
    desk.open(small)
    assert desk.refusal() == (
        Code.TOO_LARGE,
        "an update of 26212 bytes; this controller takes up to 1000",
    )


def test_refusals_that_a_peer_can_repeat_at_will_do_not_fill_the_log(
    desk: Desk, small: ModelFile
) -> None:
    with capture_logs() as logs:
        for _ in range(100):
            desk.open(small, "closed")
    assert len(logs) == 7
    assert desk.counts["refused_unknown_task"] == 100


def test_who_waits_hears_a_word_every_half_second(desk: Desk, model: ModelFile) -> None:
    desk.open(model)
    desk.sent.clear()
    desk.uploads.tick(0.4)
    assert desk.sent == []
    desk.uploads.tick(0.5)
    assert desk.answer() == Credit(task_digest("t"), 0, 3)
