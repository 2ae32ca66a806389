"""The daemon `metisfl-controller`: its keys, files and sockets, opened in order and closed again.

Rule: nothing is opened before it is certain that no secret part of a key lies where the controller
could read it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from metisfl import __version__
from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.controller.bulk import BulkEndpoint
from metisfl.controller.encrypted_fold import context_of
from metisfl.controller.shell import Controller
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.deploy import logs, run
from metisfl.deploy.allocator import return_freed_memory
from metisfl.deploy.ckks_keys import load_public, refuse_secret_parts
from metisfl.deploy.database import open_database, sole_process
from metisfl.deploy.keys import load_identity, load_peers, load_servers
from metisfl.deploy.options import (
    BULK,
    INGRESS,
    LIVE,
    add_option,
    daemon_parser,
    name_of,
    size_or_none,
)
from metisfl.proto.errors import UserError

__all__ = ["main"]

MODELS_KEPT: Final = 3  # the current one, and those that a slow learner may still be fetching
SOFTWARE: Final = f"metisfl {__version__}"

_log = structlog.get_logger()


async def serve(options: argparse.Namespace, stop: run.StopSignal) -> None:
    """Run the controller until `stop`. Raises MetisError for whatever keeps it from its work."""
    return_freed_memory()
    home: Path = options.home
    identity = load_identity(home / "keys")
    if identity.principal != "controller":
        raise UserError(f"{home}/keys holds the key of {identity.principal}, not the controller's")
    servers = load_servers(home / "keys", "broker")
    refuse_secret_parts("the controller", [home, home / "keys", home / "spool", home / "models"])
    public = load_public(home / "keys")
    with sole_process(home, "controller"):
        store = ModelStore(home / "models", limit_bytes=options.models_limit)
        spool = Spool(
            home / "spool",
            context=context_of(public) if public else None,
            limit_bytes=options.spool_limit,
        )
        connection = open_database(home / "controller.db")
        outbox = Outbox(connection, "controller")
        loop = asyncio.get_running_loop()
        controllers: list[Controller] = []

        def on_stored(task_id: str, digest: bytes, update_bytes: int) -> None:
            loop.call_soon_threadsafe(controllers[0].on_stored, task_id, digest, update_bytes)

        client = BrokerClient(
            ingress=options.ingress,
            live=options.live,
            keys=ClientKeys(identity.public, identity.secret, servers["broker"]),
            principal="controller",
            outbox=outbox,
            software=SOFTWARE,
        )
        bulk = BulkEndpoint(
            endpoint=options.bulk,
            identity=identity,
            peers=load_peers(home / "keys"),
            store=store,
            spool=spool,
            on_stored=on_stored,
        )
        try:
            async with client:
                controller = Controller(
                    federation=options.federation,
                    home=home,
                    connection=connection,
                    outbox=outbox,
                    client=client,
                    bulk=bulk,
                    store=store,
                    spool=spool,
                    public=public,
                )
                controllers.append(controller)
                bulk.start()
                run.ready()
                _log.info("serving", bulk=bulk.endpoint)
                ends = [
                    asyncio.ensure_future(controller.follow()),
                    asyncio.ensure_future(controller.listen()),
                    asyncio.ensure_future(controller.tell(stop)),
                    asyncio.ensure_future(stop.wait()),
                    asyncio.shield(asyncio.wrap_future(bulk.finished)),
                    controller.failed,
                ]
                await run.first_end(ends)
        finally:
            bulk.close()
            connection.close()


def main(argv: Sequence[str] | None = None) -> int:
    """`metisfl-controller`."""
    parser = daemon_parser(
        "metisfl-controller",
        "Conduct the rounds of one federation: ask the learners, take their updates, make the next "
        "community model.",
    )
    add_option(parser, "federation", help="name of the federation", type=name_of("federation"))
    add_option(parser, "ingress", help="the broker's ingress endpoint", default=INGRESS)
    add_option(parser, "live", help="the broker's live endpoint", default=LIVE)
    add_option(parser, "bulk", help="endpoint to bind for model bytes", default=BULK)
    for folder, what in (("spool", "updates of the open round"), ("models", "community models")):
        add_option(
            parser,
            f"{folder}-limit",
            help=f"bytes that {folder}/, for {what}, may take, such as 20GiB (default: the disk's)",
            default="",
            type=size_or_none,
        )
    options = parser.parse_args(argv)

    async def begin(stop: run.StopSignal) -> None:
        logs.configure("metisfl-controller")
        structlog.contextvars.bind_contextvars(federation=options.federation)
        await serve(options, stop)

    return run.run("metisfl-controller", begin)


if __name__ == "__main__":
    sys.exit(main())
