"""systemd's own opinion of the units, and the promises that an operator relies on."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from metisfl.deploy.restarts import FULL_PAUSE_S
from metisfl.proto.errors import DiskFull

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy" / "systemd"
NAMES = ("metisfl-broker.service", "metisfl-controller.service", "metisfl-learner@.service")


def settings(name: str) -> dict[str, list[str]]:
    """Key -> its values in order, all sections together (no key is in two of ours)."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def verify(script: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(script), str(Path(sys.executable).parent)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_systemd_finds_nothing_to_say() -> None:
    said = verify(UNITS / "verify.sh")
    assert (said.returncode, said.stderr) == (0, ""), said.stderr


def test_a_misspelt_key_is_found(tmp_path: Path) -> None:
    for source in (*(UNITS / name for name in NAMES), UNITS / "verify.sh"):
        (tmp_path / source.name).write_text(source.read_text().replace("LockPers", "LokPers"))
    said = verify(tmp_path / "verify.sh")
    assert said.returncode == 1
    assert "LokPersonality" in said.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_crash_is_mended_and_a_mistake_is_not_repeated(name: str) -> None:
    unit = settings(name)
    assert unit["Type"] == ["notify"]
    assert unit["NotifyAccess"] == ["main"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartSec"] == ["200ms"]
    assert unit["StartLimitIntervalSec"] == ["0"], "a machine's trouble may outlast any count"
    assert unit["RestartPreventExitStatus"] == ["2"], "UserError.exit_code"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("status", ["0", "3", "70", "KILL", "75"])
def test_only_who_has_no_room_pauses(name: str, status: str, tmp_path: Path) -> None:
    """systemd tells what runs after a daemon how that ended; `$$` is a `$` to it."""
    (said,) = settings(name)["ExecStopPost"]
    pause = tmp_path / "sleep"
    pause.write_text('#!/bin/sh\necho "$1"\n')
    pause.chmod(0o755)
    done = subprocess.run(
        shlex.split(said.replace("$$", "$")),
        env={"PATH": str(tmp_path), "EXIT_STATUS": status},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    full = status == str(DiskFull.exit_code)
    assert done.stdout == (f"{FULL_PAUSE_S:.0f}\n" if full else "")


@pytest.mark.parametrize("name", NAMES)
def test_a_daemon_is_a_user_of_its_own_with_one_folder(name: str) -> None:
    unit = settings(name)
    stem = name.removesuffix(".service")
    # Without %i in it, all instances of a template would share one user.
    assert unit["User"] == [stem.replace("@", "-%i")]
    assert unit["DynamicUser"] == ["yes"]
    folder = stem.replace("@", "/%i")
    assert unit["StateDirectory"] == [folder]
    program = stem.rstrip("@")
    assert unit["ExecStart"][0].startswith(f"/opt/metisfl/bin/{program} --home %S/{folder}")
    joined = [f"-%S/{folder}/site.env"] if "learner" in name else []
    assert unit["EnvironmentFile"] == [*joined, "-/etc/metisfl/%N.env"], "the last one wins"


@pytest.mark.parametrize("name", NAMES)
def test_hardening_leaves_what_the_libraries_need(name: str) -> None:
    unit = settings(name)
    assert "AF_NETLINK" in unit["RestrictAddressFamilies"][0], "libzmq aborts at bind without it"
    assert unit["SystemCallErrorNumber"] == ["EPERM"], "OpenBLAS is killed without it"
    assert "sched_setscheduler" in unit["SystemCallFilter"][-1], "libzmq aborts without it"
    writes_code = "learner" in name
    assert ("MemoryDenyWriteExecute" in unit) != writes_code, "oneDNN aborts: it compiles kernels"
    assert "NoExecPaths" not in unit, "the interpreter could not start"
    assert unit["LimitNOFILE"] == ["65536"]
    assert unit["LimitCORE"] == ["0"], "a core file would hold keys"


@pytest.mark.parametrize("name", NAMES)
def test_a_daemon_is_watched_only_if_it_says_that_it_lives(name: str) -> None:
    """A watchdog on a daemon that never calls run.watchdog() would kill it again and again."""
    folder = name.removeprefix("metisfl-").removesuffix(".service").rstrip("@")
    service = (ROOT / folder / "service.py").read_text(encoding="utf-8")
    assert ("WatchdogSec" in settings(name)) == ("watchdog()" in service)


@pytest.mark.parametrize("name", NAMES)
def test_exposure_stays_low(name: str) -> None:
    """systemd's own score, 0 (nothing left to do) to 100; a bare unit has 92."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=15", "--no-pager"]
    said = subprocess.run([*command, str(UNITS / name)], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0, said.stdout[-400:] + said.stderr
