"""The learner daemon: settings, keys, sockets, and the parts that run until it is asked to end."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.deploy import logs, run
from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE, load_public, load_secret
from metisfl.deploy.database import open_database, sole_process
from metisfl.deploy.keys import load_identity, load_servers
from metisfl.deploy.options import BULK, INGRESS, LIVE, add_option, daemon_parser, name_of
from metisfl.learner.home import Home
from metisfl.learner.shell import SOFTWARE, Learner
from metisfl.learner.transfer import BulkClient
from metisfl.learner.worker import Worker
from metisfl.proto import topics
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import UserError

__all__ = ["main"]

_log = structlog.get_logger()


async def serve(options: argparse.Namespace, stop: run.StopSignal) -> None:
    """Run the learner until `stop`. Raises MetisError for whatever keeps it from its work."""
    home: Path = options.home
    identity = load_identity(home / "keys")
    principal = f"learner:{options.name}"
    if identity.principal != principal:
        raise UserError(f"{home}/keys holds the key of {identity.principal}, not of {principal}")
    servers = load_servers(home / "keys", "broker", "controller")
    public = _key_of_site(home / "keys")
    with sole_process(home, "learner"):
        connection = open_database(home / "learner.db")
        outbox = Outbox(connection, principal)
        worker = Worker(
            app=options.app,
            path=options.path,
            source=options.data or options.name,
            keys=None if public is None else home / "keys",
        )
        bulk = BulkClient(
            options.bulk,
            ClientKeys(identity.public, identity.secret, servers["controller"]),
            federation=options.federation,
            encrypted_only=public is not None,
        )
        client = BrokerClient(
            ingress=options.ingress,
            live=options.live,
            keys=ClientKeys(identity.public, identity.secret, servers["broker"]),
            principal=principal,
            outbox=outbox,
            software=SOFTWARE,
        )
        try:
            async with client, bulk:
                learner = Learner(
                    name=options.name,
                    federation=options.federation,
                    home=Home(home),
                    connection=connection,
                    outbox=outbox,
                    client=client,
                    bulk=bulk,
                    worker=worker,
                    public=public,
                )
                run.ready()
                try:
                    await _until_stopped(learner, options, stop)
                finally:
                    await learner.end()
        finally:
            await worker.close()
            connection.close()


def _key_of_site(folder: Path) -> PublicPart | None:
    """The public part of the site's key, once both parts are there; None at a plain site.

    Raises UserError. The secret part is for the training process; it is not kept here.
    """
    public = load_public(folder)
    if public is not None:
        load_secret(folder)
    elif (folder / SECRET_FILE).exists():
        raise UserError(
            f"{folder / SECRET_FILE} is there and {folder / PUBLIC_FILE} is not; copy it from the "
            "site that made the key, or take the secret part away for a plain federation"
        )
    return public


async def _until_stopped(
    learner: Learner, options: argparse.Namespace, stop: run.StopSignal
) -> None:
    async def take_part() -> None:
        await learner.begin()
        _log.info("joined")
        await asyncio.gather(
            learner.follow(topics.run_topic(options.federation)),
            learner.follow(topics.task_topic(options.federation, options.name)),
        )

    await run.first_end(
        [
            asyncio.ensure_future(take_part()),
            asyncio.ensure_future(learner.beat(stop)),
            asyncio.ensure_future(stop.wait()),
            learner.failed,
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = daemon_parser(
        "metisfl-learner",
        "Train and evaluate on this site's data when the federation asks; only updates and metrics "
        "leave the site.",
    )
    add_option(parser, "federation", help="name of the federation", type=name_of("federation"))
    add_option(parser, "name", help="name of this learner", type=name_of("learner"))
    add_option(parser, "app", help="the application, package.module:object")
    add_option(parser, "path", help="folder to import the application from", default=".", type=Path)
    add_option(
        parser,
        "data",
        help="what the application's data() is called with (default: the learner's name)",
        default="",
    )
    add_option(parser, "ingress", help="the broker's ingress endpoint", default=INGRESS)
    add_option(parser, "live", help="the broker's live endpoint", default=LIVE)
    add_option(parser, "bulk", help="the controller's bulk endpoint", default=BULK)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """`metisfl-learner`."""
    options = _parser().parse_args(argv)

    async def begin(stop: run.StopSignal) -> None:
        logs.configure("metisfl-learner")
        structlog.contextvars.bind_contextvars(federation=options.federation, learner=options.name)
        await serve(options, stop)

    return run.run("metisfl-learner", begin)


if __name__ == "__main__":
    sys.exit(main())
