"""Invite a site or a driver: print a one-time code that is all it needs to ask for admission.

Rule: the code is the only place where its secret is; the broker keeps the public half. Whoever has
the code can ask, once, and nothing else; it is the operator who admits, after comparing what the
site reads out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from metisfl.deploy.invitation_code import TOKEN_BYTES, Code, format_code
from metisfl.deploy.invitations import change
from metisfl.deploy.key_lists import SERVER_PRINCIPALS
from metisfl.deploy.keys import check_principal, load_identity
from metisfl.deploy.options import add_option, name_of, whole_number
from metisfl.deploy.registry import PEERS_FILE, load_registry
from metisfl.deploy.settings import ENDPOINT
from metisfl.proto.enrolment import Invitation
from metisfl.proto.errors import UserError

__all__ = ["command", "invited_principal"]

PORTS: Final = {"ingress": 5570, "live": 5571, "bulk": 5572}
EVERYWHERE: Final = ("*", "0.0.0.0", "[::]")
LOOPBACK: Final = ("localhost", "127.", "[::1]")
HOURS_MAX: Final = 30 * 24
HOUR_S: Final = 3600


def command(argv: list[str]) -> int:
    """`metisfl invite`: the code alone goes to stdout."""
    options = _parser().parse_args(argv)
    principal = invited_principal(options.name)
    keys: Path = options.home / "keys"
    broker, controller = _servers(keys, principal)
    code = Code(
        principal=principal,
        federation=options.federation,
        ingress=_reachable("ingress", options.ingress, options.host),
        live=_reachable("live", options.live, options.host),
        bulk=_reachable("bulk", options.bulk, options.host),
        broker=broker,
        controller=controller,
        expires_unix_s=int(time.time()) + options.hours * HOUR_S,
        token=os.urandom(TOKEN_BYTES),
    )
    word = format_code(code)
    invitation = Invitation(principal, code.key_pair()[0], code.federation, code.expires_unix_s)
    replaced: list[Invitation] = []

    def with_it(before: Mapping[str, Invitation]) -> Mapping[str, Invitation]:
        replaced.extend(it for it in before.values() if it.principal == principal)
        return {**before, principal: invitation}

    change(keys, with_it, now_unix_s=time.time())
    if options.json:
        print(json.dumps(_as_json(code, word)))
        return 0
    print(_advice(code, options.home, bool(replaced)), file=sys.stderr)
    print(word)
    return 0


def invited_principal(name: str) -> str:
    """The principal meant by `name`, which may be a learner's bare name. Raises UserError."""
    if name in SERVER_PRINCIPALS:
        raise UserError(f"a {name} is not invited: `metisfl admit {name} KEY` lists it")
    return check_principal(name if ":" in name else f"learner:{name}")


def _servers(keys: Path, principal: str) -> tuple[bytes, bytes]:
    """Public keys of broker and controller, in whose list `principal` is not yet."""
    identity = load_identity(keys)
    if identity.principal != "broker":
        raise UserError(
            f"{keys} holds the key of {identity.principal}: --home is the broker's home, since the "
            "broker is who a site asks"
        )
    peers = load_registry(keys).peers
    if "controller" not in peers:
        raise UserError(
            f"{keys / PEERS_FILE} does not list the controller, whose key a site needs: first "
            f"`metisfl admit controller KEY --home {keys.parent}`, with the key that `metisfl keys "
            "show` prints at the controller"
        )
    if principal in peers:
        raise UserError(
            f"{principal} is admitted already. To give it a new key, `metisfl expel {principal}` "
            "first, then invite it again"
        )
    return identity.public, peers["controller"].public


def _reachable(name: str, endpoint: str, host: str | None) -> str:
    """`endpoint` as sites reach it: `host` stands where it says any address of this machine."""
    match = ENDPOINT.fullmatch(endpoint)
    if match is None or int(match[2]) > 65535:
        raise UserError(f"--{name} {endpoint!r}: use tcp://ADDRESS:PORT")
    address, port = match[1], match[2]
    if port == "0":
        raise UserError(
            f"--{name} {endpoint} leaves the choice of port to the server, and no site could find "
            f"it: give the server a port of its own, such as {PORTS[name]}, and say it here"
        )
    if address not in EVERYWHERE:
        return endpoint
    if host is None:
        raise UserError(
            f"--{name} {endpoint} is where the server listens, not where sites find it: add --host "
            f"with this machine's name or address, or say --{name} tcp://HOST:{port}"
        )
    return f"tcp://{host}:{port}"


def _host(text: str) -> str:
    if text in EVERYWHERE or not ENDPOINT.fullmatch(f"tcp://{text}:1"):
        raise argparse.ArgumentTypeError(
            f"{text[:80]!r} is no name or address of one machine; write an IPv6 address as [::1]"
        )
    return text


def _advice(code: Code, home: Path, replaced: bool) -> str:
    name = code.principal.removeprefix("learner:")
    until = time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(code.expires_unix_s))
    lines = [
        f"{code.principal} is invited to {code.federation} until {until}. Send it the code below; "
        "it works once. There,",
        f"    metisfl join CODE --home {name.rpartition(':')[2]}",
        "shows a fingerprint, which the site reads to you by telephone. Then, here,",
        f"    metisfl admit {name} --home {home}",
        "shows what the broker was asked with: admit the site if both are the same.",
    ]
    if replaced:
        lines.append("Its earlier code does not work any more.")
    endpoints = (code.ingress, code.live, code.bulk)
    if any(end.removeprefix("tcp://").startswith(LOOPBACK) for end in endpoints):
        lines.append(f"Only this machine itself can reach {' '.join(endpoints)}.")
    return "\n".join(lines)


def _as_json(code: Code, word: str) -> dict[str, object]:
    return {
        "code": word,
        "principal": code.principal,
        "federation": code.federation,
        "ingress": code.ingress,
        "live": code.live,
        "bulk": code.bulk,
        "expires_unix_s": code.expires_unix_s,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metisfl invite",
        description="Print a one-time code for a new site or driver. It says where the federation "
        "is and which keys its servers have. Endpoints and federation may come from the "
        "environment, as for the daemons: --ingress is METISFL_INGRESS.",
    )
    parser.add_argument(
        "name", metavar="NAME", help="learner:<name> or driver:<name>; a bare name is a learner's"
    )
    add_option(parser, "home", help="the broker's home", type=Path)
    add_option(parser, "federation", help="name of the federation", type=name_of("federation"))
    for name, whose in (("ingress", "the broker's"), ("live", "the broker's"), ("bulk", "the")):
        server = "controller's bulk" if name == "bulk" else name
        what = f"{whose} {server} endpoint, as sites reach it"
        add_option(parser, name, help=what, default=f"tcp://*:{PORTS[name]}")
    parser.add_argument(
        "--host",
        type=_host,
        help="this machine's name or address for sites, instead of `*` in the endpoints",
    )
    parser.add_argument(
        "--hours",
        type=whole_number(1, HOURS_MAX),
        default=24,
        help="how long the code works (default: 24)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
