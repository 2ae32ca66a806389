"""The manifest of a ceremony as a file, and `metisfl keys ceremony new`, which writes one.

Rule: a manifest is written once, by one site or the operator, and is the same everywhere. To change
anything about it is to make another one, which begins another ceremony.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from metisfl.deploy.key_lists import load_list
from metisfl.deploy.keys import write_new
from metisfl.deploy.options import name_of
from metisfl.deploy.sealing import recipient
from metisfl.deploy.settings import Federation, load_federation
from metisfl.learner.key_terms import add_terms, default_terms
from metisfl.proto.ceremony import Manifest
from metisfl.proto.errors import MachineError, UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["load_manifest", "new"]

FILE_BYTES_MAX: Final = 1 << 18
DOTS_MAX: Final = 100
"""In a line; a key has up to 40, and a parser is slow with keys of many parts."""
DEFAULTS: Final = default_terms(verify="full")
TERMS: Final = ("error", "min_contributors", "max_share", "verify")


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises UserError that names the file, the key and what is allowed."""
    try:
        return Manifest.of(tomllib.loads(_content(path).decode()))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no TOML: {str(error)[:200]}; take the file as written") from None


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if len(content) > FILE_BYTES_MAX:
        raise UserError(f"more than {FILE_BYTES_MAX} bytes; this is no manifest")
    for at, line in enumerate(content.split(b"\n"), start=1):
        if (dots := line.count(b".")) > DOTS_MAX:
            raise UserError(f"line {at} has {dots} dots; at most {DOTS_MAX}")
    return content


def new(argv: Sequence[str]) -> int:
    """`metisfl keys ceremony new`. Raises UserError, MachineError."""
    options = _parser().parse_args(argv)
    federation = None if options.federation is None else load_federation(options.federation)
    name = options.name or (federation and federation.name)
    if not name:
        raise UserError("which federation? Give --name NAME, or --federation FILE.toml")
    asked = {key: getattr(options, key) for key in TERMS}
    terms = {
        key: _term(federation, key) if value is None else value for key, value in asked.items()
    }
    manifest = Manifest.of(
        {
            "federation": name,
            "number": os.urandom(16).hex(),
            "sites": _sites(options, federation),
            **terms,
        }
    )
    try:
        write_new(options.file, manifest.text().encode())
        options.file.chmod(0o644)
    except FileExistsError:
        raise UserError(f"{options.file} exists; a new ceremony has a new file") from None
    except OSError as error:
        raise MachineError(f"{options.file}: cannot be written: {error.strerror}") from None
    print(f"wrote {options.file}, for {len(manifest.names)} sites: {', '.join(manifest.names)}")
    print(f"fingerprint: {manifest.told}")
    print(
        "next: give this file to every site, where `metisfl keys ceremony FILE --folder KEYS` "
        "shows the same fingerprint",
        file=sys.stderr,
    )
    return 0


def _term(federation: Federation | None, key: str) -> Any:
    return getattr(DEFAULTS if federation is None else federation.encryption, key)


def _sites(options: argparse.Namespace, federation: Federation | None) -> dict[str, str]:
    """Name and key of each site that was given. Raises UserError."""
    given = [recipient(text) for text in options.site]
    if options.peers is not None:
        given += [
            (entry.principal.removeprefix("learner:"), entry.public)
            for entry in load_list(options.peers, "give the file `peers` of a server", more_words=1)
            if entry.principal.startswith("learner:")
        ]
    sites: dict[str, str] = {}
    for name, key in given:
        if not name:
            raise UserError(f"whose key is {key.decode()}? Give --site 'learner:NAME KEY'")
        if sites.setdefault(name, key.decode()) != key.decode():
            raise UserError(f"{name} is given with two keys: {sites[name]} and {key.decode()}")
    if federation is None:
        return sites
    listed = [learner.name for learner in federation.learners]
    if missing := [name for name in listed if name not in sites]:
        raise UserError(
            f"{options.federation} lists {', '.join(missing)}, whose key was not given; give "
            "--site 'learner:NAME KEY' for each, or --peers FILE"
        )
    return {name: sites[name] for name in listed}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metisfl keys ceremony new",
        description="Write a manifest: which sites make a joint key, and on which terms.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--name", type=name_of("federation"), help="name of the federation")
    parser.add_argument(
        "--federation",
        type=Path,
        metavar="FILE.toml",
        help="take the name, the sites and the table [encryption] from this federation file",
    )
    parser.add_argument(
        "--site",
        action="append",
        default=[],
        metavar="'learner:NAME KEY'",
        help="the line that `metisfl keys show` prints at a site; once for each",
    )
    parser.add_argument(
        "--peers", type=Path, metavar="FILE", help="take the lines of all learners from this list"
    )
    add_terms(parser, DEFAULTS)
    return parser
