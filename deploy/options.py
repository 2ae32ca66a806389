"""Options of the daemons: a flag, or an environment variable of the same name.

Rule: `--bulk` is METISFL_BULK, for every flag, so that a unit's environment file says all there is
to say about a site. A flag wins over the environment.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from metisfl import __version__
from metisfl.proto.errors import UserError
from metisfl.proto.topics import check_name

__all__ = [
    "BULK",
    "INGRESS",
    "LIVE",
    "add_flag",
    "add_option",
    "daemon_parser",
    "name_of",
    "number",
    "size",
    "size_or_none",
    "whole_number",
]

INGRESS = "tcp://127.0.0.1:5570"
LIVE = "tcp://127.0.0.1:5571"
BULK = "tcp://127.0.0.1:5572"
SIZE_LEAST_BYTES: Final = 1024**2


def daemon_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with what every daemon has: --version, --home."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="Every option can also be set in the environment: --home is METISFL_HOME.",
    )
    parser.add_argument("--version", action="version", version=f"{program} {__version__}")
    add_option(
        parser,
        "home",
        help="folder for keys and state (keys/ holds identity.key and its lists)",
        type=Path,
    )
    return parser


def add_option(
    parser: argparse.ArgumentParser,
    name: str,
    *,
    help: str,
    default: str | None = None,
    type: Callable[[str], Any] = str,
) -> None:
    """Add --name. Without a default, the flag or its variable must be given."""
    value = os.environ.get(_variable(name), default)
    shown = f" (default: {default})" if default else ""
    parser.add_argument(
        f"--{name}",
        required=value is None,
        default=value,
        type=type,
        metavar=name.upper().replace("-", "_"),
        help=f"{help}{shown}",
    )


def add_flag(parser: argparse.ArgumentParser, name: str, *, help: str) -> None:
    """Add --name, which takes no value; its variable may be 1, 0 or empty."""
    variable = _variable(name)
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        parser.error(f"{variable}={value[:40]!r} cannot be; allowed are 1, 0 and nothing")
    parser.add_argument(f"--{name}", action="store_true", default=value == "1", help=help)


def _variable(name: str) -> str:
    return f"METISFL_{name.upper().replace('-', '_')}"


def name_of(what: str) -> Callable[[str], str]:
    """Return an argparse type for the name of a federation or learner."""

    def check(text: str) -> str:
        try:
            return check_name(text, what)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def size(text: str) -> int:
    """An argparse type: bytes, or a whole number with KiB, MiB, GiB or TiB behind it."""
    number, unit = text, 1
    for power, name in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1):
        if text.endswith(name):
            number, unit = text.removesuffix(name).rstrip(), 1024**power
    digits = number.isascii() and number.isdigit() and len(number) <= 20
    bytes_ = int(number) * unit if digits else 0
    if not SIZE_LEAST_BYTES <= bytes_ < 2**62:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} cannot be; say at least 1MiB, as bytes or with KiB, MiB, GiB or TiB"
        )
    return bytes_


def size_or_none(text: str) -> int | None:
    """The same; "" is no limit."""
    return size(text) if text else None


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return an argparse type for a whole number from `least` to `most`."""

    def check(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= 20
        if not digits or not least <= int(text) <= most:
            shown = repr(text if len(text) <= 40 else f"{text[:37]}...")
            raise argparse.ArgumentTypeError(
                f"{shown} cannot be; allowed is a whole number from {least} to {most}"
            )
        return int(text)

    return check


def number(least: float, most: float) -> Callable[[str], float]:
    """Return an argparse type for a number from `least` to `most`."""

    def check(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} cannot be; allowed is a number from {least:g} to {most:g}"
            )
        return value

    return check
