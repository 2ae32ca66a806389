"""The federation file: TOML in, frozen dataclasses out.

Rule: what cannot be is refused here, by name (`learners[2].name`) and with what is allowed, before
any process starts. No key is ignored: a misspelt one would be a setting that silently is not set.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metisfl.deploy.encryption_settings import (
    ENCRYPTED,
    Encryption,
    check_encryption,
)
from metisfl.proto import ckks
from metisfl.proto.errors import UserError
from metisfl.proto.topics import check_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["App", "Encryption", "Federation", "Learner", "Training", "load_federation"]

FILE_BYTES_MAX = 1 << 20
DATA_CHARACTERS_MAX = 4096
DOTS_MAX = 500  # in a line: Python's own parser takes a second for a key of 8,000 parts
ANY_PORT = "tcp://127.0.0.1:0"
OBJECT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
ENDPOINT = re.compile(
    r"tcp://(\*|[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(0|[1-9][0-9]{0,4})"
)


@dataclass(frozen=True, slots=True)
class Training:
    """How a learner trains in one round. `learning_rate` None: the application's own."""

    epochs: int
    batch_size: int
    learning_rate: float | None


@dataclass(frozen=True, slots=True)
class App:
    """The user's code: `package.module:object`, looked up with `path` first on sys.path."""

    object: str
    path: Path


@dataclass(frozen=True, slots=True)
class Learner:
    """A site: its name, and the text that the application's data() gets to find its records."""

    name: str
    data: str


@dataclass(frozen=True, slots=True)
class Federation:
    """A whole federation file. Endpoints are those to bind; port 0 leaves the choice of port.

    `encryption` is used where `privacy` is not "plain". `max_examples` 0: any number.
    """

    name: str
    rounds: int
    quorum: int
    waits_for_quorum: bool
    lease_s: float
    seed: int
    privacy: str
    encryption: Encryption
    training: Training
    app: App
    learners: tuple[Learner, ...]
    ingress: str
    live: str
    bulk: str
    max_examples: int = 0


Check = Callable[[str, object], Any]  # (path of the key, value) -> value to use; or UserError
REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a table: how its value is checked, and what stands in when it is absent."""

    check: Check
    default: object = REQUIRED


def load_federation(path: Path) -> Federation:
    """Read and check a federation file. Raises UserError, with the file, the key and the remedy."""
    try:
        content = _read(path)
        document = tomllib.loads(content.decode())
        return _federation(document, path.absolute().parent)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: line {line} is not UTF-8, which TOML must be") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError tells line and column
        hint = "; a text stands in quotes" if str(error).startswith("Invalid value") else ""
        raise UserError(f"{path}: not a TOML file: {error}{hint}") from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot be read: {reason}") from None
    if len(content) > FILE_BYTES_MAX:
        raise UserError(f"more than {FILE_BYTES_MAX} bytes; this is not a federation file")
    for number, line in enumerate(content.split(b"\n"), start=1):
        if (dots := line.count(b".")) > DOTS_MAX:
            raise UserError(f"line {number} has {dots} dots; at most {DOTS_MAX}")
    return content


def _federation(document: Mapping[str, object], folder: Path) -> Federation:
    """Check a parsed document; what one key's check cannot see alone is checked here."""
    found = _table(DOCUMENT)("", document)
    learners: tuple[Learner, ...] = found["learners"]
    first_use: dict[str, int] = {}
    for position, learner in enumerate(learners):
        if learner.name in first_use:
            raise UserError(
                f"learners[{position}].name: {learner.name!r} is the name of "
                f"learners[{first_use[learner.name]}] already; names are unique"
            )
        first_use[learner.name] = position

    run = found["federation"]
    quorum = len(learners) if run["quorum"] is None else run["quorum"]
    if quorum > len(learners):
        raise UserError(
            f"federation.quorum: {quorum} is more than the {len(learners)} learners listed; "
            f"allowed is 1 to {len(learners)}"
        )
    # Under a joint key whoever is not believed must be checked: a lie in the fold would show keys.
    checked = "full" if run["privacy"] == ckks.JOINT else "none"
    asked = found["encryption"]
    encryption = Encryption(**{**asked, "verify": asked["verify"] or checked})
    if run["privacy"] in ENCRYPTED:
        check_encryption(run["privacy"], encryption, quorum, len(learners))
    elif "encryption" in document:
        raise UserError(
            'encryption: not used where federation.privacy is "plain"; remove the table or set '
            f'privacy = "ckks" or "{ckks.JOINT}"'
        )

    endpoints = {
        "broker.ingress": found["broker"]["ingress"],
        "broker.live": found["broker"]["live"],
        "controller.bulk": found["controller"]["bulk"],
    }
    fixed = [endpoint for endpoint in endpoints.values() if not endpoint.endswith(":0")]
    for key, endpoint in endpoints.items():
        if fixed.count(endpoint) > 1:
            raise UserError(f"{key}: {endpoint!r} is given twice; each socket needs its own port")

    # os.path, because Path.resolve and Path.is_dir raise for loops and for names that are too long.
    app = App(found["app"]["object"], Path(os.path.realpath(folder / found["app"]["path"])))
    if not os.path.isdir(app.path):
        raise UserError(f"app.path: {app.path} is not a folder; relative paths start at the file's")
    waits = run.pop("without_quorum") == "wait"
    return Federation(
        **{**run, "quorum": quorum, "waits_for_quorum": waits},
        encryption=encryption,
        training=Training(**found["training"]),
        app=app,
        learners=learners,
        ingress=endpoints["broker.ingress"],
        live=endpoints["broker.live"],
        bulk=endpoints["controller.bulk"],
    )


def _integer(least: int, most: int) -> Check:
    def check(path: str, value: object) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _refused(path, value, f"a whole number from {least} to {most}")
        return value

    return check


def _number(least: float, most: float) -> Check:
    def check(path: str, value: object) -> float:
        # bool is an int in Python and is no number here; `not (a <= x <= b)` refuses nan as well.
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not least <= value <= most
        ):
            raise _refused(path, value, f"a number from {least:g} to {most:g}")
        return float(value)

    return check


def _choice(*allowed: str) -> Check:
    def check(path: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise _refused(path, value, " or ".join(f'"{text}"' for text in allowed))
        return value

    return check


def _object(path: str, value: object) -> str:
    if not isinstance(value, str) or not OBJECT.fullmatch(value):
        raise _refused(path, value, '"package.module:object"; its folder is app.path')
    module = value.partition(":")[0]
    if module.endswith(".py"):  # a file's name, where Python wants a module's
        meant = value.replace(".py:", ":", 1)
        raise _refused(path, value, f'a module without its ".py": "{meant}"')
    return value


def _printable(path: str, value: object) -> str:
    # The text becomes an argument of a process: no line ends, no NUL.
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise _refused(path, value, "a text of printable characters")
    if len(value) > DATA_CHARACTERS_MAX:
        raise _refused(path, value, f"a text of at most {DATA_CHARACTERS_MAX} characters")
    return value


def _name(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise _refused(path, value, "a text")
    return check_name(value, path)


def _endpoint(path: str, value: object) -> str:
    match = ENDPOINT.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[2]) > 65535:
        raise _refused(path, value, "tcp://ADDRESS:PORT with a port from 0 to 65535")
    return match[0]


def _table(keys: Mapping[str, Key]) -> Check:
    def check(path: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refused(path, value, f"a table with the keys {', '.join(keys)}")
        prefix = f"{path}." if path else ""
        for key in value:
            if key not in keys:
                close = difflib.get_close_matches(key, keys, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                known = ", ".join(keys)
                raise UserError(f"{_shown(prefix + key)}: no such key; {hint}known are {known}")
        checked = {}
        for key, rule in keys.items():
            if key in value:
                checked[key] = rule.check(prefix + key, value[key])
            elif rule.default is REQUIRED:
                raise UserError(f"{prefix}{key}: is missing; it must be given")
            else:
                checked[key] = rule.default
        return checked

    return check


def _section(keys: Mapping[str, Key]) -> Key:
    """A table that may be left out when none of its keys is required."""
    required = any(key.default is REQUIRED for key in keys.values())
    defaults = {name: key.default for name, key in keys.items()}
    return Key(_table(keys), REQUIRED if required else defaults)


def _learners(path: str, value: object) -> tuple[Learner, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= 1000:
        raise _refused(path, value, "1 to 1000 tables [[learners]]")
    found = [_table(LEARNER)(f"{path}[{number}]", item) for number, item in enumerate(value)]
    return tuple(Learner(item["name"], item["data"] or item["name"]) for item in found)


def _refused(path: str, value: object, allowed: str) -> UserError:
    return UserError(f"{path}: {_shown(repr(value))} cannot be; allowed is {allowed}")


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


LEARNER = {"name": Key(_name), "data": Key(_printable, None)}
DOCUMENT = {
    "federation": _section(
        {
            "name": Key(_name),
            "rounds": Key(_integer(1, 100_000)),
            "quorum": Key(_integer(1, 1000), None),  # None: all learners
            "without_quorum": Key(_choice("wait", "fail"), "wait"),
            "lease_s": Key(_number(1, 86_400), 60.0),
            "seed": Key(_integer(0, 2**63 - 1), 0),
            "privacy": Key(_choice("plain", *ENCRYPTED), "ckks"),
            "max_examples": Key(_integer(0, 2**53), 0),
        }
    ),
    "encryption": _section(
        {
            "profile": Key(_choice(*ckks.PROFILES), None),
            "error": Key(_number(1e-12, 0.1), ckks.ERROR),
            "min_contributors": Key(_integer(1, 1000), 2),
            "max_share": Key(_number(0, 1), 0.95),
            "verify": Key(_choice("none", "full"), None),
        }
    ),
    "training": _section(
        {
            "epochs": Key(_integer(1, 1000), 1),
            "batch_size": Key(_integer(1, 1_000_000), 32),
            "learning_rate": Key(_number(1e-12, 1e6), None),
        }
    ),
    "app": _section(
        {
            "object": Key(_object),
            "path": Key(_printable, "."),
        }
    ),
    "learners": Key(_learners),
    "broker": _section({"ingress": Key(_endpoint, ANY_PORT), "live": Key(_endpoint, ANY_PORT)}),
    "controller": _section({"bulk": Key(_endpoint, ANY_PORT)}),
}
