"""The daemons of one federation on this machine: started, watched, started again, stopped.

Rule 1: a daemon that is killed is back at once with the same options, and one whose disk is full
after a pause (restarts.py decides); the endpoints and homes of a run never change, so nobody else
has to know.
Rule 2: the run ends when it cannot go on: a server ended for good, or more learners than the quorum
spares.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from metisfl.deploy import processes
from metisfl.deploy.restarts import FULL_PAUSE_S, KILLS_MAX, WITHIN_S, Fate, Past, fate_of

__all__ = ["SERVERS", "Supervisor"]

SERVERS: Final = ("broker", "controller")


class Supervisor:
    """Owns the daemons of a run. All methods belong to one event loop, in the main thread."""

    def __init__(self, say: Callable[[str], None], *, spare: int) -> None:
        """`say` takes one line for the user; `spare` learners may be lost."""
        self._say = say
        self._spare = spare
        self._daemons: dict[str, processes.Daemon] = {}
        self._pasts: dict[str, Past] = {}
        self._pids: dict[str, int] = {}
        self.pids: Mapping[str, int] = MappingProxyType(self._pids)
        """Process ids by name, as they are now: a daemon that is not there is not in it."""

    async def start(
        self, name: str, module: str, options: Mapping[str, str | None], log: Path
    ) -> None:
        """Start a daemon: `python -m module --option value ...`; None is an option without one."""
        self._keep(await processes.start(name, module, options, log))

    async def watch(self) -> None:
        """Start again whoever is killed or has no room. Raises MetisError when that is not enough.

        Returns when no daemon is left.
        """
        lives = [asyncio.ensure_future(self._keep_up(one)) for one in self._daemons.values()]
        try:
            await asyncio.gather(*lives)
        finally:
            for life in lives:
                life.cancel()
            await asyncio.gather(*lives, return_exceptions=True)

    async def stop(self) -> None:
        """End all daemons, by force if they must be."""
        await processes.stop_all([*self._daemons.values()])

    async def _keep_up(self, daemon: processes.Daemon | None) -> None:
        while daemon is not None:
            await daemon.process.wait()
            daemon = await self._after(daemon)

    def _keep(self, daemon: processes.Daemon) -> None:
        self._daemons[daemon.name] = daemon
        self._pids[daemon.name] = daemon.process.pid

    async def _after(self, ended: processes.Daemon) -> processes.Daemon | None:
        """Do what follows from a daemon's end; return it if it runs again."""
        name, code = ended.name, ended.process.returncode
        assert code is not None, "it has ended"
        del self._pids[name]
        fate, self._pasts[name] = fate_of(code, self._pasts.get(name, Past()), time.monotonic())
        if fate is Fate.AGAIN:
            again = await self._start_again(ended)
            self._say(f"{name} was killed ({processes.name_of_signal(-code)}); started again")
            return again
        if fate is Fate.FULL:
            self._say(
                f"{name} has no room on its disk and goes on by itself when there is some: "
                f"{processes.last_line(ended)}"
            )
        if fate in (Fate.FULL, Fate.STILL_FULL):
            await asyncio.sleep(FULL_PAUSE_S)  # nothing tells when a disk has room again
            return await self._start_again(ended)
        words = processes.last_words(ended)
        if fate is Fate.GIVEN_UP:
            words = f"{name} was killed {KILLS_MAX + 1} times within {WITHIN_S:.0f} s; {words}"
        self._lose(name, code, words)
        return None

    async def _start_again(self, ended: processes.Daemon) -> processes.Daemon:
        again = await processes.start_again(ended)
        self._keep(again)
        return again

    def _lose(self, name: str, code: int, words: str) -> None:
        if name not in SERVERS:
            self._spare -= 1
        if name in SERVERS or self._spare < 0:
            raise processes.fault_of(code)(words)
        self._say(words)
