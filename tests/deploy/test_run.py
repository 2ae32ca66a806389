"""run.py with real processes and real signals: how each end of a daemon looks from outside."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from metisfl.deploy import run
from metisfl.proto.errors import DiskFull, MachineError, PeerError, UserError

PATIENCE_S = 30  # never waited for in a test that passes

ASYNCIO_DAEMON = """
import sys
from metisfl.deploy.run import ready, run

async def main(stop):
    ready()
    print("ready", flush=True)
    await stop.wait()
    print("ended", flush=True)

sys.exit(run("daemon", main))
"""

POLLING_DAEMON = """
import signal, sys, zmq
from metisfl.deploy.run import ready, run_polling

def main(stop):
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    poller = zmq.Poller()
    poller.register(stop, zmq.POLLIN)
    ready()
    print("ready", flush=True)
    while poller.poll() and not stop.requested:
        print("woken", flush=True)
    assert poller.poll(0), "no longer readable for whoever polls later"
    print("ended", flush=True)

sys.exit(run_polling("daemon", main))
"""

POLLING_IN_A_THREAD = """
import select, sys, threading
from metisfl.deploy.run import run_polling

def main(stop):
    def serve():
        print("ready", flush=True)
        select.select([stop], [], [])
        print("ended" if stop.requested else "woken for nothing", flush=True)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()

sys.exit(run_polling("daemon", main))
"""

HANGING = {
    "asyncio": """
import asyncio, sys
from metisfl.deploy.run import run

async def main(stop):
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    await asyncio.Event().wait()

sys.exit(run("daemon", main))
""",
    "polling": """
import select, sys, threading
from metisfl.deploy.run import run_polling

def main(stop):
    print("ready", flush=True)
    select.select([stop], [], [])
    print("stopping", flush=True)
    threading.Event().wait()

sys.exit(run_polling("daemon", main))
""",
}
DAEMONS = {
    "asyncio": ASYNCIO_DAEMON,
    "polling": POLLING_DAEMON,
    "polling in a thread": POLLING_IN_A_THREAD,
}
both_kinds = pytest.mark.parametrize("daemon", ["asyncio", "polling"])


@contextmanager
def started(script: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process; its stdout and stderr are one pipe."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, if a test failed
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The rest of the output, once every process that holds the pipe has ended; and the code."""
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output.strip()


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket on which systemd would listen, with $NOTIFY_SOCKET set."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("daemon", DAEMONS)
def test_a_daemon_that_is_asked_to_end_ends_cleanly(daemon: str, number: signal.Signals) -> None:
    with started(DAEMONS[daemon]) as process:
        assert next_line(process) == "ready"
        process.send_signal(number)
        assert end_of(process) == (0, "ended")


@both_kinds
def test_systemd_hears_ready_and_stopping(daemon: str, systemd: socket.socket) -> None:
    with started(DAEMONS[daemon]) as process:
        assert systemd.recv(100) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        assert systemd.recv(100) == b"STOPPING=1"
        assert end_of(process) == (0, "ready\nended")


def test_another_signal_wakes_a_poll_loop_and_does_not_end_it() -> None:
    with started(POLLING_DAEMON) as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        assert next_line(process) == "woken"
        process.send_signal(signal.SIGTERM)
        assert end_of(process) == (0, "ended")


@pytest.mark.parametrize("script", HANGING.values(), ids=HANGING.keys())
def test_a_second_sigint_ends_a_daemon_that_hangs(script: str) -> None:
    with started(script) as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert next_line(process) == "stopping"
        process.send_signal(signal.SIGTERM)  # what a driver adds to the terminal's SIGINT
        process.send_signal(signal.SIGINT)
        assert end_of(process) == (-signal.SIGINT, "")


@both_kinds
def test_a_daemon_ends_with_its_parent_however_that_ends(daemon: str) -> None:
    parent = f"""
import os, signal, subprocess, sys
os.environ[{run.PARENT_VARIABLE!r}] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", {DAEMONS[daemon]!r}])
signal.pause()
"""
    with started(parent) as process:
        assert next_line(process) == "ready"
        process.kill()
        # The daemon holds the pipe: its end is the end of the output.
        assert end_of(process) == (-signal.SIGKILL, "ended")


@both_kinds
def test_a_daemon_whose_parent_is_gone_already_ends_at_once(daemon: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(PATIENCE_S)
    with started(DAEMONS[daemon], **{run.PARENT_VARIABLE: str(gone.pid)}) as process:
        assert end_of(process) == (0, "ready\nended")


def test_a_daemon_with_a_living_parent_serves_and_keeps_the_variable_to_itself() -> None:
    script = ASYNCIO_DAEMON.replace(
        '"ready"', f'{run.PARENT_VARIABLE!r} in __import__("os").environ'
    )
    with started(script, **{run.PARENT_VARIABLE: str(os.getpid())}) as process:
        assert next_line(process) == "False", "a child of the daemon would look for a grandparent"
        process.send_signal(signal.SIGTERM)
        assert end_of(process) == (0, "ended")


def test_a_parent_that_is_no_process_id_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(run.PARENT_VARIABLE, "yes")
    assert run.run_polling("daemon", lambda stop: 0) == MachineError.exit_code
    assert "allowed is a process id" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [UserError, MachineError, PeerError, DiskFull])
def test_an_expected_error_is_one_line_and_its_exit_code(
    kind: type[UserError], capsys: pytest.CaptureFixture[str]
) -> None:
    async def main(stop: run.StopSignal) -> None:
        raise kind("port 5570 is in use;\n  choose another")

    def polling_main(stop: run.PollableStop) -> None:
        raise kind("port 5570 is in use;\n  choose another")

    line = "metisfl-broker: error: port 5570 is in use; choose another\n"
    assert run.run("metisfl-broker", main) == kind.exit_code
    assert capsys.readouterr().err == line
    assert run.run_polling("metisfl-broker", polling_main) == kind.exit_code
    assert capsys.readouterr().err == line


def test_a_full_disk_is_no_defect_wherever_it_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(stop: run.StopSignal) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "home/trained")

    assert run.run("metisfl-learner", main) == DiskFull.exit_code
    told = "metisfl-learner: error: home/trained: No space left on device; make room\n"
    assert capsys.readouterr().err == told


def test_a_log_on_the_full_disk_takes_no_line_and_changes_no_exit_code() -> None:
    program = """
import sys
from metisfl.deploy.run import run
from metisfl.proto.errors import DiskFull

async def main(stop):
    raise DiskFull("no room")

sys.exit(run("daemon", main))
"""
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stderr=full, timeout=PATIENCE_S)
    assert ended.returncode == DiskFull.exit_code


def test_a_defect_is_a_traceback_and_70(capsys: pytest.CaptureFixture[str]) -> None:
    async def main(stop: run.StopSignal) -> None:
        raise ZeroDivisionError("a defect")

    assert run.run("daemon", main) == 70
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "in main" in printed
    assert "ZeroDivisionError: a defect" in printed


def test_the_result_of_main_is_the_exit_code() -> None:
    async def main(stop: run.StopSignal) -> int:
        return 5

    assert run.run("daemon", main) == 5
    assert run.run_polling("daemon", lambda stop: 6) == 6
    assert run.run_polling("daemon", lambda stop: None) == 0


def test_a_daemon_can_ask_itself_to_end() -> None:
    async def main(stop: run.StopSignal) -> None:
        assert not stop.requested
        stop.request()
        await stop.wait()
        assert stop.requested

    def polling_main(stop: run.PollableStop) -> None:
        assert not stop.requested
        stop.request()
        assert stop.requested

    assert run.run("daemon", main) == 0
    assert run.run_polling("daemon", polling_main) == 0


def test_a_poll_loop_may_be_asked_any_number_of_times() -> None:
    stop = run.PollableStop()
    for _ in range(100_000):
        stop.request()
    assert stop.requested
    stop.close()


def test_signal_handlers_are_given_back() -> None:
    def handler(number: int, frame: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, handler)
    try:
        run.run_polling("daemon", lambda stop: 0)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_usage_error_keeps_the_code_of_argparse() -> None:
    with pytest.raises(SystemExit) as ended:
        run.run_polling("daemon", lambda stop: sys.exit(2))
    assert ended.value.code == 2


def test_each_word_to_systemd_is_one_datagram(systemd: socket.socket) -> None:
    run.ready()
    run.status("round 3 of 20:\n 5 of 8 sites")
    run.watchdog()
    run.stopping()
    heard = [systemd.recv(200) for _ in range(4)]
    status = b"STATUS=round 3 of 20: 5 of 8 sites"
    assert heard == [b"READY=1", status, b"WATCHDOG=1", b"STOPPING=1"]


def test_an_abstract_notify_socket_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0metisfl-test-{os.getpid()}")
        receiver.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@metisfl-test-{os.getpid()}")
        run.ready()
        assert receiver.recv(100) == b"READY=1"


def test_without_systemd_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    run.ready()


def test_only_ready_insists_on_being_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    run.watchdog()
    run.stopping()
    with pytest.raises(MachineError, match="systemd waits in vain"):
        run.ready()


def test_the_watchdog_is_fed_twice_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert run.watchdog_interval_s() is None
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert run.watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert run.watchdog_interval_s() == 15.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert run.watchdog_interval_s() is None, "meant for another process"


@pytest.mark.parametrize("value", ["", "0", "-5", "1.5", "soon", "٣"])
def test_a_watchdog_time_that_is_none_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", value)
    with pytest.raises(MachineError, match="allowed is a whole number above 0"):
        run.watchdog_interval_s()
