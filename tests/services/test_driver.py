"""The driver leaves nothing behind, however it ends, and says why when it must."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from driver_output import wait_for

from metisfl.deploy.restarts import KILLS_MAX

FOLDER = Path(__file__).parent
FEDERATION = f"""
[federation]
name = "trouble"
rounds = 100000
privacy = "plain"
[app]
object = "trouble:Site"
path = "{FOLDER}"
[[learners]]
name = "ada"
data = "honest 1"
[[learners]]
name = "bob"
data = "honest 2"
"""


def start(folder: Path, text: str) -> subprocess.Popen[str]:
    (folder / "federation.toml").write_text(text)
    command = [Path(sys.executable).with_name("metisfl"), "up", folder / "federation.toml"]
    return subprocess.Popen(
        [str(part) for part in [*command, "--run-folder", folder / "run"]],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def daemons_in(folder: Path, home: str = "") -> list[int]:
    """Processes whose command line names `folder`; a daemon's training child does not.

    `home` is that of one daemon, such as "broker" or "learners/ada".
    """
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder / "run" / home).encode() in command and b"service" in command:
            found.append(int(process.name))
    return found


def kill_daemon(folder: Path, home: str) -> None:
    """Kill one; it may have been started just now."""
    deadline = time.monotonic() + 20
    while not (found := daemons_in(folder, home)):
        assert time.monotonic() < deadline, f"{home} has not come back"
    os.kill(*found, signal.SIGKILL)


def wait_until_gone(folder: Path) -> None:
    for pid in daemons_in(folder):
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ended, _, _ = select.select([descriptor], [], [], 20)
        finally:
            os.close(descriptor)
        assert ended, f"process {pid} outlived its driver by 20 s"


def test_an_interrupted_run_ends_all_its_processes_and_says_where_its_files_are(
    tmp_path: Path,
) -> None:
    driver = start(tmp_path, FEDERATION)
    wait_for(driver, "round 2 of")
    driver.send_signal(signal.SIGINT)
    _, rest = driver.communicate(timeout=30)
    assert driver.returncode == 130, rest
    assert f"what the run has left is in {tmp_path / 'run'}" in rest
    assert daemons_in(tmp_path) == []
    for log in (tmp_path / "run" / "logs").iterdir():
        assert "Traceback" not in log.read_text(), log.read_text()


def test_a_run_that_is_interrupted_while_its_key_is_made_leaves_neither_key_nor_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "openfhe.py").write_text(
        f"import threading\npipe = open({str(pipe)!r}, 'wb', 0)\npipe.write(b'here')\n"
        "threading.Event().wait()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    driver = start(tmp_path, FEDERATION.replace('"plain"', '"ckks"'))
    with pipe.open("rb", 0) as maker:
        assert maker.read(4) == b"here"
        driver.send_signal(signal.SIGINT)
        _, rest = driver.communicate(timeout=30)
        assert driver.returncode == 130, rest
        assert maker.read() == b"", "the process that makes the key has ended"
    assert not list((tmp_path / "run").rglob("*.ckks"))
    assert not (tmp_path / "run" / "encryption").exists()


def test_a_killed_driver_takes_its_processes_with_it(tmp_path: Path) -> None:
    driver = start(tmp_path, FEDERATION)
    wait_for(driver, "round 1 of")
    assert len(daemons_in(tmp_path)) == 4
    driver.kill()
    driver.communicate()
    wait_until_gone(tmp_path)


def test_a_daemon_that_is_killed_is_back_and_the_run_goes_on(tmp_path: Path) -> None:
    driver = start(tmp_path, FEDERATION)
    wait_for(driver, "round 1 of")
    for home in ("broker", "controller", "learners/ada"):
        kill_daemon(tmp_path, home)
        name = home.rpartition("/")[2]
        wait_for(driver, f"{name} was killed (SIGKILL); started again")
        wait_for(driver, "2 of 2 counted")
        wait_for(driver, "2 of 2 counted")  # one of these has needed it
        assert len(daemons_in(tmp_path)) == 4
    driver.send_signal(signal.SIGINT)
    _, rest = driver.communicate(timeout=30)
    assert driver.returncode == 130, rest
    assert daemons_in(tmp_path) == []


def test_who_is_killed_again_and_again_ends_the_run(tmp_path: Path) -> None:
    driver = start(tmp_path, FEDERATION)
    wait_for(driver, "round 1 of")
    for _ in range(KILLS_MAX):
        kill_daemon(tmp_path, "controller")
        wait_for(driver, "controller was killed (SIGKILL); started again")
    kill_daemon(tmp_path, "controller")
    _, rest = driver.communicate(timeout=30)
    assert driver.returncode == 3, rest
    assert f"controller was killed {KILLS_MAX + 1} times within 60 s" in rest
    assert daemons_in(tmp_path) == []


def test_a_port_in_use_is_named_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        endpoint = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        driver = start(tmp_path, f'{FEDERATION}\n[broker]\ningress = "{endpoint}"\n')
        _, rest = driver.communicate(timeout=30)
    assert driver.returncode == 3
    assert f"{endpoint} cannot be bound: Address already in use" in rest
    assert daemons_in(tmp_path) == []


def test_when_no_site_can_take_part_the_run_ends_at_once(tmp_path: Path) -> None:
    driver = start(tmp_path, FEDERATION.replace("honest", "broken"))
    _, rest = driver.communicate(timeout=30)
    assert driver.returncode in (1, 2), "the run has failed, or its learners are seen to be gone"
    assert "FileNotFoundError: patients.csv" in rest
