"""The controller's shell: what it deletes nobody needs, and what it cannot do ends it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import pytest
from shell_world import DEADLINE_S, PLAN, World, audited, world
from structlog.testing import capture_logs

from metisfl.broker.client import Batch, Record
from metisfl.controller import shell
from metisfl.controller.room import NoRoom
from metisfl.controller.store import ModelStore
from metisfl.proto import events_pb2 as pb
from metisfl.proto.errors import MachineError
from metisfl.proto.frames import Beat


def test_what_is_over_is_deleted_before_the_next_round_can_bring_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ModelStore.keep

    async def scenario() -> None:
        async with world(tmp_path) as one:
            history = one.around.history

            def keep(store: ModelStore, digests: Collection[bytes]) -> list[bytes]:
                history.append("deleted")
                return kept(store, digests)

            monkeypatch.setattr(ModelStore, "keep", keep)
            one.around.refused = "r.6.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            steps = [step for step in history if step in ("RoundClosed", "deleted")]
            assert steps == ["deleted", "RoundClosed"] * 6
            assert len(one.store.digests()) == 4, "the current model and those just before it"
            assert one.spool.stored() == ["r.5.train.ada"]
            assert len(set(one.around.keys)) == len(one.around.keys), "nothing is said twice"
            records = sorted(path.name for path in (tmp_path / "rounds" / "r").iterdir())
            assert records == [f"{number:06}.msgpack" for number in range(6)]

    asyncio.run(scenario())


@pytest.mark.parametrize("what", ["an update came", "a lease ended"])
def test_a_controller_that_cannot_write_ends_and_does_not_go_on_without(
    tmp_path: Path, what: str
) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.1.train.ada"
            if what == "a lease ended":
                one.plan.lease_s = 0.5
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            one.connection.execute("PRAGMA query_only = ON")  # as a disk that went read-only
            if what == "an update came":
                one.controller.on_stored(one.around.refused, bytes(32), 1)
            with pytest.raises(MachineError, match="db: attempt to write a readonly database"):
                await asyncio.wait_for(one.controller.failed, DEADLINE_S)

    asyncio.run(scenario())


def test_a_restarted_controller_reads_all_of_the_log_before_it_acts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.2.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            log, decided = one.around.logged, one.outbox.last()
        again = World(tmp_path)
        with closing(again.connection):
            batches = [Batch((record,), record.sequence, False, 0) for record in log]
            again.around.replayed = [*batches, Batch((), len(log), True, 0)]
            following = asyncio.create_task(again.controller.follow())
            # It has nothing to decide: the round is open and its task is being worked on.
            again.around.log("learner:ada", pb.TaskFailed(
                task_id="r.2.train.ada", learner="ada", reason="enough"
            ))  # fmt: skip
            while again.around.logged[-1].type != "RunFinished":
                await asyncio.sleep(0)
            following.cancel()
            assert again.outbox.last() == decided + 1, "only the end of the run is new"

    asyncio.run(scenario())


def test_a_restarted_controller_takes_its_snapshot_and_reads_only_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shell, "SNAPSHOT_EVENTS", 7)

    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.3.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            log, decided, state = one.around.logged, one.outbox.last(), one.controller.run
        again = World(tmp_path)
        with closing(again.connection):
            known = again.outbox.cursor("f/")
            assert len(log) - 7 < known <= len(log)
            again.around.replayed = [
                Batch((record,), record.sequence, record is log[-1], 0) for record in log[known:]
            ]
            following = asyncio.create_task(again.controller.follow())
            while again.controller.run != state:
                await asyncio.sleep(0)
            following.cancel()
            assert again.outbox.last() == decided, "nothing is decided again"

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_controller_that_lost_what_the_log_no_longer_holds_does_not_guess(tmp_path: Path) -> None:
    async def scenario() -> None:
        one = World(tmp_path)
        with closing(one.connection):
            one.around.replayed = [Batch((), 900, True, 800)]
            with pytest.raises(
                MachineError, match=r"log begins behind 800.*restore the newest copy"
            ):
                await one.controller.follow()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_learner_that_left_is_admitted_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.1.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            one.around.log("learner:ada", pb.LearnerLeft(learner="ada", reason="reboot"))
            one.around.log("learner:ada", pb.LearnerJoined(learner="ada"))
            while one.around.history[-1] != "MemberAdmitted":
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_who_asks_for_a_run_and_how_it_ends_is_recorded_once_whatever_is_read_again(
    tmp_path: Path,
) -> None:
    async def ended_again(one: World, log: list[Record]) -> None:
        """The log so far, of which it saw nothing yet; then the only learner gives up."""
        one.around.replayed = [Batch((record,), record.sequence, False, 0) for record in log]
        one.around.replayed.append(Batch((), len(log), True, 0))
        following = asyncio.create_task(one.controller.follow())
        if log[-1].type != "RunFinished":
            failed = pb.TaskFailed(task_id="r.1.train.ada", learner="ada", reason="enough")
            one.around.log("learner:ada", failed)
        while one.controller.run.finished is None:
            await asyncio.sleep(0)
        following.cancel()

    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.1.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            log = one.around.logged
        asked = ("run asked for", {"by": "driver:me", "run": "r", "event": 1})
        assert audited(tmp_path) == [asked]
        again = World(tmp_path)
        with closing(again.connection):
            again.around._logged = len(log)
            await ended_again(again, log)
            log = [*log, *again.around.logged]
            finished = again.controller.run.finished
            assert finished is not None
        record = finished.record.hex()
        end = {"run": "r", "outcome": "FAILED", "record": record, "event": len(log)}
        assert audited(tmp_path) == [asked, ("run finished", end)]
        for folder in (tmp_path, tmp_path / "another"):  # the second has never run before
            folder.mkdir(exist_ok=True)
            (folder / "db").unlink(missing_ok=True)
            third = World(folder)
            with closing(third.connection):
                await ended_again(third, log)
            assert audited(folder) == [asked, ("run finished", end)]

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_run_that_is_asked_for_in_vain_is_recorded_as_a_refusal(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.1.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            for number in range(9):
                other = pb.RunStarted()
                other.CopyFrom(PLAN)
                other.run_id = f"other{number}"
                one.around.log("driver:eve", other)
            while one.around.history.count("RunFinished") < 9:
                await asyncio.sleep(0)
            _, (what, facts) = audited(tmp_path)
            assert (what, facts["who"], facts["run"]) == ("run refused", "driver:eve", "other0")
            assert "run r is training; wait for its end" in facts["why"]

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_what_a_learner_repeats_at_will_does_not_fill_the_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world(tmp_path) as one:
            one.around.refused = "r.1.train.ada"
            await asyncio.wait_for(one.around.asked.wait(), DEADLINE_S)
            late = pb.TaskFailed(task_id="r.0.initialise.ada", learner="ada", reason="lie")
            with capture_logs() as logs:
                for _ in range(100):
                    one.around.log("learner:ada", late)
                    one.around.log("learner:eve", late)
                    one.around.log("learner:ada", pb.LearnerJoined(learner="ada"), garbled=True)
                    await asyncio.sleep(0)
                one.around.log("driver:eve", PLAN)  # the last of them
                while not any(line["publisher"] == "driver:eve" for line in logs):
                    await asyncio.sleep(0)
        for event, who in [
            ("event dropped", "learner:ada"),
            ("event dropped", "learner:eve"),
            ("event refused", "learner:ada"),
        ]:
            lines = [line for line in logs if (line["event"], line["publisher"]) == (event, who)]
            assert [line["count"] for line in lines] == [1, 2, 4, 8, 16, 32, 64], (event, who)

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_beats_that_cannot_be_read_do_not_fill_the_log_either(tmp_path: Path) -> None:
    async def scenario() -> None:
        one = World(tmp_path)
        with closing(one.connection), capture_logs() as logs:
            one.around.beaten = [Beat("f/beat/ada/", "Progress", b"\xff")] * 20
            await one.controller.listen()
        assert [line["count"] for line in logs] == [1, 2, 4, 8, 16]

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_stop_is_recorded_and_ends_a_fold_that_waits_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()

    def fold_round(*of: object) -> bytes:
        full.set()
        raise NoRoom("no room")

    async def scenario() -> None:
        async with world(tmp_path) as one:
            assert await asyncio.to_thread(full.wait, DEADLINE_S)
            for driver in ("driver:eve", "driver:ops"):
                one.around.log(driver, pb.RunStopped(run_id="r", reason="lunch"))
            while one.controller.run.finished is None:
                await asyncio.sleep(0)
            _, (what, facts), refused, (_, end) = audited(tmp_path)
            assert (what, facts["by"], facts["reason"]) == ("run stopped", "driver:eve", "lunch")
            assert (refused[0], refused[1]["who"]) == ("stop refused", "driver:ops")
            assert end["outcome"] == "STOPPED"

    monkeypatch.setattr(shell, "fold_round", fold_round)
    monkeypatch.setattr(shell, "ROOM_S", 0.01)
    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))
