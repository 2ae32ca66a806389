"""`metisfl rounds`: what is shown was checked, and what was changed is said with exit code 1."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from recorded_run import recorded

from metisfl.controller.round_files import read_chain
from metisfl.controller.rounds_command import command
from metisfl.deploy.command import main
from metisfl.proto.errors import UserError
from metisfl.proto.records import pack_record, unpack_record


def test_a_run_is_shown_with_who_counted_and_who_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, rounds=2, fails=True)
    assert command(["show", str(tmp_path / "r1")]) == 0
    said = capsys.readouterr().out
    assert "round 1: 3 invited, 3 counted" in said
    assert "  ada: weight 10" in said
    assert "round 2: 3 invited, failed" in said
    assert "  bob: failed, no data" in said


def test_a_round_that_was_stopped_is_shown_so_after_the_one_that_the_log_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = recorded(tmp_path, rounds=2, stops=True)
    assert world.run.finished is not None
    known = world.run.finished.record.hex()
    for head in (known, read_chain(tmp_path / "r1").head.hex()):
        assert command(["show", str(tmp_path / "r1"), "--head", head]) == 0
        said = capsys.readouterr().out
        assert "round 1: 3 invited, 3 counted" in said
        assert "round 2: 3 invited, stopped" in said
        assert "  bob: stopped, stopped by driver:d: enough" in said
    (tmp_path / "r1" / "000002.msgpack").unlink()
    assert command(["verify", str(tmp_path / "r1"), "--head", known]) == 0
    (tmp_path / "r1" / "000001.msgpack").unlink()
    assert main(["rounds", "verify", str(tmp_path / "r1"), "--head", known]) == 1


def test_a_whole_chain_is_said_to_be_whole_and_its_head_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    head = read_chain(tmp_path / "r1").head.hex()
    assert command(["verify", str(tmp_path / "r1"), "--head", head, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["records"], said["head"]) == (4, head)
    assert said["rounds"][1]["counted"] == {"ada": 10.0, "bob": 10.0, "cyd": 10.0}


def test_a_changed_record_is_found_and_ends_the_command_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    path = tmp_path / "r1" / "000001.msgpack"
    record = unpack_record(path.read_bytes())
    path.write_bytes(pack_record(replace(record, counted=record.counted[:1])))
    assert main(["rounds", "verify", str(tmp_path / "r1")]) == 1
    assert "000002.msgpack does not follow the record before it" in capsys.readouterr().err


def test_a_changed_newest_record_is_found_by_the_digest_that_the_sites_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = recorded(tmp_path)
    assert world.run.finished is not None
    known = world.run.finished.record.hex()
    path = tmp_path / "r1" / "000003.msgpack"
    record = unpack_record(path.read_bytes())
    path.write_bytes(pack_record(replace(record, evaluated_ns=1)))
    assert main(["rounds", "verify", str(tmp_path / "r1"), "--head", known]) == 1
    assert "it was changed, or records at the end are missing" in capsys.readouterr().err


def test_a_head_that_is_no_digest_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    recorded(tmp_path)
    with pytest.raises(UserError, match="a SHA-256 has 64 digits"):
        command(["verify", str(tmp_path / "r1"), "--head", "abc"])
