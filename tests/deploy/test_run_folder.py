"""In a run folder every process has a key of its own and knows only whom it must."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import load_identity
from metisfl.deploy.registry import load_registry
from metisfl.deploy.run_folder import DRIVER, create_run_folder
from metisfl.proto.errors import UserError


def test_servers_know_their_peers_and_the_others_know_the_servers(tmp_path: Path) -> None:
    made = create_run_folder(tmp_path / "run", ["ada", "bob"])
    learners = {"learner:ada", "learner:bob"}
    assert set(load_registry(made.broker / "keys").peers) == {"controller", DRIVER, *learners}
    assert set(load_registry(made.controller / "keys").peers) == {DRIVER, *learners}
    assert set(load_servers(made.controller / "keys")) == {"broker"}
    for home in (*made.learners.values(), made.driver):
        servers = load_servers(home / "keys")
        assert servers["broker"] == load_identity(made.broker / "keys").public
        assert servers["controller"] == load_identity(made.controller / "keys").public


def test_no_two_processes_share_a_key_and_no_key_is_readable_by_others(tmp_path: Path) -> None:
    create_run_folder(tmp_path / "run", ["ada", "bob"])
    secrets = list((tmp_path / "run").rglob("identity.key"))
    assert len(secrets) == 5
    assert len({path.read_text() for path in secrets}) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in secrets} == {0o600}


def test_a_folder_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        create_run_folder(tmp_path, ["ada"])
    with pytest.raises(UserError, match="is a file"):
        create_run_folder(tmp_path / "notes.txt", ["ada"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
