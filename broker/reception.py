"""The desk for those who have an invitation and nothing else: it hears them once a second.

Rule: nothing of theirs comes near the log. A connection that was opened by an invitation's key can
ask for admission, and whatever else it sends is refused here. What it asked for is on disk before
it is told so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import structlog

from metisfl.broker.enrolment import decide, open_invitations
from metisfl.deploy.invitations import INVITATIONS_FILE, Invitations, change, load
from metisfl.deploy.registry import Registry
from metisfl.proto.enrolment import (
    INVITED,
    REFUSED,
    Answer,
    Ask,
    Invitation,
    fingerprint,
    pack_answer,
    parse_ask,
)
from metisfl.proto.errors import MetisError, PeerError, UserError

__all__ = ["Mailbox", "Reception"]

HEARD_MAX: Final = 64  # connections in a second; who comes later asks again
UNWRITTEN: Final = (
    "the broker cannot write down that you have asked, and its log says why: tell the operator, "
    "then run the same command again"
)

Reply = tuple[bytes, list[bytes]]
"""A connection, and the message for it."""

log = structlog.get_logger()


class Mailbox:
    """What invited connections have sent since it was emptied: the latest message of each."""

    def __init__(self) -> None:
        self._heard: dict[bytes, tuple[str, Ask | str]] = {}

    def put(self, peer: bytes, user: str, parts: Sequence[bytes]) -> None:
        """Take a message from connection `peer` of `user`, which begins with `invited:`."""
        if peer not in self._heard and len(self._heard) >= HEARD_MAX:
            return
        try:
            wish: Ask | str = parse_ask(parts)
        except PeerError as error:
            wish = str(error)
        self._heard[peer] = (user.removeprefix(INVITED), wish)

    def empty(self) -> dict[bytes, tuple[str, Ask | str]]:
        """Connection -> the principal that it was invited as, and its wish or what is wrong."""
        heard, self._heard = self._heard, {}
        return heard


class Record(Protocol):
    """Writes into the audit log what has happened."""

    def __call__(self, what: str, /, **facts: str | int) -> None: ...


class Refused(Protocol):
    """Counts in the audit log what was refused to whom."""

    def __call__(self, what: str, who: str, /, **facts: str | int) -> None: ...


class Reception:
    """Call `changed` and `answers` once a second."""

    def __init__(
        self, folder: Path, broker: bytes, mailbox: Mailbox, *, record: Record, refused: Refused
    ) -> None:
        """`folder` is the broker's `keys`, `broker` its public key in Z85.

        `record` and `refused` write into the audit log.
        """
        self._folder, self._broker, self._mailbox = folder, broker, mailbox
        self._record, self._refused = record, refused
        self._invitations: dict[str, Invitation] = {}
        self._seen: object = None
        self._keys: dict[bytes, str] = {}

    @property
    def keys(self) -> dict[bytes, str]:
        """Public keys of the open invitations -> `invited:` and the principal that it is for."""
        return self._keys

    def changed(self) -> bool:
        """Look at file and clock; True if `keys` are others now.

        A file that cannot be read leaves what was known, in words.
        """
        if (version := self._version()) != self._seen:
            self._seen = version
            try:
                self._adopt(load(self._folder))
            except UserError as error:
                log.error("the invitations stay as they were", reason=str(error))
        invitations = open_invitations(self._invitations, time.time())
        keys = {it.public: INVITED + who for who, it in invitations.items()}
        before, self._keys = self._keys, keys
        return keys != before

    def answers(self, registry: Registry) -> Iterator[Reply]:
        """Decide about all that was heard, and give the answers that may go out."""
        answers: list[tuple[bytes, Answer, Invitation | None]] = []
        for peer, (principal, wish) in self._mailbox.empty().items():
            answer, bind = self._decide(principal, wish, registry)
            answers.append((peer, answer, bind))
        wanted = {bind.principal: bind for _, _, bind in answers if bind is not None}
        bound, trouble = self._write(wanted) if wanted else (set(), None)
        for peer, answer, bind in answers:
            if bind is None or bind.principal in bound:
                yield peer, pack_answer(answer)
            elif trouble is not None:
                yield peer, pack_answer(trouble)

    def _decide(
        self, principal: str, wish: Ask | str, registry: Registry
    ) -> tuple[Answer, Invitation | None]:
        controller = registry.peers.get("controller")
        if controller is None and not isinstance(wish, str):
            wish = "the broker does not list its controller; tell the operator"
        if isinstance(wish, str) or controller is None:
            log.warning("an invited connection was refused", principal=principal, reason=wish)
            self._refused("invitation misused", principal, reason=str(wish))
            return Answer(REFUSED, str(wish)), None
        decision = decide(
            principal,
            wish,
            invitations=self._invitations,
            peers=registry.keys,
            now_unix_s=time.time(),
        )
        shown = fingerprint(
            principal, site=wish.site, broker=self._broker, controller=controller.public
        )
        if decision.bind is not None:
            self._invitations[principal] = decision.bind
            log.warning("asked for admission", principal=principal, fingerprint=shown)
            self._record("asked for admission", principal=principal, fingerprint=shown)
        elif decision.answer.state == REFUSED:
            reason = decision.answer.reason
            say = log.error if decision.suspect else log.warning
            say("admission refused", principal=principal, fingerprint=shown, reason=reason)
            self._refused(
                "admission refused", principal, fingerprint=shown, reason=decision.answer.reason
            )
        return decision.answer, decision.bind

    def _write(self, binds: dict[str, Invitation]) -> tuple[set[str], Answer | None]:
        """Put on disk which keys have asked: whose now stand there, and what the others are told.

        Those who are told nothing ask again: somebody else has just changed the file.
        """

        def with_them(before: Invitations) -> Invitations:
            still = {
                who: it
                for who, it in binds.items()
                if who in before
                and before[who].public == it.public
                and before[who].asked in (None, it.asked)
            }
            return {**before, **still}

        try:
            change(self._folder, with_them, now_unix_s=time.time(), wait=False)
            self._invitations = load(self._folder)
        except MetisError as error:
            log.error("who asked for admission cannot be written down", reason=str(error))
            self._seen = None  # what is on disk counts: read it again
            return set(), Answer(REFUSED, UNWRITTEN)
        return {who for who, it in binds.items() if self._invitations.get(who) == it}, None

    def _adopt(self, invitations: dict[str, Invitation]) -> None:
        for who, it in invitations.items():
            before = self._invitations.get(who)
            if before is None or before.public != it.public:
                log.info("invitation open", principal=who, federation=it.federation)
                self._record(
                    "invitation open",
                    principal=who,
                    federation=it.federation,
                    expires_unix_s=it.expires_unix_s,
                )
        self._invitations = invitations

    def _version(self) -> tuple[int, int, int]:
        try:
            status = (self._folder / INVITATIONS_FILE).stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_mtime_ns, status.st_size)
