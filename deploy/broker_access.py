"""How a driver's command reaches the broker of a federation: where it is, and by which keys.

Rule 1: a file that leaves the broker's port open says where to bind, not where to connect, and is
refused with the remedy.
Rule 2: keys are done without only where --insecure says so, whatever the home holds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from metisfl import __version__
from metisfl.broker.client import BrokerClient, Claim, ClientKeys, Credentials, Outbox
from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import load_identity
from metisfl.deploy.settings import Federation
from metisfl.proto.errors import UserError

__all__ = ["Access", "add_federation", "load_access"]

INSECURE_DRIVER: Final = "driver:insecure"


def add_federation(parser: argparse.ArgumentParser, *, home_required: bool = False) -> None:
    """Add `file`, the federation, and --home, who asks."""
    parser.add_argument("file", type=Path, metavar="FEDERATION.toml")
    parser.add_argument(
        "--home",
        type=Path,
        required=home_required,
        metavar="DIR",
        help="a driver's folder; keys/ holds its identity.key and servers",
    )


@dataclass(frozen=True, slots=True)
class Access:
    """The broker's endpoints, and who we are there, by which keys."""

    ingress: str
    live: str
    principal: str
    keys: Credentials

    def client(self, outbox: Outbox) -> BrokerClient:
        """A client that publishes from `outbox`, not yet open."""
        return BrokerClient(
            ingress=self.ingress,
            live=self.live,
            keys=self.keys,
            principal=self.principal,
            outbox=outbox,
            software=f"metisfl {__version__}",
        )


def load_access(federation: Federation, home: Path | None, *, insecure: bool) -> Access:
    """Take the endpoints from the federation and the keys from `home`/keys. Raises UserError.

    `insecure` needs no home: there are no keys, and nobody checks the name.
    """
    for key, endpoint in (("ingress", federation.ingress), ("live", federation.live)):
        if endpoint.endswith(":0"):
            raise UserError(f"broker.{key}: say where the broker is, such as tcp://host:5570")
    if insecure:
        claim = Claim(INSECURE_DRIVER)
        return Access(federation.ingress, federation.live, claim.principal, claim)
    if home is None:
        raise UserError("--home DIR is missing: the driver's folder, whose keys/ says who asks")
    identity = load_identity(home / "keys")
    broker = load_servers(home / "keys", "broker")["broker"]
    keys = ClientKeys(identity.public, identity.secret, broker)
    return Access(federation.ingress, federation.live, identity.principal, keys)
