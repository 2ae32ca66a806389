"""An encrypted update is taken block by block, and only if the fold will take it as it is."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_key import PUBLIC
from hypothesis import given
from hypothesis import strategies as st
from random_updates import (
    EXPONENTS,
    RING,
    TENSORS,
    block_of,
    update_manifest,
    write_community,
    write_update,
)

from metisfl.controller.admission import Expected
from metisfl.controller.encrypted_fold import context_of
from metisfl.controller.spool import Spool, StagedUpdate, UpdateRejected
from metisfl.controller.store import ModelStore
from metisfl.native_c import crc32c
from metisfl.proto.bulk import Chunk, Code, Credit, Stored
from metisfl.proto.chunk import (
    NO_DIGEST,
    PLAIN,
    chunk_count,
    chunk_extent,
    describe_chunk,
    federation_digest,
    short_digest,
    task_digest,
)
from metisfl.proto.ckks import exponents_digest
from metisfl.proto.model_file import ModelFile, open_model, write_model
from metisfl.proto.model_pb2 import Manifest

CONTEXT = context_of(PUBLIC)
FEDERATION = federation_digest("demo", "run-1")
ADA, BOB = "learner:ada", "learner:bob"
Change = Callable[[bytearray], None]


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, Expected]:
    """The tasks of a round in which ada and bob have trained."""
    model = write_community(ModelStore(tmp_path / "models"), tmp_path)
    ada = Expected(ADA, model, FEDERATION, encryption=PUBLIC.update_form(EXPONENTS))
    return {"t": ada, "u": replace(ada, learner=BOB)}


@pytest.fixture
def desk(a_desk: Callable[..., Any], expected: dict[str, Expected]) -> Any:
    """A controller in an encrypted federation."""
    desk = a_desk(CONTEXT)
    desk.expect(expected)
    return desk


@pytest.fixture
def an_update(tmp_path: Path) -> Iterator[Callable[..., ModelFile]]:
    """Make an encrypted update, another one for each seed."""
    models: list[ModelFile] = []

    def make(seed: int = 0, manifest: Manifest | None = None) -> ModelFile:
        path = tmp_path / f"{len(models)}.encrypted"
        write_update(path, seed, manifest)
        models.append(open_model(path))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.fixture
def update(an_update: Callable[..., ModelFile]) -> ModelFile:
    return an_update()


def chunk(
    update: ModelFile, index: int, change: Change | None = None, task: str = "t", **said: Any
) -> Chunk:
    """A chunk with a changed block; its transport checksum and length fit what it carries."""
    start, stop = chunk_extent(index, update.manifest)
    payload = bytearray(update.pread(start, stop - start))
    header = describe_chunk(
        update.manifest,
        index,
        payload,
        federation=FEDERATION,
        manifest_digest=short_digest(update.manifest_bytes),
        subject=task_digest(task),
        crc32c=crc32c,
    )
    if change is not None:
        change(payload)
        header = replace(header, payload_crc32c=crc32c(payload), payload_bytes=len(payload))
    return Chunk(replace(header, **said), payload)


def send(desk: Any, frame: Chunk, who: str = ADA) -> None:
    desk.uploads.chunk(frame, who, who.encode(), 0.0)
    desk.work()


def refused(desk: Any, code: Code, *words: str) -> None:
    """Its learner and the owner were told, and nothing of it is left."""
    found, reason = desk.refusal()
    assert found == code, reason
    for part in words:
        assert part in reason
    assert desk.refused == [("t", ADA, reason)]
    assert list(desk.spool.folder.iterdir()) == []


def test_an_encrypted_update_is_stored_as_it_was_sent(desk: Any, update: ModelFile) -> None:
    desk.open(update)
    assert chunk_count(update.manifest) == 2
    send(desk, chunk(update, 0))
    assert desk.answer() == Credit(task_digest("t"), 1, 2)
    assert desk.stored == []
    send(desk, chunk(update, 1))
    assert desk.answer() == Stored(task_digest("t"), update.digest())
    assert desk.stored == [("t", update.digest(), update.path.stat().st_size)]
    assert desk.spool.update_path("t").read_bytes() == update.path.read_bytes()


# ---- What is announced ------------------------------------------------------------------


def test_a_plain_update_is_refused_in_an_encrypted_federation(desk: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "plain", TENSORS)
    with open_model(tmp_path / "plain") as plain:
        desk.open(plain)
    refused(desk, Code.BAD_MANIFEST, "the update is plain and this federation's are encrypted")


def test_an_encrypted_update_is_refused_in_a_plain_federation(
    a_desk: Callable[..., Any], update: ModelFile
) -> None:
    desk = a_desk()
    desk.expect({"t": Expected(ADA, None, FEDERATION)})
    desk.open(update)
    refused(desk, Code.BAD_MANIFEST, "the update is encrypted and this federation's are plain")


# ---- Blocks that are not as they were made -------------------------------------------------


def flip(place: int) -> Change:
    def change(block: bytearray) -> None:
        block[place] ^= 1

    return change


@pytest.mark.parametrize("place", [0, 4, 9, 30, 41, 49, 53, 57, 61, 64, 81, 84, 5000, -1])
def test_a_flipped_bit_is_found_though_the_transports_checksum_was_repaired(
    desk: Any, update: ModelFile, place: int
) -> None:
    desk.open(update)
    send(desk, chunk(update, 0, flip(place)))
    refused(desk, Code.DAMAGED, "chunk 0: ")


BLOCK = chunk_extent(0, update_manifest())[1]


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StagedUpdate, Chunk]]:
    folder = tmp_path_factory.mktemp("staged")
    write_update(folder / "update", 5)
    with open_model(folder / "update") as update:
        spool = Spool(folder / "spool", contexts=[CONTEXT])
        staged = spool.begin("t", bytes(32), update.manifest)
        yield staged, chunk(update, 0)
        staged.discard()


@given(
    st.dictionaries(
        st.integers(0, 200) | st.integers(0, BLOCK - 1),
        st.integers(1, 255),
        min_size=1,
        max_size=6,
    )
)
def test_no_damage_to_a_block_passes(
    staged: tuple[StagedUpdate, Chunk], changes: dict[int, int]
) -> None:
    update, good = staged
    payload = bytearray(good.payload)
    for place, bits in changes.items():
        payload[place] ^= bits
    with pytest.raises(UpdateRejected) as rejected:
        update.check(good.header, payload)
    assert rejected.value.code is Code.DAMAGED
    update.check(good.header, good.payload)


def rewritten(place: int, kind: str, value: Any) -> Change:
    """Another field in the block's header, whose checksums are repaired."""

    def change(block: bytearray) -> None:
        struct.pack_into("<" + kind, block, place, value)
        struct.pack_into("<I", block, 56, crc32c(block[64:]))
        struct.pack_into("<I", block, 60, crc32c(block[:60]))

    return change


@pytest.mark.parametrize(
    ("place", "kind", "value", "words"),
    [
        (0, "4s", b"MFCC", "not with MFCB"),
        (4, "B", 2, "version 2, known: 1"),
        (5, "B", 48, "limbs of 48 bits, expected: 44"),
        (6, "B", 12, "ring dimension 2^12, expected: 2048"),
        (7, "B", 2, "2 polynomials a ciphertext, expected: 1"),
        (8, "16s", b"f" * 16, "sealed under the key 66666666"),
        (24, "16s", exponents_digest([0, 4]), "scaled by other exponents"),
        (40, "I", 1, "block 1 came where block 0 was expected"),
        (44, "I", 3, "one of 3, expected: one of 2"),
        (48, "H", 10, "10 ciphertexts, expected: 11"),
        (50, "H", 2, "bytes, but its header is of one of"),
        (52, "I", 100, "declares 100 bytes of payload"),
        (80, "I", 0, "weight 0, allowed: 1 to 2^32 - 1"),
    ],
)
def test_a_block_that_says_something_else_than_its_manifest_is_refused_in_words(
    desk: Any, update: ModelFile, place: int, kind: str, value: Any, words: str
) -> None:
    desk.open(update)
    send(desk, chunk(update, 0, rewritten(place, kind, value)))
    refused(desk, Code.DAMAGED, "chunk 0: ", words)


def test_limbs_that_were_changed_with_all_checksums_have_another_digest(
    desk: Any, update: ModelFile
) -> None:
    desk.open(update)
    send(desk, chunk(update, 0, rewritten(5000, "B", 77)))
    send(desk, chunk(update, 1))
    refused(desk, Code.DIGEST_MISMATCH, update.digest().hex())


def test_a_chunk_that_was_damaged_on_its_way_is_asked_for_again(
    desk: Any, update: ModelFile
) -> None:
    desk.open(update)
    good = chunk(update, 0)
    for payload in (bytes(good.payload)[:-1], bytes(good.payload)[:-1] + b"\0"):
        send(desk, Chunk(good.header, payload))
        assert desk.answer() == Credit(task_digest("t"), 0, 2, rewind=True)
        desk.open(update)
    send(desk, good)
    send(desk, chunk(update, 1))
    assert isinstance(desk.answer(), Stored)
    assert desk.counts["chunks_damaged"] == 2


def test_a_chunk_that_is_shorter_than_its_block_is_refused_with_both_lengths(
    desk: Any, update: ModelFile
) -> None:
    desk.open(update)

    def cut(block: bytearray) -> None:
        del block[-100:]

    frame = chunk(update, 0, cut)
    assert frame.header.payload_bytes == BLOCK - 100
    send(desk, frame)
    refused(desk, Code.DAMAGED, f"{BLOCK - 100} bytes", f"the manifest says {BLOCK}")


def test_a_block_of_another_round_is_refused_though_its_chunk_is_right(
    desk: Any, update: ModelFile
) -> None:
    """The exponents of a round are in each of its blocks."""
    old = update_manifest(exponents=(0, 2))
    block = block_of(old, 0, np.zeros((11, RING), np.uint64), b"s" * 16)

    def swap(payload: bytearray) -> None:
        payload[:] = block

    desk.open(update)
    send(desk, chunk(update, 0, swap))
    refused(desk, Code.DAMAGED, "chunk 0: a block was scaled by other exponents")


@pytest.mark.parametrize(
    ("index", "count", "words"),
    [(0, 3, "one of 3, expected: one of 2"), (1, 2, "block 1 came where block 0 was expected")],
)
def test_a_block_of_a_larger_model_or_of_another_place_is_refused(
    desk: Any, update: ModelFile, index: int, count: int, words: str
) -> None:
    limbs = np.zeros((11, RING), np.uint64)
    block = block_of(update.manifest, index, limbs, b"s" * 16, count=count)

    def swap(payload: bytearray) -> None:
        payload[:] = block

    desk.open(update)
    send(desk, chunk(update, 0, swap))
    refused(desk, Code.DAMAGED, "chunk 0: ", words)


# ---- Chunks ------------------------------------------------------------------------------


def test_a_chunk_with_other_exponents_than_its_manifest_is_refused(
    desk: Any, update: ModelFile
) -> None:
    desk.open(update)
    other = exponents_digest([0, 4])
    send(desk, chunk(update, 0, exponents=other))
    ours = exponents_digest(EXPONENTS)
    refused(desk, Code.BAD_MANIFEST, f"exponents {other.hex()}", f"manifest's are {ours.hex()}")


def test_a_chunk_that_says_it_is_plain_is_refused(desk: Any, update: ModelFile) -> None:
    desk.open(update)
    send(desk, chunk(update, 0, exponents=NO_DIGEST, privacy=PLAIN))
    refused(desk, Code.BAD_MANIFEST, "its privacy mode is 0")


def test_a_chunk_of_another_rounds_task_is_dropped_and_the_upload_goes_on(
    desk: Any, update: ModelFile, an_update: Callable[..., ModelFile]
) -> None:
    desk.open(update)
    send(desk, chunk(an_update(1), 0, task="r.0.train.ada"))
    send(desk, chunk(an_update(2), 0, task="u"))  # bob's, of whom there is no upload
    assert desk.counts["chunks_unknown"] == 2
    send(desk, chunk(update, 0))
    send(desk, chunk(update, 1))
    assert [task for task, _, _ in desk.stored] == ["t"]


def test_a_chunk_that_comes_twice_does_no_harm(desk: Any, update: ModelFile) -> None:
    desk.open(update)
    for index in (0, 0, 0, 1, 1):
        send(desk, chunk(update, index))
    assert desk.counts["chunks_repeated"] == 2
    assert desk.counts["chunks_unknown"] == 1, "the update was complete already"
    assert len(desk.stored) == 1
    assert desk.spool.update_path("t").read_bytes() == update.path.read_bytes()


def test_two_uploads_in_turn_do_not_mix(
    desk: Any, update: ModelFile, an_update: Callable[..., ModelFile]
) -> None:
    """One trial fold serves all uploads of a controller."""
    other = an_update(1)
    desk.open(update)
    desk.open(other, "u", BOB)
    for index in (0, 1):
        send(desk, chunk(update, index))
        send(desk, chunk(other, index, task="u"), BOB)
    assert sorted(task for task, _, _ in desk.stored) == ["t", "u"]
    assert desk.spool.update_path("u").read_bytes() == other.path.read_bytes()


def test_an_upload_goes_on_after_a_restart_and_is_checked_as_before(
    desk: Any,
    update: ModelFile,
    a_desk: Callable[..., Any],
    expected: dict[str, Expected],
) -> None:
    desk.open(update)
    send(desk, chunk(update, 0))
    again = a_desk(CONTEXT)
    again.expect(expected)
    again.open(update)
    again.work()
    assert again.answer() == Credit(task_digest("t"), 1, 2)
    send(again, chunk(update, 1, flip(100)))
    refused(again, Code.DAMAGED, "chunk 1: ")


def test_an_update_without_floats_is_stored_by_its_manifest_alone(
    desk: Any, an_update: Callable[..., ModelFile]
) -> None:
    form = PUBLIC.update_form(())
    desk.expect({"t": Expected(ADA, None, FEDERATION, encryption=form)})
    desk.open(an_update(manifest=update_manifest(tensors=TENSORS[1:2], exponents=())))
    desk.work()
    assert isinstance(desk.answer(), Stored)
