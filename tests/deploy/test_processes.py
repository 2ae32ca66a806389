"""The driver's children: stopped when asked, killed when deaf, and never without a last word."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from metisfl.deploy import processes
from metisfl.proto.errors import MachineError


def test_free_ports_are_found_and_given_ports_are_kept() -> None:
    found = processes.free_endpoints(
        ["tcp://127.0.0.1:0", "tcp://127.0.0.1:5570", "tcp://127.0.0.1:0"]
    )
    assert found[1] == "tcp://127.0.0.1:5570"
    assert len(set(found)) == 3
    for endpoint in (found[0], found[2]):
        with socket.socket() as taker:
            taker.bind(("127.0.0.1", int(endpoint.rpartition(":")[2])))


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(MachineError, match=r"no free port for tcp://192\.0\.2\.1:0"):
        processes.free_endpoints(["tcp://192.0.2.1:0"])


def test_a_daemon_that_ends_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    async def start_and_wait() -> processes.Daemon:
        daemon = await processes.start("json", "json.tool", {"nonsense": "1"}, tmp_path / "log")
        await daemon.process.wait()
        return daemon

    words = processes.last_words(asyncio.run(start_and_wait()))
    assert "json ended (exit code 2)" in words
    assert "No such file or directory" in words


def test_a_daemon_that_does_not_listen_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deaf.py").write_text(
        "import signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', flush=True)\n"
        "signal.pause()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "STOP_GRACE_S", 0.2)
    log = tmp_path / "log"

    async def start_and_stop() -> int | None:
        daemon = await processes.start("deaf", "deaf", {}, log)
        while "deaf" not in log.read_text():
            await asyncio.sleep(0.01)
        await processes.stop_all([daemon])
        return daemon.process.returncode

    assert asyncio.run(start_and_stop()) == -9
