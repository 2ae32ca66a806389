"""The daemons of a federation on one machine, as children of the driver.

Rule: a child never outlives the driver, even if that is killed, and whatever a child says goes to
its log in the run folder; when it ends by itself, the end of that log is what the user is shown.
Who is started again has the same options, and its log goes on.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from metisfl.deploy.insecure import INSECURE_VARIABLE
from metisfl.deploy.run import PARENT_VARIABLE
from metisfl.proto.errors import DiskFull, MachineError, MetisError, PeerError, UserError

__all__ = [
    "Daemon",
    "fault_of",
    "free_endpoints",
    "last_line",
    "last_words",
    "name_of_signal",
    "start",
    "start_again",
    "stop_all",
]

STOP_GRACE_S: Final = 10.0
LAST_WORDS: Final = 5


@dataclass(frozen=True, slots=True, eq=False)
class Daemon:
    """A running daemon. `name` is for people: "broker", "cleveland"."""

    name: str
    command: Sequence[str]
    log: Path
    process: asyncio.subprocess.Process


async def start(name: str, module: str, options: Mapping[str, str | None], log: Path) -> Daemon:
    """Start `python -m module --option value ...`. Call from the main thread.

    None is an option without a value.
    """
    command = [sys.executable, "-m", module]
    for option, value in options.items():
        command += [f"--{option}"] if value is None else [f"--{option}", value]
    return Daemon(name, command, log, await _launch(command, log))


async def start_again(ended: Daemon) -> Daemon:
    """Start a daemon that has ended as it was started before. Call from the main thread."""
    return replace(ended, process=await _launch(ended.command, ended.log))


async def _launch(command: Sequence[str], log: Path) -> asyncio.subprocess.Process:
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Whether it is insecure is said by the options alone: the driver must agree.
            env={**os.environ, INSECURE_VARIABLE: "", PARENT_VARIABLE: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is the driver's; it asks its children to end
        )


async def stop_all(daemons: list[Daemon]) -> None:
    """Ask all to end, last started first; kill those that have not within STOP_GRACE_S."""
    for daemon in reversed(daemons):
        if daemon.process.returncode is None:
            daemon.process.send_signal(signal.SIGTERM)
    waits = [asyncio.ensure_future(daemon.process.wait()) for daemon in daemons]
    if waits:
        await asyncio.wait(waits, timeout=STOP_GRACE_S)
    for daemon in daemons:
        if daemon.process.returncode is None:
            daemon.process.kill()
    await asyncio.gather(*waits)


def last_words(daemon: Daemon) -> str:
    """Why a daemon ended: how, and the last lines of its log."""
    code = daemon.process.returncode
    assert code is not None
    how = f"exit code {code}" if code >= 0 else name_of_signal(-code)
    text = daemon.log.read_text(errors="replace").splitlines()[-LAST_WORDS:]
    return "\n  ".join([f"{daemon.name} ended ({how}); {daemon.log} ends with", *text])


def last_line(daemon: Daemon) -> str:
    """The line that a daemon ended with, where its log had room for it."""
    text = daemon.log.read_text(errors="replace").splitlines()
    return text[-1] if text else f"{daemon.log} is empty"


def name_of_signal(number: int) -> str:
    """SIGKILL for 9, and "signal 35" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def fault_of(code: int) -> type[MetisError]:
    """Whose fault it is that one of our processes ended by itself: what it said with its exit code.

    Whatever says nothing (a signal, a defect) is this machine's.
    """
    said = {error.exit_code: error for error in (UserError, PeerError, DiskFull)}
    return said.get(code, MachineError)


def free_endpoints(wanted: list[str]) -> list[str]:
    """Replace port 0 in `tcp://host:0` by a free port of this machine.

    The port can be taken by another process before the daemon binds it; the daemon then says so.
    """
    holders, endpoints = [], []
    try:
        for endpoint in wanted:
            head, _, port = endpoint.rpartition(":")
            if port == "0":
                host = head.removeprefix("tcp://").replace("*", "")
                holder = socket.socket()
                holders.append(holder)
                holder.bind((host, 0))
                endpoint = f"{head}:{holder.getsockname()[1]}"
            endpoints.append(endpoint)
    except OSError as error:
        raise MachineError(f"no free port for {endpoint}: {error.strerror}") from None
    finally:
        for holder in holders:
            holder.close()
    return endpoints
