"""Who may connect to a server: the file `peers` of its `keys` folder, read again when it changes.

Rule: the file is the truth. `metisfl admit` and `expel` edit it, and so may people; a server
follows within a second. A list that cannot be read leaves the old one in force, in words.

    learner:north  {ZFV^Zq...            may take part in every federation of this server
    learner:south  8Yx+!Ru... lungs,hearts   in these only
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import structlog

from metisfl.deploy.key_lists import Entry, add_line, load_list, remove_lines
from metisfl.proto.errors import UserError
from metisfl.proto.topics import check_name

__all__ = [
    "PEERS_FILE",
    "Change",
    "Peer",
    "Registry",
    "Watch",
    "admit",
    "expel",
    "load_registry",
    "parse_registry",
    "registry_text",
]

PEERS_FILE: Final = "peers"
PEERS_TEXT: Final = """\
# Who may connect to this server: one `principal publickey` to a line, and behind it the federations
# (a,b) of who may not be in all. Keys not listed are refused.
"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Peer:
    """A principal, its public key in Z85, and its federations; none named means all."""

    principal: str
    public: bytes
    federations: frozenset[str] = frozenset()

    def may_be_in(self, federation: str) -> bool:
        return not self.federations or federation in self.federations


@dataclass(frozen=True, slots=True)
class Change:
    """What one list has and another has not. Who got another key was expelled and admitted."""

    admitted: tuple[Peer, ...] = ()
    expelled: tuple[Peer, ...] = ()


@dataclass(frozen=True, slots=True)
class Registry:
    """A list of peers, by principal."""

    peers: Mapping[str, Peer] = MappingProxyType({})

    @property
    def keys(self) -> dict[bytes, str]:
        """Public key -> principal."""
        return {peer.public: peer.principal for peer in self.peers.values()}

    def of(self, federation: str) -> Registry:
        """Those of them that may be in `federation`, as if there were no other."""
        here = (peer for peer in self.peers.values() if peer.may_be_in(federation))
        return _registry(replace(peer, federations=frozenset({federation})) for peer in here)

    def since(self, before: Registry) -> Change:
        """What has changed since `before`."""
        return Change(
            tuple(p for name, p in self.peers.items() if before.peers.get(name) != p),
            tuple(p for name, p in before.peers.items() if self.peers.get(name) != p),
        )


class Watch:
    """The list of one server, as it is now."""

    def __init__(self, folder: Path) -> None:
        """Read it. Raises UserError if it cannot be read."""
        self._folder = folder
        self._seen = self._version()
        self.registry = load_registry(folder)

    def changed(self) -> bool:
        """Look; True if `registry` is a new list."""
        if (version := self._version()) == self._seen:
            return False
        self._seen = version
        try:
            self.registry = load_registry(self._folder)
        except UserError as error:
            log.error("the list of peers stays as it was", reason=str(error))
            return False
        return True

    def _version(self) -> tuple[int, int, int]:
        try:
            status = (self._folder / PEERS_FILE).stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_mtime_ns, status.st_size)


def load_registry(folder: Path) -> Registry:
    """Read `folder`/peers. Raises UserError."""
    return parse_registry(folder / PEERS_FILE)


def registry_text(registry: Registry) -> str:
    """The text of a file that `parse_registry` reads."""
    return "".join(
        " ".join([peer.principal, peer.public.decode(), *_words(peer)]) + "\n"
        for peer in registry.peers.values()
    )


def parse_registry(path: Path) -> Registry:
    """Read a list of peers. Raises UserError."""
    return _registry(_peer(path, entry) for entry in _entries(path))


def admit(folder: Path, peer: Peer) -> bool:
    """Add a line to `folder`/peers. False if it is there already; a conflict raises UserError."""
    return add_line(folder / PEERS_FILE, PEERS_TEXT, peer.principal, peer.public, _words(peer))


def expel(folder: Path, principal: str) -> Peer:
    """Take the line of `principal` out of `folder`/peers. Raises UserError if there is none."""
    path = folder / PEERS_FILE
    for entry in _entries(path):
        if entry.principal == principal:
            remove_lines(path, [entry.line])
            return _peer(path, entry)
    raise UserError(f"{path} does not list {principal}")


def _registry(peers: Iterable[Peer]) -> Registry:
    return Registry(MappingProxyType({peer.principal: peer for peer in peers}))


def _words(peer: Peer) -> list[str]:
    return [",".join(sorted(peer.federations))] if peer.federations else []


def _entries(path: Path) -> list[Entry]:
    remedy = "`metisfl admit` makes it, with a line for each site that may connect"
    return load_list(path, remedy, more_words=1)


def _peer(path: Path, entry: Entry) -> Peer:
    names = [name for word in entry.rest for name in word.split(",")]
    try:
        federations = frozenset(check_name(name, "federation") for name in names)
    except UserError as error:
        raise UserError(f"{path}:{entry.line}: {error}") from None
    return Peer(entry.principal, entry.public, federations)
