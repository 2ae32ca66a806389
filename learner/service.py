"""The learner daemon: settings, keys, sockets, and the parts that run until it is asked to end."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from metisfl.broker.client import BrokerClient, Claim, ClientKeys, Credentials, Outbox, Record
from metisfl.deploy import logs, run
from metisfl.deploy.audit import AUDIT_FILE, Audit
from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE, load_public, load_secret
from metisfl.deploy.database import open_database, sole_process
from metisfl.deploy.insecure import add_insecure, shout_until
from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import load_identity
from metisfl.deploy.options import BULK, INGRESS, LIVE, add_option, daemon_parser, name_of
from metisfl.learner.home import Home
from metisfl.learner.shell import SOFTWARE, Learner
from metisfl.learner.transfer import BulkClient
from metisfl.learner.worker import Worker
from metisfl.proto import events_pb2 as pb
from metisfl.proto import topics
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import PeerError, UserError
from metisfl.proto.events import decode

__all__ = ["main"]

_log = structlog.get_logger()


async def serve(options: argparse.Namespace, stop: run.StopSignal) -> None:
    """Run the learner until `stop`. Raises MetisError for whatever keeps it from its work."""
    home: Path = options.home
    principal = f"learner:{options.name}"
    if options.insecure:
        to_broker: Credentials = Claim(principal)
        to_controller: Credentials = Claim(principal)
    else:
        to_broker, to_controller = _keys_of_site(home / "keys", principal)
    public = _key_of_site(home / "keys")
    with sole_process(home, "learner"):
        connection = open_database(home / "learner.db")
        outbox = Outbox(connection, principal)
        audit = Audit(home / AUDIT_FILE)
        worker = Worker(
            app=options.app,
            path=options.path,
            source=options.data or options.name,
            keys=None if public is None else home / "keys",
        )
        bulk = BulkClient(
            options.bulk,
            to_controller,
            federation=options.federation,
            encrypted_only=public is not None,
        )
        client = BrokerClient(
            ingress=options.ingress,
            live=options.live,
            keys=to_broker,
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
                    on_record=partial(_record_end, audit),
                )
                _record_start(audit, options.federation, to_broker, to_controller, public)
                run.ready()
                try:
                    await _until_stopped(learner, options, stop)
                finally:
                    await learner.end()
        finally:
            await worker.close()
            audit.close()
            connection.close()


def _record_start(
    audit: Audit,
    federation: str,
    to_broker: Credentials,
    to_controller: Credentials,
    public: PublicPart | None,
) -> None:
    """Keep whom this site takes for its servers, and which key its updates are encrypted with."""
    keys = {} if public is None else {"key": public.fingerprint.hex()}
    if isinstance(to_broker, ClientKeys) and isinstance(to_controller, ClientKeys):
        what = "started"
        keys["public"] = to_broker.public.decode()
        keys["broker"] = to_broker.server.decode()
        keys["controller"] = to_controller.server.decode()
    else:
        what = "started insecure"
    audit.record(what, software=SOFTWARE, federation=federation, **keys)


def _record_end(audit: Audit, record: Record) -> None:
    """Keep the digest that holds a run's round records, once; a run without records has none."""
    if record.type != "RunFinished" or record.publisher != "controller":
        return
    with suppress(PeerError):  # whoever applies it says so
        finished = decode(record.type, record.payload)
        if isinstance(finished, pb.RunFinished) and finished.record:
            audit.record_once(
                "run finished",
                run=finished.run_id,
                outcome=pb.RunFinished.Outcome.Name(finished.outcome),
                record=finished.record.hex(),
                event=record.sequence,
            )


def _keys_of_site(folder: Path, principal: str) -> tuple[ClientKeys, ClientKeys]:
    """The site's keys towards broker and controller. Raises UserError."""
    identity = load_identity(folder)
    if identity.principal != principal:
        raise UserError(f"{folder} holds the key of {identity.principal}, not of {principal}")
    servers = load_servers(folder, "broker", "controller")
    broker, controller = (
        ClientKeys(identity.public, identity.secret, servers[name])
        for name in ("broker", "controller")
    )
    return broker, controller


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
            asyncio.ensure_future(shout_until(stop) if options.insecure else stop.wait()),
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
    add_insecure(parser)
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
