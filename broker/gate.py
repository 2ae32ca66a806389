"""Whom the broker lets in, from one second to the next.

Rule: the list of peers in `keys/` is the truth. Whoever is taken off it is cut off at once, with
all others, who are back in a moment; what changes is in the audit log and in the event log.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog

from metisfl.broker.announcer import Announcer
from metisfl.broker.dispatch import Dispatch
from metisfl.broker.loop import Loop
from metisfl.broker.offences import Offence
from metisfl.broker.reception import Reception
from metisfl.broker.status import HANDSHAKE
from metisfl.deploy.audit import Audit
from metisfl.deploy.curve import Authenticator
from metisfl.deploy.memory import needed_bytes
from metisfl.deploy.memory_guard import MemoryGuard, suspects
from metisfl.deploy.registry import Change, Registry, Watch
from metisfl.proto.errors import MachineError

__all__ = ["Gate"]

REFUSED_KEYS_TOLD_MAX: Final = 1024
log = structlog.get_logger()


class Gate:
    """Call `tick` about once a second."""

    def __init__(
        self,
        watch: Watch | None,
        authenticator: Authenticator,
        dispatch: Dispatch,
        loop: Loop,
        announcer: Announcer,
        audit: Audit,
        memory_limit_bytes: int,
    ) -> None:
        """`watch` is None for an insecure broker: it has no list and lets everybody in."""
        self._watch, self._authenticator = watch, authenticator
        self._dispatch, self._loop = dispatch, loop
        self._announcer, self._audit = announcer, audit
        self._memory = MemoryGuard(memory_limit_bytes)
        loop.on_look = self._hold_memory
        self._refused_total = authenticator.refused_total
        self._told: set[bytes] = set()
        self._unwritten: deque[tuple[str, dict[str, str | int]]] = deque()
        self._told_of_disk = False
        self._reception: Reception | None = None
        if watch is not None:
            self._adopt(watch.registry)

    def receive(self, folder: Path, public: bytes) -> None:
        """From now on, also let in who was invited, to ask for admission and for nothing else.

        `folder` holds the invitations, `public` is the broker's key in Z85.
        """
        self._reception = Reception(
            folder,
            public,
            self._loop.invited,
            record=self.record,
            refused=self._audit.refused,
        )

    def record(self, what: str, /, **facts: str | int) -> None:
        """Write a fact into the audit log; while the disk is full it waits, and nothing else."""
        self._unwritten.append((what, facts))
        self._write()

    def note(self, offences: Iterable[Offence]) -> None:
        """Write into the audit log who was refused what."""
        for one in offences:
            what = f"{one.cause} refused"
            self._audit.refused(what, one.principal, reason=one.reason, times=one.times)

    def tick(self) -> None:
        """Follow the list and tell whom it kept out. Raises MachineError if nobody watches."""
        if not self._authenticator.is_alive():
            raise MachineError("the broker's authenticator has died; see the log before this line")
        if self._watch is not None:
            self._follow(self._watch)
        self._announcer.push()
        self._tell_refusals()
        self._write()

    def finish(self) -> None:
        """Write down what is not yet."""
        self.note(self._dispatch.take_offences())
        self._announcer.push()
        self._write()

    def _follow(self, peers: Watch) -> None:
        reception = self._reception
        listed, invited = peers.changed(), reception is not None and reception.changed()
        if listed or invited:
            keys = reception.keys if reception is not None else {}
            self._authenticator.replace(peers.registry.keys, keys)
        if listed:
            change = self._adopt(peers.registry)
            if change.expelled:
                self._loop.cut_off("somebody was expelled")
            log.info("list of peers read again", peers=len(peers.registry.peers))
        if reception is not None:
            self._loop.reply(reception.answers(peers.registry))

    def _write(self) -> None:
        try:
            while self._unwritten:
                what, facts = self._unwritten[0]
                self._audit.record(what, **facts)
                self._unwritten.popleft()
        except MachineError as error:
            if not self._told_of_disk:
                log.error("the audit log has to wait", waiting=len(self._unwritten), why=str(error))
        self._told_of_disk = bool(self._unwritten)

    def _adopt(self, registry: Registry) -> Change:
        self._dispatch.bind({peer.principal: peer.federations for peer in registry.peers.values()})
        change = self._announcer.announce(registry)
        for what, peers in (("expelled", change.expelled), ("admitted", change.admitted)):
            for peer in peers:
                log.warning(what, principal=peer.principal, public=peer.public.decode())
                self.record(
                    what,
                    principal=peer.principal,
                    public=peer.public.decode(),
                    federations=",".join(sorted(peer.federations)) or "all",
                )
        return change

    def _hold_memory(self, now: float) -> None:
        """Cut everybody off when somebody makes libzmq hold too much."""
        limit = self._memory.limit_bytes
        held = needed_bytes(limit)
        self._memory, cut = self._memory.look(held, now)
        if not cut:
            return
        let_in = self._authenticator.let_in(with_invited=True)
        named = suspects(let_in, self._loop.heard)
        connected = " ".join(sorted(self._dispatch.connections()))
        self._loop.cut_off(f"{held} bytes of memory are in use, over {limit}")
        log.warning("memory limit", suspects=named, held_bytes=held, connected=connected)
        for who in named or ["unknown"]:
            self._audit.refused("memory limit", who, held_bytes=held, connected=connected)

    def _tell_refusals(self) -> None:
        """Each unknown key is logged once, however often it knocks."""
        refused_total = self._authenticator.refused_total
        self._dispatch.offences.count(HANDSHAKE, refused_total - self._refused_total)
        self._refused_total = refused_total
        for refusal in self._authenticator.take_refusals():
            public = refusal.public.decode()
            self._audit.refused("connection refused", public or refusal.address)
            if refusal.public in self._told or len(self._told) >= REFUSED_KEYS_TOLD_MAX:
                continue
            self._told.add(refusal.public)
            log.warning(
                "connection refused",
                public=public,
                address=refusal.address,
                reason=refusal.reason,
            )
