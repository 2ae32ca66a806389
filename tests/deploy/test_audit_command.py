"""`metisfl audit`: what is shown was checked, and what was changed is said with exit code 1."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from metisfl.deploy.audit import Audit
from metisfl.deploy.audit_command import AuditBroken, command
from metisfl.deploy.audit_files import check
from metisfl.deploy.audit_line import Line, pack, parse
from metisfl.proto.errors import MachineError, UserError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    audit = Audit(tmp_path / "audit.jsonl")
    audit.record("started", software="metisfl 1.0", public="{ZFV^Zq")
    audit.record("peer admitted", principal="learner:ada")
    audit.refused("connection refused", "\x1b[2Jeve")
    audit.close()
    return tmp_path


def head_of(home: Path) -> str:
    return check([home / "audit.jsonl"]).head


def changed(home: Path, row: int, old: bytes, new: bytes) -> None:
    lines = (home / "audit.jsonl").read_bytes().splitlines()
    assert old in lines[row]
    lines[row] = lines[row].replace(old, new)
    (home / "audit.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert command([*argv]) == 0
    return capsys.readouterr().out


def test_each_fact_is_a_line_and_the_head_can_be_noted(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(capsys, str(home)).splitlines()
    assert lines[0].endswith('started  software="metisfl 1.0" public="{ZFV^Zq"')
    assert lines[1].split("  ")[-2:] == ["peer admitted", "principal=learner:ada"]
    assert lines[3] == f"3 lines, unbroken; the last has the digest {head_of(home)}"
    assert "given as --head, it later shows whether lines at the end were cut off" in lines[4]


def test_text_from_outside_cannot_move_the_cursor(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where somebody has changed the last line, which the chain does not show."""
    log = home / "audit.jsonl"
    *before, last = log.read_bytes().splitlines()
    line = parse(last)
    forged = Line(line.number, line.time, "\x1b[2J", {"\x1b]0;": "\u202e\x9b"}, line.previous)
    log.write_bytes(b"\n".join([*before, pack(forged)]) + b"\n")
    output = shown(capsys, str(home))
    assert output.replace("\n", "").isprintable()
    assert output.isascii()


def test_only_checking_shows_no_facts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = shown(capsys, str(home), "--verify", "--head", head_of(home))
    assert output.splitlines() == [
        f"3 lines, unbroken; the last has the digest {head_of(home)}",
        "line 3 is the one that was noted, of 3",
    ]


def test_a_digest_that_was_noted_earlier_is_still_there(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = head_of(home)
    audit = Audit(home / "audit.jsonl")
    audit.record("stopped")
    audit.close()
    assert "line 3 is the one that was noted, of 4" in shown(
        capsys, str(home), "--verify", "--head", noted.upper()
    )


def test_a_changed_line_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(home, 1, b"learner:ada", b"learner:eve")
    with pytest.raises(AuditBroken, match=r"2 lines are good; audit\.jsonl, line 3: it names"):
        command([str(home)])
    assert capsys.readouterr().out == "", "nothing is shown of it"
    assert AuditBroken.exit_code == 1, "as of `metisfl rounds`"


def test_a_changed_last_line_is_found_by_the_noted_digest_alone(home: Path) -> None:
    noted = head_of(home)
    changed(home, 2, b"eve", b"bob")
    assert command([str(home)]) == 0
    with pytest.raises(AuditBroken, match="lines at the end were cut off, or changed"):
        command([str(home), "--head", noted])


def test_a_cut_log_is_found_by_the_noted_digest_alone(home: Path) -> None:
    noted, log = head_of(home), home / "audit.jsonl"
    log.write_bytes(b"\n".join(log.read_bytes().splitlines()[:2]) + b"\n")
    assert command([str(home)]) == 0
    with pytest.raises(AuditBroken, match=f"2 lines follow each other, and none has .* {noted}"):
        command([str(home), "--head", noted])


def test_a_line_without_an_end_is_mentioned(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (home / "audit.jsonl").open("ab") as log:
        log.write(b'{"number":4')
    assert "behind it are 11 bytes without an end" in shown(capsys, str(home))


def test_json_is_one_object(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: dict[str, Any] = json.loads(shown(capsys, str(home), "--json"))
    assert (said["lines"], said["head"]) == (3, head_of(home))
    assert [one["what"] for one in said["facts"]] == [
        *("started", "peer admitted", "connection refused")
    ]
    assert said["facts"][2]["facts"] == {"who": "\x1b[2Jeve"}
    assert "facts" not in json.loads(shown(capsys, str(home), "--json", "--verify"))


def test_what_was_recorded_since_a_time_is_shown(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = datetime.now(timezone.utc)

    def count(since: str) -> int:
        return len(json.loads(shown(capsys, str(home), "--json", "--since", since))["facts"])

    for since in ("2020-01-01", "2020-01-01T09:30Z", "1h", "30m", "7d"):
        assert count(since) == 3, since
    later = now + timedelta(hours=1)
    for since in (later.isoformat(), f"{later:%Y-%m-%dT%H:%M:%SZ}", f"{now.year + 1}-01-01"):
        assert count(since) == 0, since
    second = parse((home / "audit.jsonl").read_bytes().splitlines()[1]).time
    assert count(second) == 2
    east = datetime.fromisoformat(second.replace("Z", "+00:00")).astimezone(
        timezone(timedelta(hours=5, minutes=30))
    )
    assert count(east.isoformat()) == 2, "a time of another zone is the same time"


@pytest.mark.parametrize("since", ["yesterday", "5w", "99999999999d", "2026-13-01", ""])
def test_a_time_that_is_none_is_a_mistake_of_the_user(home: Path, since: str) -> None:
    with pytest.raises(UserError, match="use a time such as"):
        command([str(home), "--since", since])


def test_a_head_that_is_no_digest_is_a_mistake_of_the_user(home: Path) -> None:
    with pytest.raises(UserError, match="a SHA-256 has 64 digits"):
        command([str(home), "--head", "abc"])


def test_a_folder_without_a_log_is_said(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"holds no audit\.jsonl; name the home of a daemon"):
        command([str(tmp_path)])


def test_one_file_of_several_can_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = Audit(tmp_path / "audit.jsonl", file_bytes=300)
    for number in range(6):
        audit.record("something", number=number)
    audit.close()
    assert "6 lines, unbroken" in shown(capsys, str(tmp_path))
    assert "they are lines 3 to 4 of a log: the first are not here" in shown(
        capsys, str(tmp_path / "audit-0001.jsonl")
    )
