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
from metisfl.broker.client import BrokerClient, Claim, ClientKeys, Credentials, Outbox
from metisfl.controller.bulk import BulkEndpoint
from metisfl.controller.encrypted_fold import contexts_of
from metisfl.controller.gate import keep_gate
from metisfl.controller.shell import Controller
from metisfl.controller.spool import Spool
from metisfl.controller.store import ModelStore
from metisfl.deploy import logs, run
from metisfl.deploy.allocator import return_freed_memory
from metisfl.deploy.audit import AUDIT_FILE, Audit
from metisfl.deploy.ckks_keys import load_public, refuse_secret_parts
from metisfl.deploy.curve import Insecure
from metisfl.deploy.database import open_database, sole_process
from metisfl.deploy.insecure import add_insecure, shout_until
from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import Identity, load_identity
from metisfl.deploy.memory_guard import MEMORY_LIMIT_BYTES
from metisfl.deploy.options import (
    BULK,
    INGRESS,
    LIVE,
    add_option,
    daemon_parser,
    name_of,
    size,
    size_or_none,
)
from metisfl.deploy.registry import Watch
from metisfl.proto.bulk import Code
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import UserError

__all__ = ["main"]

MODELS_KEPT: Final = 3  # the current one, and those that a slow learner may still be fetching
SOFTWARE: Final = f"metisfl {__version__}"
TRESPASSES: Final = frozenset({Code.NOT_YOURS, Code.BAD_FRAME, Code.OTHER_FEDERATION})
"""What an honest learner does not do; all else is refused for what it is, not for who asks."""

_log = structlog.get_logger()


async def serve(options: argparse.Namespace, stop: run.StopSignal) -> None:
    """Run the controller until `stop`. Raises MetisError for whatever keeps it from its work."""
    return_freed_memory()
    home: Path = options.home
    watch: Watch | None = None
    identity: Identity | Insecure = Insecure()
    to_broker: Credentials = Claim("controller")
    if not options.insecure:
        identity, to_broker = _keys(home / "keys")
        watch = Watch(home / "keys")
    refuse_secret_parts("the controller", [home, home / "keys", home / "spool", home / "models"])
    public = load_public(home / "keys")
    with sole_process(home, "controller"):
        store = ModelStore(home / "models", limit_bytes=options.models_limit)
        spool = Spool(
            home / "spool",
            contexts=contexts_of(public),
            limit_bytes=options.spool_limit,
        )
        audit = Audit(home / AUDIT_FILE)
        connection = open_database(home / "controller.db")
        outbox = Outbox(connection, "controller")
        loop = asyncio.get_running_loop()
        controllers: list[Controller] = []

        def on_stored(task_id: str, digest: bytes, update_bytes: int) -> None:
            loop.call_soon_threadsafe(controllers[0].on_stored, task_id, digest, update_bytes)

        def on_denied(code: Code, principal: str, reason: str) -> None:
            if code in TRESPASSES:
                audit.refused(f"transfer refused: {code.name}", principal, why=reason)

        def on_stranger(what: str, who: str, why: str) -> None:
            audit.refused(what, who, why=why)

        client = BrokerClient(
            ingress=options.ingress,
            live=options.live,
            keys=to_broker,
            principal="controller",
            outbox=outbox,
            software=SOFTWARE,
        )
        bulk = BulkEndpoint(
            endpoint=options.bulk,
            identity=identity,
            peers={} if watch is None else watch.registry.of(options.federation).keys,
            store=store,
            spool=spool,
            on_stored=on_stored,
            on_denied=on_denied,
            on_stranger=on_stranger,
            memory_limit_bytes=options.memory_limit,
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
                    audit=audit,
                )
                controllers.append(controller)
                _record_start(audit, options.federation, identity, public)
                bulk.start()
                run.ready()
                _log.info("serving", bulk=bulk.endpoint)
                ends = [
                    asyncio.ensure_future(controller.follow()),
                    asyncio.ensure_future(controller.listen()),
                    asyncio.ensure_future(controller.tell(stop)),
                    asyncio.ensure_future(
                        shout_until(stop)
                        if watch is None
                        else keep_gate(watch, options.federation, bulk, audit, stop)
                    ),
                    asyncio.ensure_future(stop.wait()),
                    asyncio.shield(asyncio.wrap_future(bulk.finished)),
                    controller.failed,
                ]
                await run.first_end(ends)
        finally:
            bulk.close()
            audit.close()
            connection.close()


def _record_start(
    audit: Audit, federation: str, identity: Identity | Insecure, public: PublicPart | None
) -> None:
    what, ours = "started insecure", {}
    if isinstance(identity, Identity):
        what, ours = "started", {"public": identity.public.decode()}
    theirs = {} if public is None else {"key": public.fingerprint.hex()}
    audit.record(what, software=SOFTWARE, federation=federation, **ours, **theirs)


def _keys(folder: Path) -> tuple[Identity, ClientKeys]:
    """Our own, and ours towards the broker. Raises UserError."""
    identity = load_identity(folder)
    if identity.principal != "controller":
        raise UserError(f"{folder} holds the key of {identity.principal}, not the controller's")
    broker = load_servers(folder, "broker")["broker"]
    return identity, ClientKeys(identity.public, identity.secret, broker)


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
    add_option(
        parser,
        "memory-limit",
        help="memory beyond which all connections for model bytes are cut and begin anew",
        default=f"{MEMORY_LIMIT_BYTES // 1024**2}MiB",
        type=size,
    )
    add_insecure(parser)
    options = parser.parse_args(argv)

    async def begin(stop: run.StopSignal) -> None:
        logs.configure("metisfl-controller")
        structlog.contextvars.bind_contextvars(federation=options.federation)
        await serve(options, stop)

    return run.run("metisfl-controller", begin)


if __name__ == "__main__":
    sys.exit(main())
