"""A TCP relay to one endpoint, with the faults of a bad network."""

from __future__ import annotations

import asyncio
from contextlib import suppress

CHUNK_BYTES = 65536


class _Pair:
    """One connection: from who came to the relay, the near end, to the endpoint, the far end."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near, self.far = near, far
        self.half_open = False

    def abort(self) -> None:
        self.near.transport.abort()
        self.far.transport.abort()


class Wire:
    """Everything is in one event loop, which must turn for bytes to flow."""

    def __init__(self, far: str, near: str = "tcp://127.0.0.1:0") -> None:
        """Relays connections to the endpoint `near` to the endpoint `far`."""
        self._far_port, self._near_port = (int(end.rpartition(":")[2]) for end in (far, near))
        self._pairs: set[_Pair] = set()
        self._ever: list[_Pair] = []
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.tasks: list[asyncio.Task[None]] = []

    async def open(self) -> str:
        """Begin to listen; return the near endpoint with its port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._near_port)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> int:
        """Reset all connections; both ends see it. Returns how many there were."""
        pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            pair.abort()
        return len(pairs)

    def stall(self) -> None:
        """Carry nothing until `go_on`; connections stay and can be made."""
        self._flowing.clear()

    def go_on(self) -> None:
        self._flowing.set()

    def half_open(self, *, near: bool) -> int:
        """Leave one end of all connections open without the other, which is reset.

        `near`: those who came to the relay are left talking to nobody; else the endpoint is.
        New connections are as good as ever. Returns how many there were.
        """
        for pair in self._pairs:
            pair.half_open = True
            (pair.far if near else pair.near).transport.abort()
        count, self._pairs = len(self._pairs), set()
        return count

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for pair in self._ever:
            pair.abort()
        await asyncio.sleep(0)  # the loop closes what was aborted

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._far_port)
        except ConnectionError:
            writer.transport.abort()
            return
        pair = _Pair(writer, far_writer)
        self._pairs.add(pair)
        self._ever.append(pair)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self.tasks.append(asyncio.create_task(self._carry(pair, source, sink)))

    async def _carry(
        self, pair: _Pair, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            with suppress(ConnectionError):
                while data := await source.read(CHUNK_BYTES):
                    await self._flowing.wait()
                    if not pair.half_open:
                        sink.write(data)
                        await sink.drain()
        finally:
            if not pair.half_open:
                pair.abort()
                self._pairs.discard(pair)
