"""The daemons of one federation on this machine: started, watched, started again, stopped.

Rule 1: a daemon that is killed is back at once with the same options (restarts.py decides); the
endpoints and homes of a run never change, so nobody else has to know.
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
from metisfl.deploy.restarts import KILLS_MAX, WITHIN_S, Fate, Kills, fate_of

__all__ = ["SERVERS", "Supervisor"]

SERVERS: Final = ("broker", "controller")


class Supervisor:
    """Owns the daemons of a run. All methods belong to one event loop, in the main thread."""

    def __init__(self, say: Callable[[str], None], *, spare: int) -> None:
        """`say` takes one line for the user; `spare` learners may be lost."""
        self._say = say
        self._spare = spare
        self._daemons: dict[str, processes.Daemon] = {}
        self._kills: dict[str, Kills] = {}
        self._pids: dict[str, int] = {}
        self.pids: Mapping[str, int] = MappingProxyType(self._pids)
        """Process ids by name, as they are now: a daemon that is not there is not in it."""

    async def start(self, name: str, module: str, options: Mapping[str, str], log: Path) -> None:
        """Start a daemon: `python -m module --option value ...`."""
        self._keep(await processes.start(name, module, options, log))

    async def watch(self) -> None:
        """Start again whoever is killed. Raises MetisError when the run cannot go on.

        Returns when no daemon is left.
        """
        waits = {self._wait_for(daemon): daemon for daemon in self._daemons.values()}
        try:
            while waits:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in done:
                    ended = waits.pop(wait)
                    again = await self._after(ended)
                    if again is not None:
                        waits[self._wait_for(again)] = again
        finally:
            for wait in waits:
                wait.cancel()

    async def stop(self) -> None:
        """End all daemons, by force if they must be."""
        await processes.stop_all([*self._daemons.values()])

    @staticmethod
    def _wait_for(daemon: processes.Daemon) -> asyncio.Future[int]:
        return asyncio.ensure_future(daemon.process.wait())

    def _keep(self, daemon: processes.Daemon) -> None:
        self._daemons[daemon.name] = daemon
        self._pids[daemon.name] = daemon.process.pid

    async def _after(self, ended: processes.Daemon) -> processes.Daemon | None:
        """Do what follows from a daemon's end; return it if it runs again."""
        name, code = ended.name, ended.process.returncode
        assert code is not None, "it has ended"
        del self._pids[name]
        fate, kills = fate_of(code, self._kills.get(name, Kills()), time.monotonic())
        self._kills[name] = kills
        if fate is Fate.AGAIN:
            again = await processes.start_again(ended)
            self._keep(again)
            self._say(f"{name} was killed ({processes.name_of_signal(-code)}); started again")
            return again
        words = processes.last_words(ended)
        if fate is Fate.GIVEN_UP:
            words = f"{name} was killed {KILLS_MAX + 1} times within {WITHIN_S:.0f} s; {words}"
        self._lose(name, code, words)
        return None

    def _lose(self, name: str, code: int, words: str) -> None:
        if name not in SERVERS:
            self._spare -= 1
        if name in SERVERS or self._spare < 0:
            raise processes.fault_of(code)(words)
        self._say(words)
