"""The life of a process: signals, systemd, the parent, the exit code.

Rule: a process ends in one of three ways. Asked to (SIGTERM, SIGINT): it finishes what it does and
exits 0. Hindered (a MetisError, a full disk): one line on stderr says what to do, and the class
gives the exit code. Broken (anything else): traceback, exit 70; nothing is caught to be carried on
from.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from types import FrameType, TracebackType
from typing import Any

from metisfl.proto.errors import FULL, DiskFull, MachineError, MetisError

__all__ = [
    "PARENT_VARIABLE",
    "ExitCode",
    "Interrupted",
    "PollableStop",
    "StopSignal",
    "exit_with_parent",
    "first_end",
    "ready",
    "run",
    "run_polling",
    "status",
    "stopping",
    "watchdog",
    "watchdog_interval_s",
]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
DEFECT_EXIT_CODE = 70
INTERRUPTED_EXIT_CODE = 130
PARENT_VARIABLE = "METISFL_EXIT_WITH_PARENT"  # its value is the parent's process id
PR_SET_PDEATHSIG = 1


class Interrupted(MetisError):
    """The user ended a command before it had what was asked for."""

    exit_code = INTERRUPTED_EXIT_CODE


class ExitCode:
    """`with ExitCode(name) as exit_code:` ends a process's work with a code, not an exception.

    The outermost edge of a process: whatever ended the block is told on stderr. SystemExit passes.
    """

    def __init__(self, name: str) -> None:
        self.value = 0
        self._name = name

    def __enter__(self) -> ExitCode:
        _leave_no_core()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            return True
        if isinstance(error, SystemExit):
            return False
        if isinstance(error, KeyboardInterrupt):
            self.value = INTERRUPTED_EXIT_CODE
        elif isinstance(error, MetisError):
            self._tell(error)
        elif isinstance(error, OSError) and error.errno in FULL:
            self._tell(DiskFull(f"{error.filename or 'a file'}: {error.strerror}; make room"))
        else:
            traceback.print_exception(kind, error, trace)
            self.value = DEFECT_EXIT_CODE
        return True

    def _tell(self, error: MetisError) -> None:
        self.value = error.exit_code
        try:
            print(f"{self._name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        except OSError:  # a file on a full disk: what it still holds would change the exit code
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115


class StopSignal:
    """Given to an asyncio daemon: set once, by SIGTERM, SIGINT or `request`, and never cleared."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    async def wait(self) -> None:
        await self._event.wait()

    def request(self) -> None:
        """Ask the daemon to end, from within its own loop."""
        if not self.requested:
            stopping()
            self._event.set()


class PollableStop:
    """Given to a daemon that polls: readable (see `fileno`) once it was asked to end.

    Register it with the poller for reading; when it is readable, look at `requested`. Both work in
    any thread.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._requested = False

    def fileno(self) -> int:
        return self._reader.fileno()

    @property
    def requested(self) -> bool:
        """Reads what signals have written: other signals wake the poller too, and do not count."""
        if not self._requested:
            try:
                numbers = self._reader.recv(4096)
            except BlockingIOError:
                return False
            if not set(numbers).isdisjoint(STOP_SIGNALS):
                self._requested = True
                self.request()  # stays readable for whoever polls later
                stopping()
        return self._requested

    def request(self) -> None:
        """Ask the daemon to end, from any thread."""
        try:
            self._writer.send(bytes([signal.SIGTERM]))
        except BlockingIOError:
            return  # full of requests already

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


def run(name: str, main: Callable[[StopSignal], Awaitable[int | None]]) -> int:
    """Run an asyncio daemon to its end and return its exit code, for `sys.exit`.

    `main` ends soon after `stop.wait()` returns; its result is the exit code (None is 0). A second
    SIGINT ends the process at once. Obeys PARENT_VARIABLE. Call from the main thread.
    """
    with ExitCode(name) as exit_code:
        exit_code.value = asyncio.run(_supervised(main))
    return exit_code.value


def run_polling(name: str, main: Callable[[PollableStop], int | None]) -> int:
    """Like `run`, for a daemon with a blocking poll loop: it polls `stop` with its sockets."""
    stop = PollableStop()
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    # The wake-up descriptor is written by the C handler itself, so a signal that arrives just
    # before the poll starts is not slept through. The Python handlers need to do nothing more.
    previous_wakeup = signal.set_wakeup_fd(stop._writer.fileno(), warn_on_full_buffer=False)
    try:
        with ExitCode(name) as exit_code:
            for number in STOP_SIGNALS:
                signal.signal(number, _note_signal)
            _obey_parent_variable()
            exit_code.value = main(stop) or 0
    finally:
        signal.set_wakeup_fd(previous_wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        stop.close()
    return exit_code.value


def ready() -> None:
    """Tell systemd that the daemon serves. Raises MachineError if systemd cannot be told."""
    _notify("READY=1", must=True)


def stopping() -> None:
    """Tell systemd that the daemon ends. `run` does it when the signal comes."""
    _notify("STOPPING=1")


def watchdog() -> None:
    """Tell systemd that the daemon is well. Call it every `watchdog_interval_s`, while it is."""
    _notify("WATCHDOG=1")


def status(text: str) -> None:
    """Show one line in `systemctl status`."""
    _notify("STATUS=" + " ".join(text.split()))


def watchdog_interval_s() -> float | None:
    """Seconds between calls of `watchdog`: half of what the unit allows; None if it is not watched.

    Raises MachineError if WATCHDOG_USEC is not a number of microseconds.
    """
    allowed_us = os.environ.get("WATCHDOG_USEC")
    if allowed_us is None or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    if not allowed_us.isascii() or not allowed_us.isdigit() or not int(allowed_us[:18]):
        raise MachineError(f"WATCHDOG_USEC={allowed_us!r}: allowed is a whole number above 0")
    return int(allowed_us[:18]) / 2e6


def exit_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Get a signal when the process `parent`, which started this one, is gone; at once if it is.

    Linux only, elsewhere nothing happens. The kernel watches the *thread* that started this
    process, so a parent starts its children from its main thread.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0):
        raise MachineError(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    # Asked after prctl: a parent that went before it has left us with another one, and no signal.
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


async def first_end(parts: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until one of a daemon's parts ends, end the others, and raise what ended the first."""
    try:
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            part.result()
    finally:
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)


async def _supervised(main: Callable[[StopSignal], Awaitable[int | None]]) -> int:
    stop = StopSignal()
    loop = asyncio.get_running_loop()

    def on_sigint() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one ends the process
        stop.request()

    loop.add_signal_handler(signal.SIGTERM, stop.request)
    loop.add_signal_handler(signal.SIGINT, on_sigint)
    _obey_parent_variable()
    return await main(stop) or 0


def _leave_no_core() -> None:
    """For this process and those that it starts: a core file would hold keys."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def _note_signal(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one ends the process


def _obey_parent_variable() -> None:
    # Taken out, so that a process started by this one does not look for a grandparent.
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None:
        return
    if not (parent.isascii() and parent.isdigit()):
        raise MachineError(f"{PARENT_VARIABLE}={parent!r}: allowed is a process id")
    exit_with_parent(int(parent))


def _notify(state: str, *, must: bool = False) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    path = "\0" + address[1:] if address[0] == "@" else address  # "@": abstract, without a file
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.settimeout(1.0)
            notifier.sendto(state.encode(), path)
    except OSError as error:
        if must:
            raise MachineError(f"NOTIFY_SOCKET={address}: {error}; systemd waits in vain") from None
