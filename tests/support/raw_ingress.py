"""The broker's ingress without its client: what a test puts on the wire by hand."""

from __future__ import annotations

from typing import Any

import zmq

from metisfl.proto import frames
from metisfl.proto.events_pb2 import Envelope
from metisfl.proto.frames import Ack


def envelope(publisher: str, sequence: int, topic: str, **fields: object) -> bytes:
    good: dict[str, object] = {
        "version": 1,
        "event_id": bytes(16),
        "topic": topic,
        "publisher": publisher,
        "epoch": 1,
        "sequence": sequence,
        "type": "TaskFailed",
    }
    return Envelope(**{**good, **fields}).SerializeToString()  # type: ignore[arg-type]


def publish(data: bytes) -> list[bytes]:
    return [frames.PUBLISH, frames.pack_crc(data), data]


def answer(dealer: zmq.Socket[bytes]) -> frames.Reply:
    return frames.parse_reply(dealer.recv_multipart())


def still_serves(site: Any, topic: str, sockets: Any, sequence: int = 1) -> None:
    """Another peer publishes as if nothing had happened."""
    dealer = site.greeted(sockets)
    dealer.send_multipart(publish(envelope(site.identity.principal, sequence, topic)))
    assert answer(dealer) == Ack(1, sequence)
