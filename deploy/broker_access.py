"""How a driver's command reaches the broker of a federation: where it is, and by which keys.

Rule: a file that leaves the broker's port open says where to bind, not where to connect, and is
refused with the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metisfl import __version__
from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.deploy.keys import Identity, load_identity, load_servers
from metisfl.deploy.settings import Federation
from metisfl.proto.errors import UserError

__all__ = ["Access", "load_access"]


@dataclass(frozen=True, slots=True)
class Access:
    """The broker's endpoints and public key, and who we are there."""

    ingress: str
    live: str
    identity: Identity
    broker_public: bytes

    def client(self, outbox: Outbox) -> BrokerClient:
        """A client that publishes from `outbox`, not yet open."""
        return BrokerClient(
            ingress=self.ingress,
            live=self.live,
            keys=ClientKeys(self.identity.public, self.identity.secret, self.broker_public),
            principal=self.identity.principal,
            outbox=outbox,
            software=f"metisfl {__version__}",
        )


def load_access(federation: Federation, home: Path) -> Access:
    """Take the endpoints from the federation and the keys from `home`/keys. Raises UserError."""
    for key, endpoint in (("ingress", federation.ingress), ("live", federation.live)):
        if endpoint.endswith(":0"):
            raise UserError(f"broker.{key}: say where the broker is, such as tcp://host:5570")
    identity = load_identity(home / "keys")
    servers = load_servers(home / "keys", "broker")
    return Access(federation.ingress, federation.live, identity, servers["broker"])
