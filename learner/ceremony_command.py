"""Make a joint key together with the other sites, each at home.

Rule: it may be broken off and run again at any moment; it goes on where it was. It uses the home of
the learner, and takes turns with its daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from metisfl import __version__
from metisfl.broker.client import BrokerClient, ClientKeys, Outbox
from metisfl.deploy import logs
from metisfl.deploy.ckks_keys import PUBLIC_FILE
from metisfl.deploy.database import open_database, sole_process
from metisfl.deploy.key_lists import load_servers
from metisfl.deploy.keys import Identity, load_identity
from metisfl.deploy.options import INGRESS, LIVE, add_option, whole_number
from metisfl.deploy.run import Interrupted, StopSignal, first_end, run
from metisfl.learner.ceremony_file import load_manifest, new
from metisfl.learner.ceremony_install import made_before
from metisfl.learner.ceremony_kept import STATE_FILE
from metisfl.learner.ceremony_shell import Ceremony
from metisfl.learner.openfhe_door import load_openfhe
from metisfl.proto.ceremony import Manifest
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import DiskFull, MachineError, UserError

__all__ = ["command"]

TELL_S: Final = 1.0
WAIT_S_MAX: Final = 30 * 24 * 3600


def command(argv: list[str]) -> int:
    """`metisfl keys ceremony FILE`, or `... new FILE`."""
    if argv[:1] == ["new"]:
        return new(argv[1:])
    options = _parser().parse_args(argv)
    manifest = load_manifest(options.file)
    identity = load_identity(options.folder)
    _check_named(options.file, manifest, identity)
    say = partial(print, flush=True, file=sys.stderr if options.json else sys.stdout)
    say(f"fingerprint of the manifest: {manifest.told}")
    say("Compare all of it with the other sites by telephone: they must have the same file.")
    found: list[PublicPart] = []

    async def make(stop: StopSignal) -> None:
        logs.configure("metisfl", level="warning")
        made = asyncio.ensure_future(_make(options, manifest, identity, say))
        await first_end([made, asyncio.ensure_future(stop.wait())])
        if made.cancelled():
            raise Interrupted("interrupted; the same command goes on")
        found.append(made.result())

    known = (
        None if (options.folder / STATE_FILE).exists() else made_before(options.folder, manifest)
    )
    if known is not None:
        say("This ceremony was finished before.")
        found.append(known)
    elif code := run("metisfl", make):
        return code
    _tell(options, manifest, found[0], say)
    return 0


def _check_named(path: Path, manifest: Manifest, identity: Identity) -> None:
    """Raise UserError unless the manifest has this site by its key."""
    role, _, name = identity.principal.partition(":")
    if role != "learner":
        raise UserError(
            f"this is the keys folder of {identity.principal}; only learners have shares of a key"
        )
    if name not in manifest.keys:
        raise UserError(
            f"{path} does not name {name}, which this is; it names {', '.join(manifest.names[:10])}"
        )
    if manifest.keys[name] != identity.public:
        raise UserError(
            f"{path} has another key for {name}: {manifest.keys[name].decode()}; this site's line "
            f"is: {identity.public_line}"
        )


async def _make(
    options: argparse.Namespace, manifest: Manifest, identity: Identity, say: partial[None]
) -> PublicPart:
    folder: Path = options.folder
    home = folder.absolute().parent
    broker = load_servers(folder, "broker")["broker"]
    await asyncio.to_thread(load_openfhe)  # if it is missing, nothing has been said yet
    with _alone_at(home), closing(open_database(home / "learner.db")) as connection:
        outbox = Outbox(connection, identity.principal)
        client = BrokerClient(
            ingress=options.ingress,
            live=options.live,
            keys=ClientKeys(identity.public, identity.secret, broker),
            principal=identity.principal,
            outbox=outbox,
            software=f"metisfl {__version__}",
        )
        async with client:
            ceremony = Ceremony(
                manifest=manifest,
                identity=identity,
                folder=folder,
                connection=connection,
                outbox=outbox,
                client=client,
            )
            made = asyncio.ensure_future(ceremony.until_made())
            parts = [made, asyncio.ensure_future(_tell_progress(ceremony, say))]
            try:
                await asyncio.wait_for(first_end(parts), options.wait_s)
            except asyncio.TimeoutError:
                raise MachineError(
                    f"no key within {options.wait_s} s: this site waits {ceremony.waits_for}; the "
                    "same command goes on"
                ) from None
            return made.result()


@contextmanager
def _alone_at(home: Path) -> Iterator[None]:
    """Hold the learner's home. Raises MachineError that says what to do while its daemon runs."""
    holding = sole_process(home, "learner")
    try:
        holding.__enter__()
    except DiskFull:
        raise
    except MachineError as error:
        raise MachineError(
            f"{error}. The ceremony takes turns with the learner's daemon, which must be stopped "
            "meanwhile"
        ) from None
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


async def _tell_progress(ceremony: Ceremony, say: partial[None]) -> None:
    told = ""
    while True:
        await asyncio.sleep(TELL_S)
        if (now := ceremony.waits_for) != told:
            say(f"waiting {now}")
            told = now


def _tell(
    options: argparse.Namespace, manifest: Manifest, public: PublicPart, say: partial[None]
) -> None:
    if options.json:
        facts = {
            "manifest": manifest.told,
            "fingerprint": public.fingerprint.hex(),
            "sites": list(public.sites),
        }
        print(json.dumps(facts))
        return
    folder: Path = options.folder
    say(f"The key is made; its fingerprint, the same at all sites: {public.fingerprint.hex()}")
    say(
        f"Next: give {folder / PUBLIC_FILE} to the controller and the drivers, into their keys "
        "folders, and start the learner."
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metisfl keys ceremony",
        description="Make a joint key together with the other sites that FILE names: each gets its "
        "share, and only all of them together open a model. Run it at every site, in any order; "
        "`metisfl keys ceremony new` writes FILE.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        metavar="KEYS",
        help="the folder keys/ in the home of this site's learner",
    )
    add_option(parser, "ingress", help="the broker's ingress endpoint", default=INGRESS)
    add_option(parser, "live", help="the broker's live endpoint", default=LIVE)
    parser.add_argument(
        "--wait-s",
        type=whole_number(1, WAIT_S_MAX),
        metavar="SECONDS",
        help="give up after so long (default: wait until all sites have done their part)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout at the end"
    )
    return parser
