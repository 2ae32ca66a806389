"""Attacks on the controller's bulk endpoint by who is let in."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from typing import Any, Final

from attacks.publishing import OTHERS, Ingress, bomb_bytes
from attacks.target import Attack, End, Socket, Tally, Target, answers, dealer, sent
from metisfl.native_c import crc32c
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.bulk import Code, Credit, Frame, Get, Open, Refused, model_subject, pack, parse
from metisfl.proto.chunk import (
    CHUNK_BYTES,
    ChunkHeader,
    federation_digest,
    pack_header,
    task_digest,
)
from metisfl.proto.errors import PeerError
from metisfl.proto.events import decode
from metisfl.proto.tensors import MANIFEST_BYTES_MAX


class Bulk:
    """One connection to the controller."""

    def __init__(self, socket: Socket, tell: Tally) -> None:
        self.socket, self.tell = socket, tell

    def send(self, frame: Frame) -> None:
        self.send_parts(pack(frame, crc32c))

    def send_parts(self, parts: list[Any]) -> None:
        self.tell("sent" if sent(self.socket, parts) else "not taken")

    def take(self, wait_ms: int = 0) -> Iterator[Frame]:
        """What was answered."""
        for parts in answers(self.socket, wait_ms):
            frame = parse(list(parts), crc32c)
            if isinstance(frame, Refused):
                name = Code(frame.code).name
                self.tell(f"refused {name}")
                self.tell.said[name] = frame.reason
            else:
                self.tell(f"answered {type(frame).__name__}")
            yield frame

    def drain(self) -> None:
        for _ in self.take():
            pass


def run_of(ingress: Ingress) -> tuple[str, int, bytes]:
    """The newest run that a learner can read of: its id, its round, its newest model."""
    run, number, model = "", 0, b""
    after = 0
    while batch := ingress.fetch(topics.run_topic(ingress.target.federation), after):
        for record in batch.records:
            envelope = pb.Envelope.FromString(record.envelope)
            try:
                message = decode(envelope.type, envelope.payload)
            except PeerError:
                continue
            if isinstance(message, pb.RunStarted):
                run, number = message.run_id, 0
            elif isinstance(message, pb.RoundClosed):
                number, model = message.round, message.model_digest
        if not batch.records:
            break
        after = batch.through
    return run, number, model


def others_tasks(target: Target, end: End, tell: Tally) -> None:
    """Updates for the tasks of others, whose names can be guessed."""
    with (
        dealer(target, target.ingress, "broker") as events,
        dealer(target, target.bulk, "controller") as socket,
    ):
        ingress, bulk = Ingress(events, target, Tally()), Bulk(socket, tell)
        ingress.hello(reads_only=True)
        while not end.come:
            run, number, _ = run_of(ingress)
            federation = federation_digest(target.federation, run)
            for name in OTHERS:
                task_id = f"{run or 'r'}.{number + 1}.train.{name}"
                digest = os.urandom(32)
                bulk.send(Open(task_id, federation, digest, 80_000, os.urandom(40)))
                bulk.send_parts(_chunk(task_digest(task_id), federation, 0))
                bulk.send(Credit(task_digest(task_id), 0, 2**30))
            bulk.drain()
            end.wait(0.02)


def _chunk(subject: bytes, federation: bytes, index: int, *, good: bool = True) -> list[bytes]:
    payload = os.urandom(1000) if index else os.urandom(CHUNK_BYTES)
    header = ChunkHeader(
        federation=federation,
        manifest=os.urandom(16),
        subject=subject,
        index=index,
        count=index + 1 if good else 2**31 - 1,
        value_count=1,
        payload_bytes=len(payload),
        payload_crc32c=crc32c(payload) ^ (not good),
    )
    return [b"C", pack_header(header, crc32c), payload]


def wild_chunks(target: Target, end: End, tell: Tally) -> None:
    """Chunks that nobody asked for: of unknown transfers, damaged, beyond the end."""
    with dealer(target, target.bulk, "controller") as socket:
        bulk = Bulk(socket, tell)
        while not end.wait(0.002):
            parts = _chunk(os.urandom(16), os.urandom(16), random.choice([0, 5, 2**30]))
            spoilt = bytearray(parts[1])
            spoilt[random.randrange(len(spoilt))] ^= 1
            bulk.send_parts(random.choice([parts, [parts[0], bytes(spoilt), parts[2]]]))
            bulk.send_parts(_chunk(bytes(16), bytes(16), 1, good=False))
            bulk.drain()


def bulk_garbage(target: Target, end: End, tell: Tally) -> None:
    """Frames that are none: random parts, too many, too few, and bombs in manifests."""
    bombs = list(bomb_bytes(MANIFEST_BYTES_MAX))
    with dealer(target, target.bulk, "controller") as socket:
        bulk = Bulk(socket, tell)
        while not end.wait(0.001):
            count = random.randrange(1, 60)
            parts = [os.urandom(random.choice([1, 16, 96, 300])) for _ in range(count)]
            bulk.send_parts(random.choice([parts, [b"C", *parts[:2]], [b"O", *parts[:3]]]))
            fields = struct.pack("<H16s32sQ", 1, bytes(16), os.urandom(32), 2**48)
            bulk.send_parts([b"O", fields, b"r.1.train.ada", random.choice(bombs)])
            bulk.drain()


def models(target: Target, end: End, tell: Tally) -> None:
    """Unknown models in a loop; known ones again and again, unread; credit beyond their end."""
    with (
        dealer(target, target.ingress, "broker") as events,
        dealer(target, target.bulk, "controller") as socket,
        dealer(target, target.bulk, "controller") as unread,
    ):
        ingress, bulk = Ingress(events, target, Tally()), Bulk(socket, tell)
        greedy = Bulk(unread, tell)
        ingress.hello(reads_only=True)
        while not end.come:
            _, _, model = run_of(ingress)
            for _ in range(20):
                bulk.send(Get(os.urandom(32), 0, 2**30))
                if model:
                    greedy.send(Get(model, 0, 2**30))
                    bulk.send(Get(model, 0, 1))
                    bulk.send(Credit(model_subject(model), 2**29, 2**30))
            bulk.drain()
            end.wait(0.02)


ATTACKS: Final[dict[str, Attack]] = {
    "others-tasks": others_tasks,
    "wild-chunks": wild_chunks,
    "bulk-garbage": bulk_garbage,
    "models": models,
}
