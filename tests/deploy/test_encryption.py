"""The driver's key is where it belongs, and nowhere else, before a daemon starts."""

from __future__ import annotations

import asyncio
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from metisfl.deploy.encryption import give_key
from metisfl.deploy.run_folder import RunFolder, create_run_folder
from metisfl.deploy.settings import Encryption, Federation, load_federation
from metisfl.proto.errors import MachineError, UserError

NAMES = ["ada", "bob", "cyd"]
TEXT = """\
federation = { name = "f", rounds = 1, privacy = "ckks" }
app = { object = "a:b" }
learners = [{ name = "ada" }, { name = "bob" }, { name = "cyd" }]
"""


@pytest.fixture
def made(tmp_path: Path) -> RunFolder:
    return create_run_folder(tmp_path / "run", NAMES)


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    (tmp_path / "f.toml").write_text(TEXT)
    return load_federation(tmp_path / "f.toml")


def asking(federation: Federation, profile: str | None, error: float) -> Federation:
    return replace(federation, encryption=Encryption(profile, error, 2, 0.95, "none"))


def ckks_files(run_folder: RunFolder) -> set[str]:
    """Everything of a key below the run folder, by what it holds and not by its name."""
    files = (path for path in run_folder.folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(run_folder.folder))
        for path in files
        if path.read_bytes().startswith(b"MFCK")
    }


def test_controller_and_learners_get_their_parts_and_nothing_else_is_left(
    made: RunFolder, federation: Federation
) -> None:
    line = asyncio.run(give_key(federation, made))
    assert "profile compact, the smallest that keeps an error of 1e-06 for 3 learners" in line
    learners = [f"learners/{name}/keys" for name in NAMES]
    public = [f"{home}/public.ckks" for home in ("controller/keys", *learners)]
    secret = [f"{home}/secret.ckks" for home in learners]
    assert ckks_files(made) == {*public, *secret}
    for paths, magic in ((public, b"MFCKPUB1"), (secret, b"MFCKSEC1")):
        (content,) = {(made.folder / path).read_bytes() for path in paths}
        assert content.startswith(magic)
    assert {stat.S_IMODE((made.folder / path).stat().st_mode) for path in secret} == {0o600}


def test_a_key_that_cannot_be_is_the_users_to_change_and_leaves_nothing(
    made: RunFolder, federation: Federation
) -> None:
    with pytest.raises(UserError, match="compact"):
        asyncio.run(give_key(asking(federation, "compact", 1e-12), made))
    assert ckks_files(made) == set()
    assert not (made.folder / "encryption").exists()


@pytest.mark.parametrize(
    "openfhe", ["raise ImportError('libOPENFHE.so.1: no such file')", "raise SystemExit(139)"]
)
def test_where_openfhe_does_not_load_one_sentence_says_what_to_do(
    made: RunFolder,
    federation: Federation,
    openfhe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "openfhe.py").write_text(openfhe)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MachineError) as failed:
        asyncio.run(give_key(federation, made))
    text = str(failed.value)
    assert text.startswith("encryption needs OpenFHE, which ")
    assert "3.10, or 3.12 with glibc 2.38" in text
    assert 'privacy = "plain"' in text
    assert "\n" not in text
    assert ckks_files(made) == set()
