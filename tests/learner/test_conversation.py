"""The learner's and the controller's ends as they are, over a network that does what it wants."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.controller.admission import Admission, Expected
from metisfl.controller.downloads import Downloads
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import Uploads
from metisfl.learner.conversation import Download, DownloadRefused, Upload, UploadRefused
from metisfl.learner.part import PartFile
from metisfl.native_c import crc32c
from metisfl.proto import bulk as frames
from metisfl.proto.chunk import CHUNK_BYTES, CKKS, ChunkHeader, federation_digest, short_digest
from metisfl.proto.credit import Patience
from metisfl.proto.errors import PeerError
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.tensors import Tensor

FEDERATION = federation_digest("demo", "run-1")
ADA = "learner:ada"
CHUNKS = 5


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "m.model"
    values = np.random.default_rng(11).standard_normal((CHUNKS - 1) * CHUNK_BYTES // 4 + 100)
    write_model(path, [Tensor("w", values.astype(np.float32), trainable=True)])
    return path


class World:
    """One learner and one controller; frames cross as bytes, on numbered connections."""

    def __init__(self, home: Path, chance: random.Random) -> None:
        self.home, self.chance, self.now = home, chance, 0.0
        self.loss = self.repeat = 0.0
        self.air: list[tuple[int, bool, list[bytes]]] = []
        self.connection = 0
        self.store = ModelStore(home / "models")
        self.stored: list[bytes] = []
        self.controller_starts()

    def controller_starts(self) -> None:
        def send(route: bytes, frame: frames.Frame) -> bool:
            self.put(int(route), False, frame)
            return True

        counts: Counter[str] = Counter()
        self.downloads = Downloads(self.store, send, counts)
        self.uploads = Uploads(
            Spool(self.home / "spool"),
            Admission(self.store),
            send,
            lambda task, digest, size: self.stored.append(digest),
            lambda task, learner, reason: pytest.fail(f"refused: {reason}"),
            counts,
        )
        self.uploads.expect({"t": Expected(ADA)}, self.now)

    def put(self, connection: int, up: bool, frame: frames.Frame) -> None:
        parts = [bytes(part) for part in frames.pack(frame, crc32c)]
        for _ in range(1 + (self.chance.random() < self.repeat)):
            if self.chance.random() >= self.loss:
                self.air.append((connection, up, parts))

    def deliver(self, place: int) -> frames.Frame | None:
        """Give one frame to its end; what is for the learner's current connection is returned."""
        connection, up, parts = self.air.pop(place)
        frame = frames.parse(parts, crc32c)
        if not up:
            return frame if connection == self.connection else None
        route = str(connection).encode()
        if isinstance(frame, frames.Open):
            self.uploads.open(frame, ADA, route, self.now)
        elif isinstance(frame, frames.Chunk):
            self.uploads.chunk(frame, ADA, route, self.now)
        elif isinstance(frame, frames.Get):
            self.downloads.get(frame, ADA, route, self.now)
        else:
            assert isinstance(frame, frames.Credit)
            self.downloads.credit(frame, route, self.now)
        self.controller_works()
        return None

    def controller_works(self) -> None:
        while self.uploads.work(self.now):
            pass
        while self.downloads.work(self.now) == 0.0:
            pass

    def controller_restarts(self, *, gently: bool) -> None:
        if gently:
            self.uploads.close()
        self.downloads.close()
        self.controller_starts()

    def play(self, begin: Callable[[], Upload | Download]) -> None:
        """Let them talk on a bad network, then on a good one, until the transfer is done."""
        transfer, patience, steps = begin(), Patience(0.0), 0
        self.put(self.connection, True, transfer.question())
        while not transfer.done:
            steps += 1
            assert steps < 3000, "no end, though the network works again"
            bad = steps < 60
            self.loss, self.repeat = (self.loss, self.repeat) if bad else (0.0, 0.0)
            draw = self.chance.random()
            if bad and draw < 0.03:
                self.controller_restarts(gently=draw < 0.015)
            elif bad and draw < 0.05:
                transfer, patience = begin(), Patience(self.now)
                self.connection += 1
                self.put(self.connection, True, transfer.question())
            elif self.air and draw < 0.9:
                place = self.chance.randrange(len(self.air)) if bad else 0
                frame = self.deliver(place)
                if frame is not None:
                    patience.word(self.now, progress=transfer.take(frame))
            else:
                self.now += 0.5
                self.uploads.tick(self.now)
                self.downloads.tick(self.now)
                self.controller_works()
            while (answer := transfer.next_frame()) is not None:
                self.put(self.connection, True, answer)
                transfer.sent()
            if self.now >= patience.deadline:
                patience.ask_again(self.now)
                self.connection += 1
                self.put(self.connection, True, transfer.question())


networks = given(st.floats(0, 0.5), st.floats(0, 0.4), st.integers(0, 2**32))


@settings(max_examples=30, deadline=None)
@networks
def test_an_upload_arrives_whole_whatever_happens_on_the_way(
    tmp_path_factory: pytest.TempPathFactory,
    original: Path,
    loss: float,
    repeat: float,
    seed: int,
) -> None:
    world = World(tmp_path_factory.mktemp("up"), random.Random(seed))
    world.loss, world.repeat = loss, repeat
    with open_model(original) as model:
        digest = model.digest()
        world.play(lambda: Upload(model, "t", FEDERATION, digest))
    assert set(world.stored) == {digest}
    assert (world.home / "spool" / "t.update").read_bytes() == original.read_bytes()
    world.uploads.close()


@settings(max_examples=30, deadline=None)
@networks
def test_a_download_arrives_whole_whatever_happens_on_the_way(
    tmp_path_factory: pytest.TempPathFactory,
    original: Path,
    loss: float,
    repeat: float,
    seed: int,
) -> None:
    home = tmp_path_factory.mktemp("down")
    world = World(home, random.Random(seed))
    world.loss, world.repeat = loss, repeat
    draft = world.store.draft(0)
    draft.write_bytes(original.read_bytes())
    digest = world.store.put(draft)
    parts: list[PartFile] = []

    def begin() -> Download:
        for part in parts:
            part.__exit__(None, None, None)
        parts.append(PartFile(home / "got.model", digest))
        return Download(digest, parts[-1])

    world.play(begin)
    while not parts[-1].catch_up():
        pass
    assert parts[-1].matches()
    parts[-1].__exit__(None, None, None)
    world.downloads.close()


def model_frame(model: ModelFile) -> frames.Model:
    return frames.Model(model.digest(), model.payload_bytes, model.manifest_bytes)


def test_a_refused_upload_says_why(original: Path) -> None:
    with open_model(original) as model:
        upload = Upload(model, "t", FEDERATION, model.digest())
        with pytest.raises(UploadRefused, match="because") as refused:
            upload.take(frames.Refused(upload.subject, frames.Code.NO_SPACE, "because"))
    assert refused.value.code == frames.Code.NO_SPACE


def test_a_stored_word_for_other_content_is_not_success(original: Path) -> None:
    with open_model(original) as model:
        upload = Upload(model, "t", FEDERATION, model.digest())
        with pytest.raises(PeerError, match="answered an upload with Stored"):
            upload.take(frames.Stored(upload.subject, bytes(32)))
        assert not upload.done


def test_a_refused_download_says_why(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x", bytes(32)) as part:
        download = Download(bytes(32), part)
        with pytest.raises(DownloadRefused, match="never was"):
            download.take(frames.Refused(download.subject, 12, "no such model: it never was"))


def test_a_lost_credit_is_noticed_and_repeated(original: Path, tmp_path: Path) -> None:
    with open_model(original) as model, PartFile(tmp_path / "x", model.digest()) as part:
        download = Download(model.digest(), part)
        download.question()
        download.take(model_frame(model))
        download.take(frames.Credit(download.subject, 0, CHUNKS))
        assert download.next_frame() is None, "the controller knows all there is to know"
        download.take(frames.Credit(download.subject, 0, 2))
        assert download.next_frame() == frames.Credit(download.subject, 0, CHUNKS)


def test_damaged_chunks_are_asked_for_again_and_the_third_ends_it(
    original: Path, tmp_path: Path
) -> None:
    with open_model(original) as model, PartFile(tmp_path / "x", model.digest()) as part:
        download = Download(model.digest(), part)
        download.question()
        download.take(model_frame(model))
        header = ChunkHeader(
            bytes(16),
            short_digest(model.manifest_bytes),
            download.subject,
            0,
            CHUNKS,
            0,
            CHUNK_BYTES,
            1,
        )
        damaged = frames.Chunk(header, bytes(CHUNK_BYTES))
        assert not download.take(damaged)
        assert download.next_frame() == frames.Credit(download.subject, 0, CHUNKS, rewind=True)
        download.take(damaged)
        with pytest.raises(PeerError, match="CRC-32C"):
            download.take(damaged)


@pytest.mark.parametrize(
    "other",
    [
        {"manifest": bytes(16)},
        {"count": CHUNKS + 1},
        {"privacy": CKKS, "exponents": b"e" * 16},
        {"exponents": b"e" * 16},
    ],
)
def test_chunks_of_another_model_are_the_controllers_error(
    original: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    with open_model(original) as model, PartFile(tmp_path / "x", model.digest()) as part:
        download = Download(model.digest(), part)
        download.question()
        download.take(model_frame(model))
        manifest = short_digest(model.manifest_bytes)
        header = ChunkHeader(bytes(16), manifest, download.subject, 0, CHUNKS, 0, 4, 1)
        with pytest.raises(PeerError, match="part of another model"):
            download.take(frames.Chunk(replace(header, **other), b"1234"))
