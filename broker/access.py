"""Who may publish and read what, and how much of the live socket one principal may take.

Rule: what is not allowed here is refused. A learner publishes only under its own name and never
reads another's tasks or completions; only a controller assigns tasks and writes the ledger. In a
ceremony all learners of a federation speak to all, under one topic, so that it has one order.

Pure. Principals were authenticated by their keys before anything comes here.
"""

from __future__ import annotations

from typing import Final

from metisfl.proto.topics import ALL, HEADS, KINDS, NAME, Topic, parse_topic

__all__ = [
    "SUBSCRIPTIONS_MAX",
    "SUBSCRIPTION_BYTES_MAX",
    "Subscriptions",
    "is_limited",
    "may_ask_status",
    "may_publish",
    "may_read",
]

SUBSCRIPTIONS_MAX: Final = 16
SUBSCRIPTION_BYTES_MAX: Final = 255

_CONTROLLER_WRITES: Final = frozenset({"run", "task", "ledger", "beat"})
_LEARNER_WRITES: Final = frozenset({"done", "member", "beat"})
_LEARNERS_READ: Final = frozenset({"run", "ceremony"})
_READS_ALL: Final = frozenset({"controller", "driver"})
_KNOWN: Final = _READS_ALL | {"learner"}


def _role(principal: str) -> tuple[str, str]:
    role, _, name = principal.partition(":")
    return role, name


def may_publish(principal: str, topic: Topic) -> bool:
    """Tell whether `principal` may publish under `topic`, stored or transient."""
    role, name = _role(principal)
    if role == "controller":
        return topic.kind in _CONTROLLER_WRITES
    if role == "learner":
        if topic.kind == "ceremony":
            return bool(name) and topic.subject == ALL
        return topic.kind in _LEARNER_WRITES and topic.subject == name
    return role == "driver" and topic.kind == "run" and topic.subject == ALL


def may_read(principal: str, prefix: str) -> bool:
    """Tell whether `principal` may read everything whose topic starts with `prefix`.

    A prefix is a federation (`f/`), a kind in it (`f/done/`), a topic, or the heads (`hb/`).
    """
    role, name = _role(principal)
    if prefix.encode() == HEADS:
        return role in _KNOWN
    levels = prefix.split("/")
    if levels[-1] or not all(NAME.fullmatch(level) for level in levels[:-1]):
        return False
    if role in _READS_ALL:
        return len(levels) in (2, 4) or (len(levels) == 3 and levels[1] in KINDS)
    if role != "learner":
        return False
    try:
        topic = parse_topic(prefix)
    except ValueError:
        return False
    return topic.subject == name or (topic.kind in _LEARNERS_READ and topic.subject == ALL)


def may_ask_status(principal: str) -> bool:
    """Tell whether `principal` may ask how the broker is."""
    return _role(principal)[0] in _READS_ALL


def is_limited(principal: str) -> bool:
    """Tell whether what `principal` publishes is held to a rate; only the controller is not."""
    return _role(principal)[0] != "controller"


class Subscriptions:
    """Counts what each principal has subscribed to on the live socket.

    The transport does not say whose subscription ended with its connection, so the end of one frees
    that prefix for all: the count may be short for a while, never too long.
    """

    def __init__(self) -> None:
        self._of: dict[str, set[str]] = {}

    def subscribe(self, principal: str, prefix: bytes) -> str | None:
        """Return None if the subscription is to be accepted, else why it is not."""
        if len(prefix) > SUBSCRIPTION_BYTES_MAX:
            return f"subscription of {len(prefix)} bytes; at most {SUBSCRIPTION_BYTES_MAX}"
        try:
            text = prefix.decode("ascii")
        except UnicodeDecodeError:
            return f"subscription {prefix[:40]!r} is not ASCII"
        if not may_read(principal, text):
            return f"{principal} may not read {text!r}"
        held = self._of.setdefault(principal, set())
        if text not in held and len(held) >= SUBSCRIPTIONS_MAX:
            return f"{principal} has {len(held)} subscriptions; at most {SUBSCRIPTIONS_MAX}"
        held.add(text)
        return None

    def unsubscribe(self, prefix: bytes) -> None:
        """Somebody's subscription has ended."""
        text = prefix.decode("ascii", errors="replace")
        for held in self._of.values():
            held.discard(text)
