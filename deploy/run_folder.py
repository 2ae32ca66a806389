"""A federation on one machine: its run folder, with a home and keys for every process.

Rule: every process gets a key pair of its own and knows only whom it must: the servers know their
peers, the others know the servers. It is the layout that sites on different machines have too.
An insecure federation has the folders and no keys.

    <run folder>/broker  controller  driver  learners/<name>    one home each, with keys/
    <run folder>/logs                                           one file a process
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metisfl.broker.client import Claim, ClientKeys, Credentials
from metisfl.deploy.key_lists import add_server
from metisfl.deploy.keys import create_identity
from metisfl.deploy.registry import Peer, admit
from metisfl.proto.errors import MachineError, UserError

__all__ = ["DRIVER", "RunFolder", "create_run_folder"]

DRIVER = "driver:local"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything of a run is. `driver_keys` are the driver's towards the broker."""

    folder: Path
    broker: Path
    controller: Path
    driver: Path
    learners: Mapping[str, Path]
    logs: Path
    driver_keys: Credentials


def create_run_folder(folder: Path, learners: list[str], *, insecure: bool = False) -> RunFolder:
    """Make the folders and keys of a run. Raises UserError if `folder` has content already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; a run needs a folder of its own")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; a run needs a folder of its own")
    homes = {name: folder / "learners" / name for name in learners}
    servers = {"broker": folder / "broker", "controller": folder / "controller"}
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / "logs").mkdir()
    except OSError as error:
        raise MachineError(f"{folder}: {error.strerror}") from None
    clients = {f"learner:{name}": home for name, home in homes.items()}
    clients[DRIVER] = folder / "driver"
    return RunFolder(
        folder=folder,
        broker=servers["broker"],
        controller=servers["controller"],
        driver=clients[DRIVER],
        learners=homes,
        logs=folder / "logs",
        driver_keys=_no_keys(servers, clients) if insecure else _make_keys(servers, clients),
    )


def _no_keys(servers: Mapping[str, Path], clients: Mapping[str, Path]) -> Claim:
    try:
        for home in (*servers.values(), *clients.values()):
            (home / "keys").mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise MachineError(f"{error.filename}: {error.strerror}") from None
    return Claim(DRIVER)


def _make_keys(servers: Mapping[str, Path], clients: Mapping[str, Path]) -> ClientKeys:
    """Give each home its key pair and the lists of whom it knows; return the driver's keys."""
    identities = {
        principal: create_identity(home / "keys", principal)
        for principal, home in {**servers, **clients}.items()
    }
    for principal, identity in identities.items():
        if principal != "broker":
            admit(servers["broker"] / "keys", Peer(principal, identity.public))
        if principal in clients:
            admit(servers["controller"] / "keys", Peer(principal, identity.public))
    for principal in ("broker", "controller"):
        for home in (*clients.values(), servers["controller"]):
            if home != servers[principal]:
                add_server(home / "keys", principal, identities[principal].public)
    driver = identities[DRIVER]
    return ClientKeys(driver.public, driver.secret, identities["broker"].public)
