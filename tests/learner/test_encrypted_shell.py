"""A site with a key sends nothing in plain, seals again what did not fit, and trains it once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_key import public_part
from learner_site import site, task

from metisfl.learner import shell
from metisfl.learner.transfer import NotEncrypted
from metisfl.learner.verification import NotTheFold
from metisfl.learner.worker import Job, Result
from metisfl.proto import events_pb2 as pb
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

PUBLIC = public_part()
NEEDED = (0, 12)


def sealed_task(number: int, attempt: int = 0, **fields: Any) -> pb.TaskAssigned:
    again = f"again{attempt}." if attempt else ""
    return task(
        number,
        task_id=f"r.{number}.train.{again}ada",
        attempt=attempt,
        privacy="ckks",
        reference_weight=10.0,
        exponents=NEEDED if attempt else (),
        **fields,
    )


def training(job: Job) -> Result:
    """What a training process does with a tensor that needs larger exponents."""
    assert job.sealing is not None
    assert job.update_path is not None
    trained = b""
    if job.kind != "seal":
        trained = write_model(job.sealing.trained_path, [Tensor("w", np.ones(3), True)])
    done = Result(b"", 5, 1, {"loss": 0.5}, 0.1, trained_digest=trained, exponents=NEEDED)
    if not job.sealing.exponents:
        return Result(**{**fields_of(done), "exceeded": "w"})
    digest = write_model(job.update_path, [Tensor("sealed", np.zeros(3), True)])
    return Result(**{**fields_of(done), "digest": digest})


def fields_of(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__slots__}


def test_a_site_joins_with_its_privacy_mode_and_its_examples(tmp_path: Path) -> None:
    async def scenario(public: Any, modes: list[str], folder: Path) -> None:
        async with site(folder, public) as ada:
            joined = await ada.said(pb.LearnerJoined)
            assert (list(joined.privacy_modes), joined.examples) == (modes, 7)

    for number, (public, modes) in enumerate(((PUBLIC, ["ckks"]), (None, ["plain"]))):
        folder = tmp_path / str(number)
        folder.mkdir()
        asyncio.run(scenario(public, modes, folder))


@pytest.mark.parametrize(
    ("public", "privacy", "words"),
    [
        (PUBLIC, "plain", "'plain' and this site holds a ckks key"),
        (PUBLIC, "", "'plain' and this site holds a ckks key"),
        (PUBLIC, "ckks-threshold", "'ckks-threshold' and this site holds a ckks key"),
        (None, "ckks", "'ckks' and this site has no key for it"),
    ],
)
def test_a_task_of_another_privacy_mode_is_refused_before_anything_is_done(
    tmp_path: Path, public: Any, privacy: str, words: str
) -> None:
    async def scenario() -> None:
        async with site(tmp_path, public) as ada:
            ada.around.log(task(1, privacy=privacy))
            failed = await ada.said(pb.TaskFailed)
            assert words in failed.reason
            assert ada.around.asked.empty()

    asyncio.run(scenario())


def test_a_plain_update_that_waits_when_the_key_comes_is_not_sent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path) as ada:
            ada.around.trains_at_once = True
            ada.around.log(task(1))
            assert [(await ada.around.next())[0] for _ in range(3)] == [
                "download",
                "train",
                "upload",
            ]
        async with site(tmp_path, PUBLIC) as ada:
            failed = await ada.said(pb.TaskFailed)
            assert "this site holds a ckks key" in failed.reason
            assert ada.around.asked.empty()

    asyncio.run(scenario())


def test_what_the_upload_finds_plain_fails_the_task_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, PUBLIC) as ada:

            async def upload(*_: object, **__: object) -> None:
                raise NotEncrypted("this update is plain; it was not sent")

            ada.around.upload = upload  # type: ignore[method-assign]
            ada.around.answer = training
            ada.around.log(sealed_task(1, attempt=1))
            failed = await ada.said(pb.TaskFailed)
            assert failed.reason == "this update is plain; it was not sent"

    asyncio.run(scenario())


def test_an_update_that_does_not_fit_is_sealed_again_and_trained_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with site(tmp_path, PUBLIC) as ada:
            around = ada.around
            around.answer, around.stores_at_once = training, True
            around.log(sealed_task(1))
            exceeded = await ada.said(pb.ScaleExceeded)
            assert (exceeded.tensor, tuple(exceeded.exponents)) == ("w", NEEDED)
            around.log(sealed_task(1, attempt=1))
            completed = await ada.said(pb.TaskCompleted)
            asked = [await around.next() for _ in range(4)]
            assert asked == [
                ("download", 1),
                ("train", "r.1.train.ada.update"),
                ("seal", "r.1.train.again1.ada.update"),
                ("upload", "r.1.train.again1.ada.update"),
            ]
            first, second = around.jobs
            assert first.sealing is not None
            assert second.sealing is not None
            assert second.sealing.trained_path == first.sealing.trained_path
            assert (second.sealing.exponents, second.sealing.examples) == (NEEDED, 5)
            assert (completed.examples, completed.batches, dict(completed.metrics)) == (
                5,
                1,
                {"loss": 0.5},
            )
            assert tuple(completed.exponents) == NEEDED
            assert second.sealing.trained_path.exists(), "until the round is over"
            ours = pb.Contribution(
                learner="ada", task_id=completed.task_id, weight=0.5, update_digest=bytes(32)
            )
            around.log(pb.RoundClosed(run_id="r", round=1, model_digest=bytes(32), counted=[ours]))
            while second.sealing.trained_path.exists():
                await asyncio.sleep(0)
            assert list((tmp_path / "outbox").iterdir()) == []

    asyncio.run(scenario())


def test_after_a_restart_a_trained_model_is_sealed_if_it_is_whole_and_trained_if_not(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path, PUBLIC) as ada:
            ada.around.answer = training
            ada.around.log(sealed_task(1))
            await ada.said(pb.ScaleExceeded)
            ada.around.answer = None
            ada.around.log(sealed_task(1, attempt=1))
            assert [(await ada.around.next())[0] for _ in range(3)] == ["download", "train", "seal"]
            ada.learner.save()
        async with site(tmp_path, PUBLIC) as ada:
            assert (await ada.around.next())[0] == "seal"
        (trained,) = (tmp_path / "trained").iterdir()
        damaged = bytearray(trained.read_bytes())
        damaged[-1] ^= 1
        trained.write_bytes(damaged)
        async with site(tmp_path, PUBLIC) as ada:
            assert [(await ada.around.next())[0] for _ in range(2)] == ["download", "train"]

    asyncio.run(scenario())


def test_an_update_that_a_power_cut_took_is_sealed_again_from_what_was_trained(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path, PUBLIC) as ada:
            ada.around.answer = training
            ada.around.log(sealed_task(1, attempt=1))
            assert [(await ada.around.next())[0] for _ in range(3)][-1] == "upload"
        (tmp_path / "outbox" / "r.1.train.again1.ada.update").unlink()
        async with site(tmp_path, PUBLIC) as ada:
            assert (await ada.around.next())[0] == "seal"

    asyncio.run(scenario())


def test_a_round_that_is_opened_again_while_it_trains_stops_that_and_starts_anew(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with site(tmp_path, PUBLIC) as ada:
            ada.around.log(sealed_task(1))
            assert [(await ada.around.next())[0] for _ in range(2)] == ["download", "train"]
            ada.around.log(sealed_task(1, attempt=1))
            assert (await ada.around.next())[0] == "cancel"
            ada.around.cancelled.set()
            assert await ada.around.next() == ("train", "r.1.train.again1.ada.update")
            assert list((tmp_path / "outbox").iterdir()) == [], "what the old one wrote is gone"

    asyncio.run(scenario())


@pytest.mark.parametrize("kind", [pb.EVALUATE, pb.TRAIN])
@pytest.mark.parametrize(("mode", "honest"), [("full", True), ("full", False), ("none", False)])
def test_a_model_is_verified_once_before_it_is_opened_if_the_key_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, honest: bool, kind: int
) -> None:
    verified: list[bytes] = []

    async def verify(path: Path, digest: bytes, *_: object) -> None:
        assert (path.stem, digest) == (digest.hex(), bytes([1]) * 32)
        verified.append(digest)
        if not honest:
            raise NotTheFold("the controller folded something else")

    monkeypatch.setattr(shell, "verify", verify)

    async def scenario() -> None:
        async with site(tmp_path, public_part(verify=mode)) as ada:
            if mode == "full" and not honest:
                ada.around.log(sealed_task(1, kind=kind))
                failed = await ada.said(pb.TaskFailed)
                assert failed.reason.endswith("verified: the controller folded something else")
                assert ada.around.jobs == []
            else:
                ada.around.answer = lambda job: Result(examples=3, metrics={"test.mean": 1.0})
                ada.around.log(sealed_task(1, kind=pb.EVALUATE))
                assert (await ada.said(pb.TaskCompleted)).examples == 3
                ada.around.answer = training
                ada.around.log(sealed_task(2, attempt=1, model_digest=bytes([1]) * 32))
                while (await ada.around.next())[0] != "upload":
                    pass
                assert len(verified) == (mode == "full"), "once for both tasks"

    asyncio.run(scenario())


@pytest.mark.parametrize("durable", [True, False])
def test_the_note_of_an_update_is_as_durable_as_the_update(tmp_path: Path, durable: bool) -> None:
    async def scenario() -> None:
        async with site(tmp_path, PUBLIC) as ada:
            ada.around.answer = lambda job: Result(
                **{**fields_of(training(job)), "durable": durable}
            )
            saved: list[bool] = []
            ada.learner.save = lambda *_, durable: saved.append(durable)  # type: ignore[method-assign]
            ada.around.log(sealed_task(1, attempt=1))
            while (await ada.around.next())[0] != "upload":
                pass
            assert saved == [durable]

    asyncio.run(scenario())


def test_opened_models_are_opened_anew_by_a_new_process(tmp_path: Path) -> None:
    """They are not synced, and no digest says what they are: a power cut may have spoilt them."""
    (tmp_path / "models").mkdir()
    for name in ("aa.plain", "bb.plain.partial"):
        (tmp_path / "models" / name).touch()
    (tmp_path / "models" / "aa.model").touch()
    (tmp_path / "verification").mkdir()

    async def scenario() -> None:
        async with site(tmp_path, PUBLIC):
            left = [path.name for path in (tmp_path / "models").iterdir()]
            assert left == ["aa.model"]
            assert not (tmp_path / "verification").exists()

    asyncio.run(scenario())
