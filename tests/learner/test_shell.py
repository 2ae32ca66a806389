"""What the tasks call for is done once, let go of when it must be, and never ends the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from learner_site import LANE, site, task

from metisfl.learner import shell
from metisfl.learner.state import TaskTable
from metisfl.learner.task import Stage
from metisfl.proto import events_pb2 as pb
from metisfl.proto.events import encode


def test_a_learner_that_ends_while_it_trains_reports_nothing_and_trains_later(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.log(task(1))
            assert await ada.around.next() == ("download", 1)
            assert await ada.around.next() == ("train", "r.1.train.ada.update")
            ada.learner.save()
            await ada.learner.end()
            assert [type(one) for one in ada.published()] == [pb.LearnerJoined]
            (job,) = TaskTable(ada.database).load("ada").jobs.values()
            assert job.stage is Stage.WORKING

    asyncio.run(scenario())


def test_stopping_a_task_that_waits_its_turn_stops_that_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.log(task(1))
            assert await ada.around.next() == ("download", 1)
            assert (await ada.around.next())[0] == "train"
            cancels = [pb.TaskCancelled(task_id=task(number).task_id) for number in (1, 2)]
            # As after a long absence: the log holds tasks that were given up in the meantime.
            ada.around.log(cancels[0], task(2), cancels[1], task(3))
            assert (await ada.around.next())[0] == "cancel"
            ada.around.cancelled.set()
            assert await ada.around.next() == ("download", 3), "nothing is fetched for task 2"
            assert await ada.around.next() == ("train", "r.3.train.ada.update")
            left = [path.name for path in (tmp_path / "outbox").iterdir()]
            assert left == [], "what a stopped task wrote at last is gone"

    asyncio.run(scenario())


def test_a_model_that_the_controller_has_no_more_fails_the_task_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.refuse_models = True
            ada.around.log(task(1))
            failed = await ada.said(pb.TaskFailed)
            assert failed.reason.endswith("no model of this digest here")
            ada.around.refuse_models = False
            ada.around.log(task(2))
            assert await ada.around.next() == ("download", 2)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("event", "publisher"),
    [
        (("TaskAssigned", b"\xff\xff"), "controller"),
        (("FromTheFuture", b""), "controller"),
        (encode(task(1)), "driver:mallory"),
        (encode(pb.RunFinished(run_id="r", outcome=pb.RunFinished.FAILED)), "driver:mallory"),
    ],
)
def test_what_is_no_event_or_not_the_senders_to_send_changes_nothing(
    tmp_path: Path, event: tuple[str, bytes], publisher: str
) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.log(task(2))
            assert await ada.around.next() == ("download", 2)
            assert (await ada.around.next())[0] == "train"
            ada.around.log_raw(event, publisher=publisher)
            ada.around.log(task(3))
            assert (await ada.around.next())[0] == "cancel", "it was read, and the next one, too"
            ada.around.cancelled.set()
            assert await ada.around.next() == ("download", 3)
            ada.learner.save()
            assert list(TaskTable(ada.database).load("ada").jobs) == [task(3).task_id]

    asyncio.run(scenario())


def test_updates_of_tasks_that_are_over_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "outbox").mkdir()
    for name in ("r.7.train.ada.update", "r.8.train.ada.update.partial"):
        (tmp_path / "outbox" / name).touch()

    async def scenario() -> None:
        async with site(tmp_path):
            assert list((tmp_path / "outbox").iterdir()) == []

    asyncio.run(scenario())


def test_an_update_is_sent_again_after_a_restart_and_made_again_only_if_it_is_lost(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.trains_at_once = True
            ada.around.log(task(1))
            steps = [(await ada.around.next())[0] for _ in range(3)]
            assert steps == ["download", "train", "upload"]
            assert ada.outbox.cursor(LANE) == 1, "saved with the update, before it is sent"
        async with site(tmp_path) as ada:
            assert await ada.around.next() == ("upload", "r.1.train.ada.update")
        (tmp_path / "outbox" / "r.1.train.ada.update").unlink()
        async with site(tmp_path) as ada:
            assert [(await ada.around.next())[0] for _ in range(2)] == ["download", "train"]

    asyncio.run(scenario())


def test_an_update_that_the_controller_has_no_room_for_is_offered_until_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "ROOM_S", 0.0)

    async def scenario() -> None:
        async with site(tmp_path) as one:
            one.around.trains_at_once = one.around.stores_at_once = True
            one.around.no_room_for = 3
            one.around.log(task(1))
            await one.said(pb.TaskCompleted)
            asked = [one.around.asked.get_nowait()[0] for _ in range(one.around.asked.qsize())]
            assert asked.count("upload") == 4
            assert len(one.around.jobs) == 1, "it is trained once"

    asyncio.run(scenario())
