"""The driver lets sites make their key, and passes on whose fault it is that they cannot."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from metisfl.deploy import joint_encryption
from metisfl.deploy.driver import drive
from metisfl.deploy.joint_encryption import make_joint_key
from metisfl.deploy.run_folder import RunFolder, create_run_folder
from metisfl.deploy.settings import Federation, load_federation
from metisfl.proto.errors import MachineError, UserError

TEXT = """\
federation = { name = "f", rounds = 1, privacy = "ckks-threshold" }
app = { object = "a:b" }
learners = [{ name = "ada" }, { name = "bob" }]
"""
WIRES = {"ingress": "tcp://127.0.0.1:1", "live": "tcp://127.0.0.1:2"}


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    (tmp_path / "f.toml").write_text(TEXT)
    return load_federation(tmp_path / "f.toml")


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return create_run_folder(tmp_path / "run", ["ada", "bob"])


def instead(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Run this in the place of a site's command; its keys folder is sys.argv[3]."""
    monkeypatch.setattr(joint_encryption, "CEREMONY", (sys.executable, "-c", program))


def test_a_site_that_is_killed_goes_on_and_the_controller_gets_the_public_part(
    monkeypatch: pytest.MonkeyPatch, federation: Federation, run_folder: RunFolder
) -> None:
    instead(
        monkeypatch,
        f"""
import os, pathlib, sys
keys = pathlib.Path(sys.argv[3])
if (keys / "began").exists():
    (keys / "public.ckks").write_bytes(b"public")
    sys.exit()
(keys / "began").touch()
os.kill(os.getpid(), {int(signal.SIGKILL)})
""",
    )
    line = asyncio.run(make_joint_key(federation, run_folder, WIRES))
    assert "2 sites have made a joint key" in line
    assert (run_folder.controller / "keys" / "public.ckks").read_bytes() == b"public"


def test_what_a_site_cannot_do_is_said_by_whose_fault_it_is_and_the_others_end(
    monkeypatch: pytest.MonkeyPatch, federation: Federation, run_folder: RunFolder
) -> None:
    instead(
        monkeypatch,
        """
import sys, time
if "bob" in sys.argv[3]:
    sys.stderr.write("metisfl: error: no OpenFHE here")
    sys.exit(3)
time.sleep(600)
""",
    )
    with pytest.raises(MachineError, match=r"bob: .* no OpenFHE here"):
        asyncio.run(make_joint_key(federation, run_folder, WIRES))


def test_a_site_that_dies_again_and_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch, federation: Federation, run_folder: RunFolder
) -> None:
    instead(monkeypatch, f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})")
    with pytest.raises(MachineError, match="exit code -9"):
        asyncio.run(make_joint_key(federation, run_folder, WIRES))


def test_without_keys_there_is_no_joint_key(tmp_path: Path, federation: Federation) -> None:
    with pytest.raises(UserError, match="leave --insecure out"):
        asyncio.run(drive(federation, tmp_path / "run", insecure=True))
