"""A chain of lines shows every change but one: that its end is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.deploy.audit import Audit
from metisfl.deploy.audit_files import Checked, check, continuation, files_of, read
from metisfl.deploy.audit_line import (
    LINE_BYTES_MAX,
    NO_DIGEST,
    Line,
    core_of,
    digest_of,
    pack,
    parse,
)
from metisfl.proto.errors import MachineError

LINES = 9
TIME = "2026-11-24T09:43:32.000001Z"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    audit = Audit(tmp_path / "audit.jsonl")
    for number in range(LINES):
        audit.record("something", number=number)
    audit.close()
    return tmp_path / "audit.jsonl"


@pytest.fixture
def long_log(tmp_path: Path) -> Path:
    """The same in several files, of three lines each."""
    audit = Audit(tmp_path / "audit.jsonl", file_bytes=500)
    for number in range(LINES):
        audit.record("something", number=number)
    audit.close()
    assert [path.name for path in files_of(tmp_path / "audit.jsonl")] == [
        *("audit.jsonl", "audit-0001.jsonl", "audit-0002.jsonl")
    ]
    return tmp_path / "audit.jsonl"


def rows(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def changed(path: Path, lines: list[bytes]) -> Checked:
    path.write_bytes(b"".join(lines))
    return check([path])


def test_a_log_that_nobody_touched_is_whole(log: Path) -> None:
    checked = check([log])
    assert (checked.lines, checked.first, checked.fault) == (LINES, 1, "")
    assert checked.head == digest_of(rows(log)[-1][:-1])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_byte_before_the_last_line_can_be_changed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    log = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    if not log.exists():
        audit = Audit(log)
        for number in range(LINES):
            audit.record("something", number=number, text="é\n")
        audit.close()
    whole = log.read_bytes()
    place = data.draw(st.integers(0, len(whole) - len(rows(log)[-1]) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    copy = log.with_name("copy.jsonl")
    copy.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
    row = whole[:place].count(b"\n") + 1
    checked = check([copy])
    assert checked.fault, f"byte {place}, in line {row}, was changed to {other} and nothing said"
    assert checked.lines in (row - 1, row), "the line is named, or the one that does not follow it"


@pytest.mark.parametrize("row", range(LINES - 1))
def test_a_line_that_was_taken_out_is_missed(log: Path, row: int) -> None:
    lines = rows(log)
    found = changed(log, [*lines[:row], *lines[row + 1 :]])
    assert f"line {row + 1}: it is number {row + 2}, where {row + 1} belongs" in found.fault


def test_a_line_that_was_put_in_is_found(log: Path) -> None:
    lines = rows(log)
    forged = pack(Line(4, TIME, "something", {"number": 7}, digest_of(lines[2][:-1]))) + b"\n"
    found = changed(log, [*lines[:3], forged, *lines[3:]])
    assert "audit.jsonl, line 5: it is number 4, where 5 belongs" in found.fault
    found = changed(log, [*lines[:3], forged, *lines[4:]])
    assert "line 5: it names" in found.fault
    assert found.lines == 4


def test_a_cut_is_found_only_with_a_digest_that_was_noted(log: Path) -> None:
    lines = rows(log)
    head, middle = digest_of(lines[-1][:-1]), digest_of(lines[4][:-1])
    cut = changed(log, lines[:-2])
    assert cut.fault == "", "the chain itself has nothing to say"
    assert check([log], noted=head).noted is None
    assert check([log], noted=middle).noted == 5, "what was noted earlier is still there"


def test_a_line_without_an_end_is_not_yet_one(log: Path) -> None:
    last = rows(log)[-1]
    found = changed(log, [*rows(log)[:-1], last[:-20]])
    assert (found.lines, found.unfinished_bytes, found.fault) == (LINES - 1, len(last) - 20, "")


@pytest.mark.parametrize("junk", [b"[" * LINE_BYTES_MAX, b"x" * (3 * LINE_BYTES_MAX), b"\0\n"])
def test_junk_is_no_line(log: Path, junk: bytes) -> None:
    found = changed(log, [*rows(log), junk + b"\n"])
    assert (found.lines, f"line {LINES + 1}: it is not JSON" in found.fault) == (LINES, True)


# ---- Several files ---------------------------------------------------------------------


def test_a_log_goes_on_in_a_new_file_that_names_the_last_line_of_the_old(long_log: Path) -> None:
    checked = check(files_of(long_log))
    assert (checked.lines, checked.fault) == (LINES, "")
    first, second = files_of(long_log)[:2]
    assert parse(rows(second)[0][:-1]).previous == digest_of(rows(first)[-1][:-1])


@pytest.mark.parametrize("missing", [0, 1])
def test_a_file_that_is_gone_is_missed(long_log: Path, missing: int) -> None:
    gone = files_of(long_log)[missing]
    first = parse(rows(gone)[0][:-1]).number
    gone.unlink()
    checked = check(files_of(long_log))
    assert f"where {first} belongs" in checked.fault


def test_an_older_file_must_end_with_a_whole_line(long_log: Path) -> None:
    first = files_of(long_log)[0]
    first.write_bytes(first.read_bytes()[:-1])
    assert "audit.jsonl, line 3: it has no end" in check(files_of(long_log)).fault


def test_a_part_of_a_log_can_be_checked_by_itself(long_log: Path) -> None:
    checked = check(files_of(long_log)[1:], whole=False)
    assert (checked.first, checked.lines, checked.fault) == (4, 6, "")
    numbers = [line.number for _, line in read(files_of(long_log)[1:], checked.lines)]
    assert numbers == [4, 5, 6, 7, 8, 9]


def test_other_files_are_not_of_the_log(long_log: Path) -> None:
    before = files_of(long_log)
    for name in ("audit-old.jsonl", "audit-0001.jsonl.gz", "audit-.jsonl", "audit.db"):
        (long_log.parent / name).write_text("something else")
    assert files_of(long_log) == before
    assert continuation(long_log, before[-1]).name == "audit-0003.jsonl"


# ---- A line ----------------------------------------------------------------------------

TEXTS = st.text(st.characters(), max_size=40)
FACTS = st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=4)


@given(st.integers(1), TEXTS, FACTS)
def test_whatever_is_recorded_is_one_line_of_ascii_and_read_as_it_was(
    number: int, what: str, facts: dict[str, str | int]
) -> None:
    line = Line(number, TIME, what, facts, NO_DIGEST)
    data = pack(line)
    assert data.isascii()
    assert b"\n" not in data
    assert parse(data) == line
    assert core_of(what, facts) in data


@given(TEXTS, FACTS, TEXTS, FACTS)
def test_no_line_holds_the_fact_of_another(
    what: str, facts: dict[str, str | int], other: str, others: dict[str, str | int]
) -> None:
    found = core_of(what, facts) in pack(Line(1, TIME, other, others, NO_DIGEST))
    assert found == ((what, [*facts.items()]) == (other, [*others.items()]))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ((b'"number":1', b'"number":0'), "from 1 on"),
        ((b'"number":1', b'"number":true'), "from 1 on"),
        ((b"32.000001Z", b"32Z"), "its time"),
        ((b'"k":2', b'"k":2.5'), "whole numbers"),
        ((b'"k":2', b'"k":[2]'), "whole numbers"),
        ((b'{"k":2}', b"2"), "what happened"),
        ((b'"what"', b'"why"'), "other fields"),
        ((b"00000000", b"zzzzzzzz"), "SHA-256"),
        ((b'"k":2', b'"k": 2'), "canonical"),
        ((b'"k":2', b'"k":1,"k":2'), "canonical"),
    ],
)
def test_what_is_no_line_says_why(change: tuple[bytes, bytes], why: str) -> None:
    data = pack(Line(1, TIME, "something", {"k": 2}, NO_DIGEST))
    assert change[0] in data
    with pytest.raises(MachineError, match=why):
        parse(data.replace(*change))
