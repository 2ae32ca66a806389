"""The talk of a new site with the broker: asks by its code, waits, says hello by its own key.

Rule: the broker decides, by its own clock and files; this side tells people what it hears and what
they can do about it. Every step can be broken off and begun again with the same code and key.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from metisfl import __version__
from metisfl.deploy.invitation_code import Code
from metisfl.deploy.keys import Identity
from metisfl.deploy.knock import Knock, Sign
from metisfl.proto import frames
from metisfl.proto.enrolment import (
    ADMITTED,
    ENROL,
    REFUSED,
    Answer,
    Ask,
    fingerprint,
    pack_ask,
    parse_answer,
)
from metisfl.proto.errors import MachineError, PeerError, UserError
from metisfl.proto.events_pb2 import Hello, Welcome

__all__ = ["Joining"]

ASK_AGAIN_S: Final = 2.0
UNREACHABLE_S: Final = 5.0  # told then; it goes on
STRANGER_S: Final = 5.0  # a broker that is just starting gets so long
NEW_CODE_S: Final = 3.0  # a broker looks for new invitations once a second, and reads them then
KNOCK_AGAIN_S: Final = 0.5
CONTROLLER_S: Final = 2.0


class Joining:
    """One attempt to become a peer. `say` shows a line to the person who waits."""

    def __init__(
        self,
        code: Code,
        identity: Identity,
        say: Callable[[str], None],
        wait_s: float | None = None,
    ) -> None:
        """`wait_s`: how long to wait in all; None waits until the operator has decided."""
        self._code, self._identity, self._say = code, identity, say
        self._wait_s = wait_s
        self._deadline = float("inf") if wait_s is None else time.monotonic() + wait_s
        self._told_waiting = False

    def until_admitted(self) -> None:
        """Return when the broker has welcomed this site by its own key.

        Raises UserError for a code that opens nothing any more, PeerError for whatever the broker
        refuses, MachineError if nobody is reached, or nobody decides, in the time that was given.
        """
        asked = self._ask()
        self._greet(admitted=asked)

    def controller_is_open(self) -> bool | None:
        """Tell whether the controller lets this site in; None if it cannot be reached now."""
        code, identity = self._code, self._identity
        with Knock(
            code.bulk,
            public=identity.public,
            secret=identity.secret,
            server_public=code.controller,
        ) as knock:
            sign = knock.wait(CONTROLLER_S)
        return {Sign.OPEN: True, Sign.REFUSED: False}.get(sign) if isinstance(sign, Sign) else None

    # ---- By the code's key ---------------------------------------------------------------

    def _ask(self) -> bool:
        """Ask until the operator has decided. False: the code's key opens nothing (any more)."""
        until = time.monotonic() + NEW_CODE_S
        while not (admitted := self._ask_at_the_door()) and time.monotonic() < until:
            pass  # that door has waited a moment before it closed
        return admitted

    def _ask_at_the_door(self) -> bool:
        public, secret = self._code.key_pair()
        question = pack_ask(Ask(public, self._identity.public))
        with self._knock(public, secret) as knock:
            patience = _Patience(self._code.ingress, self._say)
            while True:
                heard = knock.wait(self._time_left(ASK_AGAIN_S))
                if heard is Sign.REFUSED:
                    knock.wait(KNOCK_AGAIN_S)
                    return False
                if isinstance(heard, list):
                    patience.answered()
                    if self._is_admitted(parse_answer(heard)):
                        return True
                    continue
                patience.silent(heard, knock.is_open)
                knock.send(question)

    def _is_admitted(self, answer: Answer) -> bool:
        if answer.state == REFUSED:
            raise PeerError(f"the broker refuses: {answer.reason}")
        if answer.state == ADMITTED:
            return True
        if not self._told_waiting:
            self._told_waiting = True
            code = self._code
            shown = fingerprint(
                code.principal,
                site=self._identity.public,
                broker=code.broker,
                controller=code.controller,
            )
            self._say(f"fingerprint: {shown}")
            self._say(
                f"Read this to the operator of the federation {code.federation} by telephone, all "
                "five groups."
            )
            self._say(
                f"Waiting until {code.principal} is admitted. You may break this off: the same "
                "command goes on."
            )
        return False

    # ---- By the site's own key -----------------------------------------------------------

    def _greet(self, *, admitted: bool) -> None:
        hello = Hello(protocol=frames.PROTOCOL, software=f"metisfl {__version__}")
        with self._knock(self._identity.public, self._identity.secret) as knock:
            patience = _Patience(self._code.ingress, self._say)
            while True:
                heard = knock.wait(self._time_left(ASK_AGAIN_S))
                if heard is Sign.REFUSED:
                    raise self._not_let_in(admitted)
                if isinstance(heard, list):
                    if self._is_welcome(heard):
                        return
                    continue
                patience.silent(heard, knock.is_open)
                knock.send(frames.pack_hello(hello))

    def _is_welcome(self, parts: list[bytes]) -> bool:
        if parts[:1] == [ENROL]:
            return False
        reply = frames.parse_reply(parts)
        if isinstance(reply, frames.Reject):
            raise PeerError(f"the broker refuses: {reply.reason}")
        if not isinstance(reply, Welcome):
            return False
        if reply.principal != self._identity.principal:
            raise PeerError(
                f"the broker knows this key as {reply.principal}, not as {self._identity.principal}"
            )
        return True

    def _not_let_in(self, admitted: bool) -> UserError | PeerError:
        if admitted:
            return PeerError("the operator has just expelled this site again; ask by telephone")
        until, now = (
            time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))
            for at in (self._code.expires_unix_s, time.time())
        )
        over = time.time() >= self._code.expires_unix_s
        why = (
            f"it expired at {until}, and now it is {now}"
            if over
            else f"it was used or withdrawn; or it has expired, which it does at {until}: this "
            f"machine's clock says {now}"
        )
        return UserError(
            f"the broker at {self._code.ingress} does not know this code any more: {why}. Ask the "
            "operator for a new one"
        )

    # ---- Time ---------------------------------------------------------------------------------

    def _knock(self, public: bytes, secret: bytes) -> Knock:
        return Knock(
            self._code.ingress, public=public, secret=secret, server_public=self._code.broker
        )

    def _time_left(self, most_s: float) -> float:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            what = "nobody has admitted this site" if self._told_waiting else "no broker answered"
            raise MachineError(
                f"{what} within {self._wait_s:g} s at {self._code.ingress}; the same command goes "
                "on"
            )
        return min(most_s, left_s)


class _Patience:
    """Tells what is tried while nobody answers, and gives up on who holds another key."""

    def __init__(self, endpoint: str, say: Callable[[str], None]) -> None:
        self._endpoint, self._say = endpoint, say
        self._silent_since = time.monotonic()
        self._stranger_since: float | None = None
        self._told = False

    def answered(self) -> None:
        """The broker has said something."""
        self._silent_since, self._told = time.monotonic(), False

    def silent(self, sign: Sign | None, is_open: bool) -> None:
        """It has not: there is a sign, or nothing for a while. Raises PeerError."""
        now = time.monotonic()
        if is_open:
            self._stranger_since = None
        elif sign is Sign.STRANGER:
            self._stranger_since = self._stranger_since or now
            if now - self._stranger_since >= STRANGER_S:
                raise PeerError(
                    f"who answers at {self._endpoint} does not hold the key of the broker that the "
                    "code was made by. If the broker has got a new key, ask the operator for a new "
                    "code; else something stands between"
                )
        if not self._told and now - self._silent_since >= UNREACHABLE_S:
            self._told = True
            self._say(
                f"The broker at {self._endpoint} lets this site in but does not answer yet; asking "
                "again."
                if is_open
                else f"Nobody answers at {self._endpoint} yet, still trying. Does the broker run, "
                "is the name right, and may this machine connect to that port?"
            )
