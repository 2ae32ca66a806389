"""ceremony_install.py: a key is put into force as a whole, whenever the process dies meanwhile."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ceremony_world import manifest_of
from example_key import PUBLIC, secret_of

from metisfl.deploy import ckks_keys
from metisfl.deploy.ckks_keys import load_public, load_secret
from metisfl.learner import ceremony_install
from metisfl.learner.ceremony_install import DONE_FILE, FORMER, install, made_before
from metisfl.learner.ceremony_kept import STATE_FILE, begin_kept, save
from metisfl.proto.ckks_key import SecretPart
from metisfl.proto.errors import UserError

MANIFEST = manifest_of()
SECRET = secret_of(PUBLIC)
OLD = replace(PUBLIC, max_share=PUBLIC.max_share / 2)
OLD_SECRET = secret_of(OLD, b"the former one")


class Killed(BaseException):
    """The process is gone."""


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> list[str]:
    """Die before the file operation with this number; a file that is written then is cut off."""
    done: list[str] = []

    def dying(name: str, act: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> Any:
            if len(done) == moment:
                if name == "write":
                    act(args[0], args[1][: len(args[1]) // 2])
                raise Killed
            done.append(name)
            return act(*args, **more)

        return wrapped

    monkeypatch.setattr(ckks_keys, "write_new", dying("write", ckks_keys.write_new))
    monkeypatch.setattr(os, "rename", dying("rename", os.rename))
    monkeypatch.setattr(Path, "unlink", dying("unlink", Path.unlink))
    monkeypatch.setattr(Path, "chmod", dying("chmod", Path.chmod))
    for name in ("replace_file", "sync_folder"):
        monkeypatch.setattr(ceremony_install, name, dying(name, getattr(ceremony_install, name)))
    return done


def check_in_force(folder: Path) -> None:
    assert load_public(folder) == PUBLIC
    assert load_secret(folder) == SECRET
    assert made_before(folder, MANIFEST) == PUBLIC
    assert not (folder / STATE_FILE).exists()


@pytest.mark.parametrize("rekeying", [False, True])
def test_a_kill_at_any_moment_is_mended_by_the_same_command(tmp_path: Path, rekeying: bool) -> None:
    moment, whole = 0, False
    while not whole:
        folder = tmp_path / str(moment)
        folder.mkdir()
        save(folder, begin_kept(MANIFEST, "ada"))
        if rekeying:
            ckks_keys.write_new_key(folder, OLD, OLD_SECRET)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                install(folder, MANIFEST, PUBLIC, SECRET)
                whole = True
            except Killed:
                pass
        if (folder / STATE_FILE).exists():  # else the command does not come to `install` again
            install(folder, MANIFEST, PUBLIC, SECRET)
        check_in_force(folder)
        if rekeying:
            former = folder / FORMER / OLD.fingerprint.hex()
            assert (former / "public.ckks").read_bytes() == OLD.pack()
            assert SecretPart.parse((former / "secret.ckks").read_bytes()) == OLD_SECRET
        moment += 1
    assert moment > 5, "there were operations to die at"


def test_what_was_made_by_another_ceremony_is_not_this_ones(tmp_path: Path) -> None:
    assert made_before(tmp_path, MANIFEST) is None
    install(tmp_path, MANIFEST, PUBLIC, SECRET)
    assert made_before(tmp_path, manifest_of(number="1" * 32)) is None
    (tmp_path / "public.ckks").write_bytes(OLD.pack())
    assert made_before(tmp_path, MANIFEST) is None, "another key is in force"
    (tmp_path / DONE_FILE).write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        made_before(tmp_path, MANIFEST)


def test_a_file_that_is_no_key_is_left_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "public.ckks"
    path.write_bytes(b"something of somebody")
    with pytest.raises(UserError, match="move it away, and run the same command again"):
        install(tmp_path, MANIFEST, PUBLIC, SECRET)
    assert path.read_bytes() == b"something of somebody"
    assert not (tmp_path / "secret.ckks").exists()
