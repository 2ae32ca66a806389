"""A model goes to whoever may have it, in turn, no faster than it is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from metisfl.controller.downloads import (
    ABANDONED_S,
    CHUNKS_PER_TURN,
    DOWNLOADS_PER_PEER,
    Downloads,
)
from metisfl.controller.store import ModelStore
from metisfl.native_c import crc32c
from metisfl.proto.bulk import Chunk, Code, Credit, Frame, Get, Model, Refused, model_subject
from metisfl.proto.chunk import CHUNK_BYTES, check_payload
from metisfl.proto.credit import BUDGET_CHUNKS, RECLAIM_S, WINDOW_CHUNKS
from metisfl.proto.model_file import write_model
from metisfl.proto.tensors import Tensor

ADA = "learner:ada"


class Desk:
    """Downloads with everything that it sends written down; `full` routes take nothing."""

    def __init__(self, home: Path) -> None:
        self.store = ModelStore(home / "models")
        self.sent: list[tuple[bytes, Frame]] = []
        self.full: set[bytes] = set()
        self.counts: Counter[str] = Counter()
        self.downloads = Downloads(self.store, self._send, self.counts)

    def _send(self, route: bytes, frame: Frame) -> bool:
        if route in self.full:
            return False
        self.sent.append((route, frame))
        return True

    def put(self, chunks: float, fill: float = 1.0) -> bytes:
        draft = self.store.draft(0)
        values = np.full(int(chunks * CHUNK_BYTES / 4), fill, np.float32)
        return self.store.put(draft, write_model(draft, [Tensor("w", values, trainable=True)]))

    def get(self, digest: bytes, first: int = 0, limit: int = 32, route: bytes = b"a") -> None:
        self.downloads.get(Get(digest, first, limit), ADA, route, 0.0)

    def credit(self, digest: bytes, first: int, limit: int, route: bytes = b"a") -> None:
        self.downloads.credit(Credit(model_subject(digest), first, limit), route, 0.0)

    def work(self) -> float | None:
        while (again_s := self.downloads.work(0.0)) == 0.0:
            pass
        return again_s

    def chunks(self, route: bytes = b"a") -> list[int]:
        return [f.header.index for to, f in self.sent if to == route and isinstance(f, Chunk)]


@pytest.fixture
def counter(tmp_path: Path) -> Iterator[Desk]:
    counter = Desk(tmp_path)
    yield counter
    counter.downloads.close()


def test_a_model_is_its_manifest_and_all_of_its_chunks(counter: Desk) -> None:
    digest = counter.put(2.5)
    counter.get(digest)
    counter.work()
    frames = [frame for _, frame in counter.sent]
    with counter.store.open(digest) as model:
        assert frames[0] == Model(digest, model.payload_bytes, model.manifest_bytes)
        for chunk in frames[1:]:
            assert isinstance(chunk, Chunk)
            check_payload(chunk.header, chunk.payload, crc32c)
        payload = b"".join(chunk.payload for chunk in frames[1:])  # type: ignore[union-attr]
        assert payload == model.pread(0, model.payload_bytes)


def test_a_download_goes_on_where_the_learner_says(counter: Desk) -> None:
    counter.get(counter.put(5), first=3)
    counter.work()
    assert counter.chunks() == [3, 4]


def test_nothing_is_sent_beyond_the_receivers_limit(counter: Desk) -> None:
    digest = counter.put(5)
    counter.get(digest, limit=2)
    counter.work()
    assert counter.chunks() == [0, 1]
    counter.credit(digest, 1, 3)
    counter.work()
    assert counter.chunks() == [0, 1, 2]


def test_no_more_than_a_window_is_under_way_whatever_the_receiver_allows(
    counter: Desk,
) -> None:
    digest = counter.put(BUDGET_CHUNKS)
    counter.get(digest, limit=BUDGET_CHUNKS)
    counter.work()
    assert len(counter.chunks()) == WINDOW_CHUNKS
    counter.credit(digest, 5, BUDGET_CHUNKS)
    counter.work()
    assert len(counter.chunks()) == WINDOW_CHUNKS + 5


def test_downloads_take_turns_chunk_by_chunk(counter: Desk) -> None:
    digest = counter.put(4)
    for route in (b"a", b"b", b"c"):
        counter.get(digest, route=route)
    counter.sent.clear()
    counter.work()
    assert [route for route, _ in counter.sent] == [b"a", b"b", b"c"] * 4


def test_one_turn_is_short_so_that_uploads_get_theirs(counter: Desk) -> None:
    counter.get(counter.put(WINDOW_CHUNKS))
    assert counter.downloads.work(0.0) == 0.0, "there is more to send"
    assert len(counter.chunks()) == CHUNKS_PER_TURN < WINDOW_CHUNKS


def test_a_peer_that_takes_nothing_does_not_hold_up_the_others(counter: Desk) -> None:
    digest = counter.put(4)
    counter.get(digest, route=b"stuck")
    counter.get(digest, route=b"a")
    counter.full.add(b"stuck")
    again_s = counter.work()
    assert counter.chunks(b"a") == [0, 1, 2, 3]
    assert again_s is not None, "it must be tried again soon"
    counter.full.clear()
    assert counter.work() is None
    assert counter.chunks(b"stuck") == [0, 1, 2, 3]


def test_a_rewind_sends_again_without_the_manifest(counter: Desk) -> None:
    digest = counter.put(4)
    counter.get(digest)
    counter.work()
    counter.sent.clear()
    counter.downloads.credit(Credit(model_subject(digest), 1, 3, rewind=True), b"a", 0.0)
    counter.work()
    assert counter.chunks() == [1, 2]
    assert len(counter.sent) == 2


def test_an_unknown_model_is_refused_by_its_digest(counter: Desk) -> None:
    counter.get(b"x" * 32)
    refused = counter.sent[-1][1]
    assert isinstance(refused, Refused)
    assert refused.code == Code.UNKNOWN_MODEL
    assert "no model 7878" in refused.reason


def test_a_model_is_not_for_everybody(counter: Desk) -> None:
    digest = counter.put(1)
    counter.downloads.get(Get(digest, 0, 1), "broker", b"a", 0.0)
    refused = counter.sent[-1][1]
    assert isinstance(refused, Refused)
    assert refused.code == Code.NOT_YOURS


def test_a_model_that_is_cut_while_in_use_is_refused_and_logged(counter: Desk) -> None:
    digest = counter.put(3)
    counter.get(digest, limit=1)
    counter.work()
    with open(counter.store.path(digest), "r+b") as file:
        file.truncate(9000)
    counter.credit(digest, 1, 3)
    with capture_logs() as logs:
        counter.work()
    assert isinstance(counter.sent[-1][1], Refused)
    assert logs[0]["log_level"] == "error"


def test_one_peer_cannot_hold_more_than_a_few_downloads(counter: Desk) -> None:
    digests = [counter.put(2, fill) for fill in range(DOWNLOADS_PER_PEER + 1)]
    for digest in digests:
        counter.get(digest, limit=0)
    counter.credit(digests[0], 0, 2)
    counter.credit(digests[1], 0, 2)
    counter.work()
    assert {frame.subject for _, frame in counter.sent if isinstance(frame, Chunk)} == {
        model_subject(digests[1])
    }


def test_credit_for_what_is_not_under_way_is_passed_over(counter: Desk) -> None:
    counter.credit(b"x" * 32, 0, 9)
    assert counter.sent == []


def test_the_silent_lose_their_credit_and_the_abandoned_their_file(counter: Desk) -> None:
    digest = counter.put(BUDGET_CHUNKS)
    for route in (b"a", b"b", b"c"):
        counter.get(digest, limit=BUDGET_CHUNKS, route=route)
    counter.work()
    assert len(counter.chunks(b"c")) == BUDGET_CHUNKS // 3
    counter.downloads.credit(Credit(model_subject(digest), 0, 64), b"c", RECLAIM_S)
    counter.downloads.tick(RECLAIM_S)
    counter.sent.clear()
    counter.work()
    assert len(counter.chunks(b"c")) == WINDOW_CHUNKS - BUDGET_CHUNKS // 3, "what the silent had"
    assert counter.chunks(b"a") == counter.chunks(b"b") == []
    counter.downloads.tick(ABANDONED_S)
    counter.sent.clear()
    counter.downloads.tick(ABANDONED_S + 5)
    assert {route for route, _ in counter.sent} == {b"c"}, "the others were forgotten"


def test_who_waits_hears_what_is_known_of_its_credit(counter: Desk) -> None:
    digest = counter.put(5)
    counter.get(digest, limit=2)
    counter.sent.clear()
    counter.downloads.tick(0.5)
    assert counter.sent == [(b"a", Credit(model_subject(digest), 0, 2))]


def test_the_gone_are_forgotten(counter: Desk) -> None:
    digest = counter.put(5)
    counter.get(digest, limit=2)
    counter.downloads.unreachable({b"a"})
    counter.sent.clear()
    counter.downloads.tick(0.5)
    assert counter.sent == []
