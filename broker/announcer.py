"""What the broker itself has to say: who was admitted and who was expelled, as events in the log.

Rule: the broker is a publisher like any other, with an epoch and dense numbers, and says a thing
again until it is on disk. What it said last is remembered in the file `announced`, so that a list
that was edited while the broker was away is announced as well; once more after a crash, at worst.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Final

from google.protobuf.message import Message

from metisfl.broker.sequencer import Order, Sequencer
from metisfl.deploy.key_lists import replace_file
from metisfl.deploy.registry import Change, Peer, Registry, parse_registry, registry_text
from metisfl.proto.envelope import build_envelope
from metisfl.proto.errors import MachineError
from metisfl.proto.events import encode
from metisfl.proto.events_pb2 import PeerAdmitted, PeerExpelled
from metisfl.proto.topics import access_topic

__all__ = ["Announcer"]

PUBLISHER: Final = "broker"
ANNOUNCED_FILE: Final = "announced"


class Announcer:
    """Call `announce` when the list changes and `push` about once a second."""

    def __init__(self, folder: Path, sequencer: Sequencer, incarnation: int) -> None:
        """`folder` gets the file. Raises UserError if it is damaged."""
        self._path = folder / ANNOUNCED_FILE
        self._sequencer = sequencer
        self._publisher = sequencer.publisher(PUBLISHER)
        self._epoch = max(incarnation, self._publisher.epoch + 1)
        self._waiting: deque[tuple[str, Message]] = deque()
        self._first = 1  # the number of the first that waits
        self._announced = parse_registry(self._path) if self._path.exists() else None
        self._registry = self._announced

    def announce(self, registry: Registry) -> Change:
        """Say what has changed since the last list, in the federations that it concerns.

        The first list of a new log is no change.
        """
        before, self._registry = self._registry, registry
        if before is None:
            return Change()
        change = registry.since(before)
        for federation in self._sequencer.federations():
            here = registry.of(federation).since(before.of(federation))
            for peer in here.expelled:
                self._say(federation, PeerExpelled, peer)
            for peer in here.admitted:
                self._say(federation, PeerAdmitted, peer)
        return change

    def push(self) -> None:
        """Give what has none a place in the log, and remember what is on disk."""
        stored = self._publisher.stored(self._epoch)
        while self._waiting and self._first <= stored:
            self._waiting.popleft()
            self._first += 1
        last = self._publisher.last if self._publisher.epoch == self._epoch else 0
        for number in range(max(last + 1, self._first), self._first + len(self._waiting)):
            self._append(number, *self._waiting[number - self._first])
        if not self._waiting and self._registry is not self._announced:
            assert self._registry is not None, "only a list replaces a list"
            with suppress(
                MachineError
            ):  # a full disk: again in a second, and a crash says it twice
                replace_file(self._path, registry_text(self._registry), mode=0o600)
                self._announced = self._registry

    def _say(self, federation: str, kind: type[PeerExpelled | PeerAdmitted], peer: Peer) -> None:
        message = kind(principal=peer.principal, public=peer.public.decode())
        self._waiting.append((federation, message))

    def _append(self, number: int, federation: str, message: Message) -> None:
        order = self._sequencer.order(self._publisher, self._epoch, number)
        assert order is Order.NEXT, f"{number} of the broker's own events is {order}"
        topic = access_topic(federation)
        fault = self._sequencer.open_topic(self._publisher, topic, federation)
        kind, payload = encode(message)
        envelope = build_envelope(
            event_id=os.urandom(16),
            topic=topic,
            publisher=PUBLISHER,
            epoch=self._epoch,
            sequence=number,
            created_unix_ns=time.time_ns(),
            type=kind,
            correlation_id="",
            payload=payload,
        )
        if fault is None:
            lane = self._publisher.topics[topic]
            self._sequencer.append(self._publisher, lane, zlib.crc32(envelope), envelope)
        else:
            self._sequencer.refuse(self._publisher, fault, envelope)
