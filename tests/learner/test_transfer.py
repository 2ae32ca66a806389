"""Transfers over real CURVE sockets: whole models, across restarts, until they are cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np
import pytest
import zmq
from structlog.testing import capture_logs

from metisfl.broker.client import ClientKeys
from metisfl.controller.bulk import BulkEndpoint, Expected
from metisfl.controller.spool import Spool, StagedUpdate
from metisfl.controller.store import ModelStore
from metisfl.deploy.keys import Identity
from metisfl.learner import transfer
from metisfl.learner.part import PartFile
from metisfl.learner.transfer import BulkClient, DownloadRefused, NotEncrypted, UploadRefused
from metisfl.proto import credit
from metisfl.proto.bulk import Code
from metisfl.proto.chunk import CHUNK_BYTES
from metisfl.proto.model_file import open_model, write_model
from metisfl.proto.tensors import Tensor

CONTROLLER = Identity("controller", *zmq.curve_keypair())
ADA = Identity("learner:ada", *zmq.curve_keypair())
KEYS = ClientKeys(ADA.public, ADA.secret, CONTROLLER.public)
T = TypeVar("T")


def random_floats(count: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(count).astype(np.float32)


MODELS = {
    "tiny": [Tensor("w", random_floats(1000), True)],
    "3 MB": [Tensor("w", random_floats(3 << 18), True)],
    "several dtypes": [
        Tensor("half", random_floats(100_001).astype(np.float16), True),
        Tensor("brain", random_floats(100_003).astype(ml_dtypes.bfloat16), True),
        Tensor("double", random_floats(70_001).astype(np.float64), True),
        Tensor("steps", np.arange(40_001, dtype=np.int64), False),
        Tensor("mask", np.arange(300_001) % 3 == 0, False),
        Tensor("nothing", np.empty((0, 4), np.float32), True),
    ],
    "empty": [Tensor("nothing", np.empty(0, np.float32), True)],
}


class Site:
    """A controller's bulk endpoint that can be closed and started again at its address."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.store = ModelStore(home / "models")
        self.endpoint = "tcp://127.0.0.1:*"
        self.stored: list[tuple[str, bytes, int]] = []
        self.start()

    def start(self) -> None:
        self.spool = Spool(self.home / "spool")
        self.bulk = BulkEndpoint(
            endpoint=self.endpoint,
            identity=CONTROLLER,
            peers={ADA.public: ADA.principal},
            store=self.store,
            spool=self.spool,
            on_stored=lambda *what: self.stored.append(what),
            on_refused=lambda *what: None,
        )
        self.bulk.expect({"t": Expected(ADA.principal), "u": Expected(ADA.principal)})
        self.bulk.start()
        self.endpoint = self.bulk.endpoint

    def restart(self) -> dict[str, int]:
        """Close, start anew, and return what the old one counted."""
        self.bulk.close()
        counts = self.bulk.counts
        self.start()
        return counts

    def put(self, tensors: list[Tensor]) -> bytes:
        draft = self.store.draft(0)
        return self.store.put(draft, write_model(draft, tensors))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "site")
    yield site
    site.bulk.close()
    site.bulk.finished.result(timeout=10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes tenths."""
    monkeypatch.setattr(credit, "SILENCE_S", 0.2)


def run(site: Site, work: Callable[[BulkClient], Awaitable[T]]) -> T:
    async def go() -> T:
        async with BulkClient(site.endpoint, KEYS, federation="demo") as client:
            return await asyncio.wait_for(work(client), 30)

    return asyncio.run(go())


@pytest.mark.parametrize("name", MODELS)
def test_an_update_arrives_byte_for_byte(site: Site, tmp_path: Path, name: str) -> None:
    path = tmp_path / "update"
    digest = write_model(path, MODELS[name])
    assert run(site, lambda client: client.upload("t", path)) == digest
    assert site.spool.update_path("t").read_bytes() == path.read_bytes()
    assert site.stored == [("t", digest, path.stat().st_size)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_arrives_byte_for_byte(site: Site, tmp_path: Path, name: str) -> None:
    digest = site.put(MODELS[name])
    path = tmp_path / "got.model"
    run(site, lambda client: client.download(digest, path))
    assert path.read_bytes() == site.store.path(digest).read_bytes()
    assert list(tmp_path.glob("*.part")) == []


def test_a_connection_is_used_again_and_transfers_may_overlap(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    connect = BulkClient._connect

    def counted(client: BulkClient) -> Any:
        made.append(client)
        return connect(client)

    monkeypatch.setattr(BulkClient, "_connect", counted)
    digest = site.put(MODELS["3 MB"])
    write_model(tmp_path / "update", MODELS["3 MB"])

    async def work(client: BulkClient) -> None:
        for number in range(3):
            await client.download(digest, tmp_path / f"got-{number}")
        assert len(made) == 1, "each download made a connection"
        await asyncio.gather(
            client.upload("t", tmp_path / "update", digest=digest),
            client.download(digest, tmp_path / "got"),
            client.upload("u", tmp_path / "update", digest=digest),
        )
        assert len(made) == 3, "two transfers shared a connection"

    run(site, work)
    assert sorted(task for task, _, _ in site.stored) == ["t", "u"]


@pytest.mark.usefixtures("impatient")
def test_after_a_restart_of_the_controller_only_the_rest_of_an_update_is_sent(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "update"
    digest = write_model(path, [Tensor("w", random_floats(25 << 18), True)])
    write = StagedUpdate.write

    async def work(client: BulkClient) -> int:
        loop, begun, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

        def held_up(staged: StagedUpdate, payload: bytes) -> None:
            write(staged, payload)
            if staged.received == 10:
                loop.call_soon_threadsafe(begun.set)
                go_on.wait(10)

        monkeypatch.setattr(StagedUpdate, "write", held_up)
        upload = asyncio.ensure_future(client.upload("t", path))
        await begun.wait()
        monkeypatch.setattr(site.bulk, "_stopping", True)  # what close() does, but not yet waiting
        go_on.set()
        counts = site.restart()
        await upload
        return counts["chunks_received"]

    before = run(site, work)
    after = site.bulk.counts["chunks_received"]
    whole = (25 << 20) // CHUNK_BYTES
    assert before + after == whole, f"{before} + {after} chunks were sent, there are {whole}"
    assert 0 < after < whole
    assert [(task, found) for task, found, _ in site.stored] == [("t", digest)]
    assert site.spool.update_path("t").read_bytes() == path.read_bytes()


@pytest.mark.usefixtures("impatient")
def test_a_download_goes_on_after_a_restart_of_the_controller(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = site.put([Tensor("w", random_floats(20 << 18), True)])
    append = PartFile.append
    interrupted: list[dict[str, int]] = []

    def restarting(part: PartFile, payload: bytes) -> None:
        append(part, payload)
        if part.received == 30 and not interrupted:
            interrupted.append(site.restart())

    monkeypatch.setattr(PartFile, "append", restarting)
    run(site, lambda client: client.download(digest, tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == site.store.path(digest).read_bytes()
    assert site.bulk.counts["chunk_bytes_sent"] <= (20 << 20) - 30 * CHUNK_BYTES


def test_a_download_goes_on_in_a_new_process(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = site.put(MODELS["3 MB"])
    append = PartFile.append

    appended: list[int] = []

    def killing(part: PartFile, payload: bytes) -> None:
        append(part, payload)
        appended.append(part.received)
        if len(appended) == 7:
            raise KeyError("a sudden end")

    monkeypatch.setattr(PartFile, "append", killing)
    with pytest.raises(KeyError, match="a sudden end"):
        run(site, lambda client: client.download(digest, tmp_path / "got"))
    run(site, lambda client: client.download(digest, tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == site.store.path(digest).read_bytes()
    assert appended == list(range(1, 13)), "chunks were fetched twice"


def test_a_damaged_part_is_thrown_away_and_fetched_again(site: Site, tmp_path: Path) -> None:
    digest, path = site.put(MODELS["3 MB"]), tmp_path / "got"
    with PartFile(path, digest) as part, site.store.open(digest) as model:
        part.begin(model.manifest_bytes)
        for _ in range(7):
            part.append(bytes(CHUNK_BYTES))
    run(site, lambda client: client.download(digest, path))
    assert path.read_bytes() == site.store.path(digest).read_bytes()


def test_a_store_that_sends_another_model_is_not_believed(site: Site, tmp_path: Path) -> None:
    digest = site.put(MODELS["3 MB"])
    path = site.store.path(digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DownloadRefused, match="has another digest; its store is damaged"):
        run(site, lambda client: client.download(digest, tmp_path / "got"))
    assert not (tmp_path / "got").exists()


def test_an_unknown_model_is_refused_by_its_digest(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadRefused, match="no model 7878"):
        run(site, lambda client: client.download(b"x" * 32, tmp_path / "got"))


def test_a_refused_update_is_refused_in_words_and_the_client_goes_on(
    site: Site, tmp_path: Path
) -> None:
    values = random_floats(1 << 18)
    values[200_000] = np.inf
    write_model(tmp_path / "bad", [Tensor("dense/kernel", values, True)])
    write_model(tmp_path / "good", MODELS["tiny"])

    async def work(client: BulkClient) -> None:
        with pytest.raises(UploadRefused, match="'dense/kernel' holds NaN or inf") as refused:
            await client.upload("t", tmp_path / "bad")
        assert refused.value.code == Code.NON_FINITE
        with pytest.raises(UploadRefused, match="is not open"):
            await client.upload("closed", tmp_path / "good")
        with pytest.raises(UploadRefused, match="announced"):
            await client.upload("t", tmp_path / "good", digest=b"x" * 32)
        await client.upload("t", tmp_path / "good")

    with capture_logs() as logs:
        run(site, work)
    assert [line["code"] for line in logs] == ["NON_FINITE", "UNKNOWN_TASK", "DIGEST_MISMATCH"]
    assert [task for task, _, _ in site.stored] == ["t"]


def test_a_site_that_only_sends_encrypted_updates_sends_no_frame_of_a_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "update", MODELS["tiny"])
    monkeypatch.setattr(BulkClient, "_connect", lambda client: pytest.fail("it connected"))
    client = BulkClient("tcp://127.0.0.1:1", KEYS, federation="demo", encrypted_only=True)
    with pytest.raises(NotEncrypted, match="update is a plain update"):
        asyncio.run(client.upload("t", tmp_path / "update"))
    client.close()


def test_the_federation_and_run_of_an_update_must_be_the_tasks(site: Site, tmp_path: Path) -> None:
    write_model(tmp_path / "update", MODELS["tiny"])
    right = transfer.federation_digest("demo", "run-1")
    site.bulk.expect({"t": Expected(ADA.principal, federation=right)})

    async def work(client: BulkClient) -> None:
        with pytest.raises(UploadRefused, match="another federation or run"):
            await client.upload("t", tmp_path / "update", run_id="run-2")
        await client.upload("t", tmp_path / "update", run_id="run-1")

    with capture_logs():
        run(site, work)


@pytest.mark.usefixtures("impatient")
def test_silence_is_not_an_end(tmp_path: Path) -> None:
    """The address exists later than the learner."""
    write_model(tmp_path / "update", MODELS["tiny"])
    early = Site(tmp_path / "site")
    early.bulk.close()

    async def work(client: BulkClient) -> None:
        upload = asyncio.ensure_future(client.upload("t", tmp_path / "update"))
        done, _ = await asyncio.wait([upload], timeout=0.3)
        assert not done
        early.start()
        await upload

    run(early, work)
    early.bulk.close()


def test_a_cancelled_transfer_leaves_nothing_open_and_the_next_one_works(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "update"
    write_model(path, MODELS["3 MB"])
    write = StagedUpdate.write

    async def work(client: BulkClient) -> None:
        loop, begun = asyncio.get_running_loop(), asyncio.Event()

        def watched(staged: StagedUpdate, payload: bytes) -> None:
            write(staged, payload)
            loop.call_soon_threadsafe(begun.set)

        monkeypatch.setattr(StagedUpdate, "write", watched)
        upload = asyncio.ensure_future(client.upload("t", path))
        await begun.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert client._links == [], "a connection that was cut off in the middle was kept"
        await client.upload("t", path)

    run(site, work)
    assert site.spool.update_path("t").read_bytes() == path.read_bytes()


def test_progress_is_told_as_the_fraction_that_has_arrived(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PROGRESS_S", 0.0)
    digest, path = site.put(MODELS["3 MB"]), tmp_path / "update"
    write_model(path, MODELS["3 MB"])
    up: list[float] = []
    down: list[float] = []

    async def work(client: BulkClient) -> None:
        await client.upload("t", path, on_progress=up.append)
        await client.download(digest, tmp_path / "got", on_progress=down.append)

    run(site, work)
    for told in (up, down):
        assert told == sorted(told)
        assert told[-1] == 1.0


def test_the_client_closes_what_it_opened(site: Site, tmp_path: Path) -> None:
    digest = site.put(MODELS["tiny"])
    client = BulkClient(site.endpoint, KEYS, federation="demo")
    asyncio.run(client.download(digest, tmp_path / "got"))
    client.close()
    client.close()
    with open_model(tmp_path / "got") as model:
        assert model.digest() == digest
