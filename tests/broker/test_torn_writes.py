"""store.py after a power cut in the middle of a write, and after damage to what was written.

The write-ahead log holds what is newest. Cut anywhere, it gives whole batches from the first on and
nothing behind the cut. The database itself is damaged by nothing that may happen; if it is, that is
an error.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from log_batches import batch, events, read

from metisfl.broker.schema import PAGE_BYTES, DamagedLog
from metisfl.broker.store import Store
from metisfl.proto.errors import MachineError

SIZES = (1, 40, 3, 200, 1, 17, 90, 5)
ENDS = [sum(SIZES[: count + 1]) for count in range(len(SIZES))]  # head after each batch
WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
FRAME_BYTES = FRAME_HEADER_BYTES + PAGE_BYTES


class Torn:
    """Copies of one log whose batches are all in the write-ahead log, as if its broker was killed.

    `commits`: for each transaction the offset at which its last frame begins.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._copies = folder, 0
        with closing(Store(folder / "whole")) as store:
            done = 0
            for number, size in enumerate(SIZES):
                watermark = ("learner:l1", 1, done + size)
                made = events(size, size=300, first=done + 1)
                store.append(batch(made, number=number, watermarks=[watermark]))
                done += size
            self.wal = (folder / "whole" / "events.db-wal").read_bytes()
            self.database = (folder / "whole" / "events.db").read_bytes()
        self.frames = range(WAL_HEADER_BYTES, len(self.wal), FRAME_BYTES)
        self.commits = [
            at for at in self.frames if int.from_bytes(self.wal[at + 4 : at + 8], "big")
        ]
        assert len(self.commits) == len(SIZES) + 1, "the tables, then one for each batch"

    def copy(self, wal: bytes) -> Path:
        self._copies += 1
        folder = self._folder / f"copy-{self._copies}"
        folder.mkdir()
        (folder / "events.db").write_bytes(self.database)
        (folder / "events.db-wal").write_bytes(wal)
        return folder

    def head(self, intact: int) -> int:
        """The newest record if the first `intact` bytes are as they were and no more of them."""
        whole = sum(at + FRAME_BYTES <= intact for at in self.commits)
        return ENDS[whole - 2] if whole >= 2 else 0


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Torn:
    return Torn(tmp_path_factory.mktemp("torn"))


def holds_and_goes_on(folder: Path, head: int) -> None:
    """The log opens, holds all up to `head` and nothing else, and takes more."""
    with closing(Store(folder)) as store:
        found = store.reader.recovered()
        assert found.head == head
        assert found.watermarks == ([("learner:l1", 1, head)] if head else [])
        records, _ = read(store, head=head, max_events=1000)
        expected = events(head, size=300)
        assert [record.envelope for record in records] == [place.envelope for place in expected]
        store.append(batch(events(7, size=300, first=head + 1), number=99))
    with closing(Store(folder)) as again:
        assert again.reader.check() == (head + 7, 0)
    shutil.rmtree(folder)


CUTS: dict[str, Callable[[int], int]] = {
    "before the frame": lambda at: at,
    "inside the frame's header": lambda at: at + 10,
    "behind the frame's header": lambda at: at + FRAME_HEADER_BYTES,
    "inside its page": lambda at: at + FRAME_HEADER_BYTES + 4000,
    "a byte before its end": lambda at: at + FRAME_BYTES - 1,
    "at the commit": lambda at: at + FRAME_BYTES,
    "a byte behind the commit": lambda at: at + FRAME_BYTES + 1,
}


@pytest.mark.parametrize("batch_number", range(len(SIZES)))
@pytest.mark.parametrize("where", CUTS)
def test_a_cut_in_a_batchs_last_frame(torn: Torn, batch_number: int, where: str) -> None:
    at = CUTS[where](torn.commits[1 + batch_number])
    committed = where.endswith("the commit")
    expected = ENDS[batch_number] if committed else ENDS[batch_number - 1] if batch_number else 0
    assert torn.head(at) == expected
    holds_and_goes_on(torn.copy(torn.wal[:at]), expected)


@pytest.mark.parametrize("left", [0, 1, 20, WAL_HEADER_BYTES, WAL_HEADER_BYTES + 100])
def test_a_cut_before_anything_was_stored_leaves_an_empty_log(torn: Torn, left: int) -> None:
    holds_and_goes_on(torn.copy(torn.wal[:left]), 0)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_cut_anywhere_leaves_whole_batches_from_the_first_on(
    torn: Torn, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(torn.wal)))
    holds_and_goes_on(torn.copy(torn.wal[:at]), torn.head(at))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_byte_that_changed_ends_the_log_before_its_batch(torn: Torn, data: st.DataObject) -> None:
    at = data.draw(st.integers(WAL_HEADER_BYTES, len(torn.wal) - 1))
    wal = bytearray(torn.wal)
    wal[at] ^= data.draw(st.integers(1, 255))
    holds_and_goes_on(torn.copy(bytes(wal)), torn.head(at))


@pytest.mark.parametrize("offset", [0, 5, FRAME_HEADER_BYTES + 1, FRAME_BYTES - 1])
def test_a_byte_that_changed_in_the_last_frame_costs_the_last_batch(
    torn: Torn, offset: int
) -> None:
    wal = bytearray(torn.wal)
    wal[torn.commits[-1] + offset] ^= 0x10
    holds_and_goes_on(torn.copy(bytes(wal)), ENDS[-2])


def test_a_page_that_was_not_written_ends_the_log_before_its_batch(torn: Torn) -> None:
    """Sectors reach the disk in any order: the file has its length, a page in it is void."""
    at = torn.commits[4] + FRAME_HEADER_BYTES
    wal = torn.wal[:at] + bytes(PAGE_BYTES) + torn.wal[at + PAGE_BYTES :]
    holds_and_goes_on(torn.copy(wal), ENDS[2])


# ---- The database ----------------------------------------------------------------------


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "void": lambda page: bytes(len(page)),
    "noise": lambda page: random.Random(page).randbytes(len(page)),
    "half old": lambda page: page[: len(page) // 2] + bytes(len(page) // 2),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_page_is_an_error_and_never_a_shorter_log(tmp_path: Path, kind: str) -> None:
    made = events(120, size=1500)
    with closing(Store(tmp_path / "whole")) as store:
        store.append(batch(made[:100], cursors=[("controller", "f/", 20)]))
        assert store.trimmer.trim(10**18) is not None
        store.append(batch(made[100:], number=2))
    database = (tmp_path / "whole" / "events.db").read_bytes()
    expected = [place.envelope for place in made[20:]]
    pages = range(0, len(database), PAGE_BYTES)
    assert len(pages) > 20
    found_out = 0
    for at in pages:
        folder = tmp_path / f"page-{at // PAGE_BYTES}"
        folder.mkdir()
        page = DAMAGE[kind](database[at : at + PAGE_BYTES])
        (folder / "events.db").write_bytes(database[:at] + page + database[at + PAGE_BYTES :])
        try:
            with closing(Store(folder)) as damaged:
                head = damaged.reader.recovered().head
                records, through = read(damaged, after=20, head=head, max_events=1000)
        except MachineError:
            found_out += 1
        else:
            assert (head, through) == (120, 120), f"page {at // PAGE_BYTES} shortened the log"
            assert [record.envelope for record in records] == expected
        shutil.rmtree(folder)
    assert found_out > len(pages) // 2, "most pages hold records: their damage must be noticed"


def test_a_database_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    with closing(Store(tmp_path)) as store:
        store.append(batch(events(500, size=500)))
    size = (tmp_path / "events.db").stat().st_size
    os.truncate(tmp_path / "events.db", size // PAGE_BYTES // 2 * PAGE_BYTES)
    with pytest.raises(DamagedLog), closing(Store(tmp_path)) as damaged:
        damaged.reader.recovered()
