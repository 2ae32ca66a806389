"""The desk: uploads at the controller with everything that they send and announce written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from metisfl.controller.admission import Admission, Expected
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.controller.uploads import Uploads
from metisfl.native_c import crc32c
from metisfl.native_c.ckks import Context
from metisfl.proto.bulk import Chunk, Frame, Open, Refused
from metisfl.proto.chunk import (
    CHUNK_BYTES,
    chunk_count,
    chunk_extent,
    describe_chunk,
    federation_digest,
    short_digest,
    task_digest,
)
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.tensors import Tensor

FEDERATION = federation_digest("demo", "run-1")
ADA = "learner:ada"
Models = Callable[..., ModelFile]


class Desk:
    """Uploads with everything that it sends and announces written down."""

    def __init__(self, home: Path, context: Context | None = None) -> None:
        self.spool = Spool(home / "spool", contexts=[context] if context else ())
        self.sent: list[tuple[bytes, Frame]] = []
        self.stored: list[tuple[str, bytes, int]] = []
        self.refused: list[tuple[str, str, str]] = []
        self.counts: Counter[str] = Counter()
        self.uploads = Uploads(
            self.spool,
            Admission(ModelStore(home / "models")),
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
        start, stop = chunk_extent(index, model.manifest)
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
        for index in range(chunk_count(model.manifest)):
            self.chunk(model, index, task, who)
            self.work()


@pytest.fixture
def a_desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    """Start a controller's uploads anew on what lies on disk; nothing is open yet."""
    desks: list[Desk] = []

    def start(context: Context | None = None) -> Desk:
        for desk in desks:
            desk.uploads.close()
        desks.append(Desk(tmp_path, context))
        return desks[-1]

    yield start
    for desk in desks:
        desk.uploads.close()


@pytest.fixture
def desk(a_desk: Callable[..., Desk]) -> Desk:
    desk = a_desk()
    desk.expect({"t": Expected(ADA, federation=FEDERATION)})
    return desk


@pytest.fixture
def a_model(tmp_path: Path) -> Iterator[Models]:
    """Make a model of so many chunks, all of one value."""
    models: list[ModelFile] = []

    def make(chunks: float, fill: float = 1.0) -> ModelFile:
        path = tmp_path / f"{len(models)}.model"
        values = np.full(int(chunks * CHUNK_BYTES / 4), fill, np.float32)
        write_model(path, [Tensor("w", values, trainable=True)])
        models.append(open_model(path))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.fixture
def model(a_model: Models) -> ModelFile:
    return a_model(2.5)


@pytest.fixture
def small(a_model: Models) -> ModelFile:
    return a_model(0.1)
