"""What was received before a restart, or before a round closed, is used once or thrown away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from structlog.testing import capture_logs

from metisfl.controller.admission import Expected
from metisfl.proto.bulk import Code, Credit, Stored
from metisfl.proto.chunk import task_digest
from metisfl.proto.model_file import ModelFile

ADA, BOB = "learner:ada", "learner:bob"
Desks = Callable[[], Any]


def test_a_part_that_the_disk_has_damaged_is_fetched_again(
    desk: Any, model: ModelFile, a_desk: Desks
) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    desk.work()
    path = desk.spool.part_path("t")
    with open(path, "r+b") as part:
        part.seek(model.payload_offset)
        part.write(b"damaged!")
    again = a_desk()
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


def test_after_a_restart_only_the_rest_is_sent(desk: Any, model: ModelFile, a_desk: Desks) -> None:
    desk.open(model)
    desk.chunk(model, 0)
    desk.chunk(model, 1)
    again = a_desk()
    again.expect({"t": Expected(ADA)})
    again.open(model)
    assert again.answer() == Credit(task_digest("t"), 2, 3)
    again.chunk(model, 2)
    again.work()
    assert again.stored == [("t", model.digest(), model.path.stat().st_size)]
    assert again.counts["chunks_received"] == 1


def test_an_update_that_nobody_knew_of_is_announced_after_a_restart(
    desk: Any, model: ModelFile, a_desk: Desks
) -> None:
    desk.upload(model)
    again = a_desk()
    again.expect({"t": Expected(ADA)})
    again.open(model)  # while it is being read
    again.work()
    assert again.stored == desk.stored
    assert again.answer() == Stored(task_digest("t"), model.digest())
    known = a_desk()
    known.expect({"t": Expected(ADA, stored_digest=model.digest())})
    known.open(model)
    assert known.answer() == Stored(task_digest("t"), model.digest())
    assert known.stored == [], "its owner knows already"


def test_an_unusable_update_of_a_former_process_is_asked_for_again(
    desk: Any, small: ModelFile
) -> None:
    desk.spool.update_path("t").write_bytes(b"METISMDL and then the disk was full")
    desk.expect({})
    with capture_logs() as logs:
        desk.expect({"t": Expected(ADA)})
    assert logs[0]["event"] == "spooled update unusable"
    desk.upload(small)
    assert len(desk.stored) == 1


def test_nobody_is_refused_before_the_owner_has_said_what_is_open(
    a_desk: Desks, small: ModelFile, model: ModelFile
) -> None:
    desk = a_desk()
    desk.open(model, "t", ADA)
    desk.open(small, "t", ADA)
    desk.open(small, "old", BOB)
    assert desk.sent == [], "its round may be open, for all we know"
    desk.expect({"t": Expected(ADA)})
    desk.work()
    assert desk.answer() == Credit(task_digest("t"), 0, 1)
    assert desk.refusal(BOB)[0] == Code.UNKNOWN_TASK


def test_an_upload_whose_round_closes_is_told_and_its_part_deleted(
    desk: Any, model: ModelFile
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
    desk: Any, model: ModelFile, small: ModelFile
) -> None:
    desk.upload(small)
    desk.spool.part_path("old").write_bytes(b"")
    desk.expect({})
    assert [path.name for path in desk.spool.folder.iterdir()] == ["t.update"]
