"""One transfer at a learner: what conversation.py and transfer.py do, around the real Sender and
Patience.

Law: silence is asked again on a new connection, for ever. Models come in one piece here, since
their way is the updates' way turned round; updates go chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from metisfl.native_c import crc32c
from metisfl.proto import events_pb2 as pb
from metisfl.proto.bulk import Chunk, Credit, Get, Model, Open, Refused, Stored
from metisfl.proto.chunk import (
    CHUNK_BYTES,
    NO_DIGEST,
    ChunkHeader,
    federation_digest,
    short_digest,
)
from metisfl.proto.credit import WINDOW_CHUNKS, Patience, Sender
from metisfl.proto.model_pb2 import Manifest
from simulated.network import Connection, Network
from simulated.scenario import FEDERATION
from simulated.scheduler import Node

__all__ = ["Transfer", "chunk_payload", "manifest_of"]

PROGRESS_S: Final = 0.5
RECONNECT_S: Final = (0.08, 0.5)

OnEnd = Callable[[str, int], None]
"""Takes the reason of a refusal and its code; "" for what was brought to its end."""


def manifest_of(chunks: int) -> Manifest:
    """As much of a manifest as anybody looks at here."""
    return Manifest(payload_bytes=chunks * CHUNK_BYTES)


def chunk_payload(digest: bytes, index: int) -> bytes:
    """What stands for chunk `index` of the update with this digest."""
    return digest[:8] + index.to_bytes(2, "little")


class Transfer:
    """An upload or a download, until it calls `on_end`."""

    def __init__(
        self,
        node: Any,
        network: Network,
        task: pb.TaskAssigned | None,
        question: Open | Get,
        on_end: OnEnd,
        sender: Sender | None,
    ) -> None:
        self._node, self._network, self._task = node, network, task
        self._question, self._on_end, self._sender = question, on_end, sender
        self._subject = question.subject
        self._patience = Patience(node.now)
        self._link: Connection | None = None
        self._asked = self._ended = False
        self._progress_at = node.now
        self._connect()
        self._await()

    @staticmethod
    def download(node: Node, network: Network, digest: bytes, on_end: OnEnd) -> Transfer:
        return Transfer(node, network, None, Get(digest, 0, WINDOW_CHUNKS), on_end, None)

    @staticmethod
    def upload(
        node: Node,
        network: Network,
        task: pb.TaskAssigned,
        digest: bytes,
        chunks: int,
        on_end: OnEnd,
    ) -> Transfer:
        manifest = manifest_of(chunks)
        question = Open(
            task.task_id,
            federation_digest(FEDERATION, task.run_id),
            digest,
            manifest.payload_bytes,
            manifest.SerializeToString(),
        )
        return Transfer(node, network, task, question, on_end, Sender(chunks))

    def close(self) -> None:
        """Give up, without a word."""
        self._ended = True
        if self._link is not None:
            self._link.close()

    def _connect(self) -> None:
        self._link = self._network.connect(
            "bulk", self._node, f"learner:{self._node.name}", self._take, self._is_up, self._is_cut
        )

    def _ask(self) -> None:
        """Whatever was under way before is void."""
        self._asked = False
        if self._sender is not None:
            self._sender.restart()

    def _is_up(self, connection: Connection) -> None:
        self._send_some()

    def _is_cut(self, connection: Connection) -> None:
        connection.route = b""
        if not self._ended and self._link is connection:
            delay_s = self._node.scheduler.random.uniform(*RECONNECT_S)
            self._node.later(delay_s, self._again, connection)

    def _again(self, connection: Connection) -> None:
        if not self._ended and self._link is connection:
            self._connect()

    def _await(self) -> None:
        """Look at the deadline when it may have come."""
        if self._ended:
            return
        if self._node.now >= self._patience.deadline:
            self._patience.ask_again(self._node.now)
            assert self._link is not None
            self._link.close()
            self._ask()
            self._connect()
        self._node.later(self._patience.deadline - self._node.now + 0.001, self._await)

    def _take(self, connection: Connection, frame: Any) -> None:
        if self._ended or connection is not self._link:
            return
        if frame.subject not in (self._subject, NO_DIGEST):
            return
        now, progress = self._node.now, False
        if isinstance(frame, Refused):
            self._end(frame.reason, frame.code)
            return
        if isinstance(frame, Credit) and self._sender is not None:
            progress = self._sender.allow(frame) > 0
        elif isinstance(frame, Stored | Model) and frame.digest == self._question.digest:
            self._end("")
            return
        self._patience.word(now, progress=progress)
        if self._task is not None and now - self._progress_at >= PROGRESS_S:
            self._progress_at = now
            self._node.progress(self._task, "uploading", 0.5)
        self._send_some()

    def _end(self, refusal: str, code: int = 0) -> None:
        self._ended = True
        assert self._link is not None
        self._link.close()
        self._on_end(refusal, code)

    def _send_some(self) -> None:
        link, sender = self._link, self._sender
        if link is None or not link.route:
            return
        if not self._asked:
            self._asked = True
            link.to_server(self._question)
        while sender is not None and sender.ready:
            link.to_server(self._chunk(sender.next))
            sender.sent()

    def _chunk(self, index: int) -> Chunk:
        question, sender = self._question, self._sender
        assert isinstance(question, Open)
        assert sender is not None
        payload = chunk_payload(question.digest, index)
        header = ChunkHeader(
            question.federation,
            short_digest(question.manifest),
            self._subject,
            index,
            sender.count,
            1,
            len(payload),
            crc32c(payload),
        )
        return Chunk(header, payload)
