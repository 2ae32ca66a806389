"""Seal the secret part of a key for encrypted updates to another site."""

from __future__ import annotations

import argparse
from pathlib import Path

from metisfl.deploy.ckks_keys import load_secret
from metisfl.deploy.keys import write_new
from metisfl.deploy.sealing import recipient, seal_to
from metisfl.proto.errors import MachineError, UserError

__all__ = ["command"]


def command(argv: list[str]) -> int:
    """`metisfl keys seal`. Raises UserError, MachineError."""
    parser = argparse.ArgumentParser(
        prog="metisfl keys seal",
        description="Write a copy of DIR/secret.ckks that one other site alone can open, with "
        "`metisfl keys open`. It may travel by any way.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a keys folder with secret.ckks")
    parser.add_argument(
        "--to",
        required=True,
        metavar="PUBLICKEY",
        help="what `metisfl keys show` prints at the other site, in quotes",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: DIR/NAME.sealed, with the NAME of learner:NAME; secret.sealed without one",
    )
    options = parser.parse_args(_joined(argv))
    site, key = recipient(options.to)
    out: Path = options.out or options.folder / f"{site or 'secret'}.sealed"
    sealed = seal_to(key, load_secret(options.folder))
    try:
        write_new(out, sealed)
    except FileExistsError:
        raise UserError(f"{out} exists; give another --out, or delete it first") from None
    except OSError as error:
        raise MachineError(f"{out}: cannot be written: {error.strerror}") from None
    print(f"wrote {out}; at the other site: metisfl keys open {out.name} --folder KEYS")
    return 0


def _joined(argv: list[str]) -> list[str]:
    """`--to KEY` as `--to=KEY`: one key in 85 begins with a dash, as an option does."""
    if "--to" not in argv[:-1]:
        return argv
    place = argv.index("--to")
    return [*argv[:place], f"--to={argv[place + 1]}", *argv[place + 2 :]]
