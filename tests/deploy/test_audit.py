"""An audit log is on disk when `record` returns, goes on after a crash, and bounds what anybody can
cause."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from structlog.testing import capture_logs

from metisfl.deploy.audit import Audit
from metisfl.deploy.audit_files import check, files_of
from metisfl.deploy.audit_line import LINE_BYTES_MAX, TEXT_CHARACTERS_MAX, digest_of
from metisfl.proto.errors import DiskFull, MachineError

DEADLINE_S = 30.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audit(path: Path) -> Iterator[Audit]:
    audit = Audit(path)
    yield audit
    audit.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """All lines of the log, which must be whole."""
    checked = check(files_of(path))
    assert checked.fault == ""
    return [json.loads(row) for file in files_of(path) for row in file.read_text().splitlines()]


def told(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(line["what"], line["facts"]) for line in lines(path)]


def test_a_line_says_what_happened_when_and_what_was_before(audit: Audit, path: Path) -> None:
    audit.record("started", software="metisfl 1", port=5570)
    audit.record("peer admitted", principal="learner:ada")
    first, second = lines(path)
    assert [*first] == ["number", "time", "what", "facts", "previous"]
    assert (first["number"], second["number"]) == (1, 2)
    assert first["facts"] == {"software": "metisfl 1", "port": 5570}
    assert (first["previous"], first["time"][-1]) == ("0" * 64, "Z")
    assert second["previous"] == digest_of(path.read_bytes().splitlines()[0])


def test_nobody_else_can_read_it(path: Path) -> None:
    path.touch(0o644)
    audit = Audit(path)
    audit.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_text_from_outside_is_bounded_and_stays_one_line(audit: Audit, path: Path) -> None:
    audit.record("x" * 1000, text="a\n\x1b[2J\ud800" + "é" * 10_000)
    ((what, facts),) = told(path)
    assert len(what) == len(facts["text"]) == TEXT_CHARACTERS_MAX
    assert facts["text"].startswith("a\n\x1b[2J\ud800é")
    assert path.read_bytes().isascii()


def test_the_longest_line_can_be_read_back(path: Path) -> None:
    audit = Audit(path)
    worst = "\U0001f600" * TEXT_CHARACTERS_MAX
    audit.record("worst", **{f"fact{number}": worst for number in range(16)})
    audit.close()
    assert path.stat().st_size < LINE_BYTES_MAX
    Audit(path).close()
    assert len(lines(path)) == 1


# ---- Goes on ------------------------------------------------------------------------------


def test_a_new_process_goes_on_behind_the_last_line(path: Path) -> None:
    for number in range(4):
        audit = Audit(path)
        audit.record("started", number=number)
        audit.close()
    assert [line["number"] for line in lines(path)] == [1, 2, 3, 4]


WRITER = """
import sys
from pathlib import Path
from metisfl.deploy.audit import Audit
audit = Audit(Path(sys.argv[1]), file_bytes=4000)
for number in range(10**9):
    audit.record("written", number=number)
    audit.refused("no", str(number))
    print(number, flush=True)
"""


def test_what_was_recorded_is_there_whenever_the_process_is_killed(path: Path) -> None:
    for kill_at in (1, 17, 40):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        said = [int(next(writer.stdout)) for _ in range(kill_at)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in writer.stdout if line.endswith("\n")]
        writer.stdout.close()
        writer.wait(DEADLINE_S)
        Audit(path).close()
        recorded = [facts["number"] for what, facts in told(path) if what == "written"]
        since = recorded[len(recorded) - recorded[::-1].index(0) - 1 :]
        assert since[: len(said)] == said
    assert len(files_of(path)) > 1


@pytest.mark.parametrize("left", range(1, 120, 7))
def test_what_a_crash_has_left_of_a_line_is_cut_off_and_that_is_recorded(
    path: Path, left: int
) -> None:
    audit = Audit(path)
    audit.record("started")
    whole = path.read_bytes()
    audit.record("torn", by="a power cut, in the middle of a line")
    audit.close()
    path.write_bytes(path.read_bytes()[: len(whole) + left])
    Audit(path).close()
    assert told(path) == [("started", {}), ("cut", {"file": "audit.jsonl", "bytes": left})]


def test_a_log_of_which_only_a_part_of_the_first_line_is_left_begins_anew(path: Path) -> None:
    path.write_bytes(b'{"number":1,')
    Audit(path).close()
    assert told(path) == [("cut", {"file": "audit.jsonl", "bytes": 12})]


@pytest.mark.parametrize("end", [b'{"number":3}\n', b"\0" * 3 * LINE_BYTES_MAX])
def test_a_log_whose_end_was_changed_is_not_gone_on_with(path: Path, end: bytes) -> None:
    audit = Audit(path)
    audit.record("started")
    audit.close()
    path.write_bytes(path.read_bytes() + end)
    before = path.read_bytes()
    with pytest.raises(MachineError, match="Somebody or the disk has changed it: keep all files"):
        Audit(path)
    assert path.read_bytes() == before, "what is evidence is left alone"


def test_a_full_file_is_continued_in_a_new_one_also_by_a_new_process(path: Path) -> None:
    for number in range(12):
        audit = Audit(path, file_bytes=400)
        audit.record("something", number=number)
        audit.close()
    assert [facts["number"] for _, facts in told(path)] == [*range(12)]
    assert len(files_of(path)) == 4
    assert all(file.stat().st_size < 800 for file in files_of(path))


def test_a_crash_just_after_a_new_file_was_made_does_no_harm(path: Path) -> None:
    audit = Audit(path)
    audit.record("first")
    audit.close()
    path.with_name("audit-0001.jsonl").touch()
    audit = Audit(path)
    audit.record("second")
    audit.close()
    assert [line["number"] for line in lines(path)] == [1, 2]
    assert path.read_bytes().count(b"\n") == 1


def test_what_is_learned_again_after_a_restart_is_recorded_once(path: Path) -> None:
    for _ in range(3):
        audit = Audit(path, file_bytes=300)
        audit.record_once("run asked for", by="driver:ops", event=17)
        audit.record_once("run asked for", by="driver:ops", event=18)
        audit.record("started")
        audit.close()
    events = [facts["event"] for what, facts in told(path) if what == "run asked for"]
    assert events == [17, 18]


# ---- Refusals ------------------------------------------------------------------------------


def test_a_refusal_that_is_repeated_has_one_line_and_the_rest_is_counted(path: Path) -> None:
    audit = Audit(path)
    for _ in range(10_000):
        audit.refused("connection refused", "10.0.0.7", why="unknown key")
    audit.close()
    assert told(path) == [
        ("connection refused", {"who": "10.0.0.7", "why": "unknown key"}),
        ("refusals without a line", {"count": 9999}),
    ]


def test_a_flood_from_many_makes_a_thousand_lines_and_one_that_says_so(path: Path) -> None:
    audit = Audit(path)
    for number in range(5000):
        audit.refused("connection refused", f"10.0.{number >> 8}.{number & 255}")
    audit.record("peer admitted", principal="learner:ada")
    audit.close()
    *_, thousandth, more, admitted, count = told(path)
    assert thousandth[1]["who"] == "10.0.3.231"
    assert more == ("further refusals of this day are left out", {"lines": 1000})
    assert admitted[0] == "peer admitted", "what is no refusal is recorded all the same"
    assert count[1] == {"count": 4000}
    assert len(lines(path)) == 1003


def test_threads_write_one_chain(audit: Audit, path: Path) -> None:
    def work(name: str) -> None:
        for number in range(50):
            audit.record("did", who=name, number=number)
            audit.refused("no", f"{name}{number}")

    threads = [Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lines(path)) == 400


# ---- A disk that does not write ---------------------------------------------------------------


class Disk:
    """From the next write on, takes only so many bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr("metisfl.deploy.audit.os.write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.room is None:
            return self._write(descriptor, data)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("room", [0, 1, 50])
def test_what_cannot_be_recorded_is_an_error_and_leaves_nothing_behind(
    path: Path, disk: Disk, room: int
) -> None:
    audit = Audit(path)
    audit.record("first")
    before = path.read_bytes()
    disk.room = room
    with pytest.raises(DiskFull, match=r"audit\.jsonl: No space left on device; make room"):
        audit.record("second")
    assert path.read_bytes() == before, "whoever looks now finds no half of a line"
    disk.room = None
    audit.record("third")
    audit.close()
    assert told(path) == [("first", {}), ("third", {})]


def test_what_could_not_be_taken_back_at_once_is_so_before_the_next_line(
    path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = Audit(path)
    disk.room = 50
    with monkeypatch.context() as broken:
        broken.setattr("metisfl.deploy.audit.os.ftruncate", lambda *_: disk(-1, b""))
        disk.room = 50
        with pytest.raises(DiskFull):
            audit.record("torn")
    assert path.stat().st_size == 50
    disk.room = None
    audit.record("whole")
    audit.close()
    assert told(path) == [("whole", {})]


def test_a_line_that_may_not_be_on_disk_is_not_in_the_log(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = Audit(path)

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("metisfl.deploy.audit.os.fsync", fails)
        with pytest.raises(MachineError, match="Input/output error"):
            audit.record("lost")
    audit.record("kept")
    audit.close()
    assert told(path) == [("kept", {})]


def test_a_refusal_that_cannot_be_written_disturbs_nobody_and_is_counted_later(
    path: Path, disk: Disk
) -> None:
    audit = Audit(path)
    disk.room = 0
    with capture_logs() as logged:
        for number in range(5):
            audit.refused("connection refused", str(number))
    assert [line["event"] for line in logged] == ["refusals cannot be recorded"], "said once"
    disk.room = None
    audit.refused("connection refused", "5")
    audit.close()
    assert told(path) == [("connection refused", {"who": "5", "left_out": 5})]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"nowhere/audit\.jsonl: No such file"):
        Audit(tmp_path / "nowhere" / "audit.jsonl")
