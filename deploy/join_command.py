"""Join a federation with the code from its operator: make this site's keys and ask for admission.

Rule: the key pair is made here and its secret stays here. The code is used once, to ask; afterwards
the site is known by its own key. Whatever breaks this off, the same command goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from metisfl.deploy.invitation_code import CHARACTERS_MAX, Code, parse_code
from metisfl.deploy.joining import Joining
from metisfl.deploy.key_lists import add_server
from metisfl.deploy.keys import IDENTITY_FILE, Identity, create_identity, load_identity
from metisfl.deploy.options import add_option, whole_number
from metisfl.deploy.site_env import write_site_env
from metisfl.proto.errors import UserError

__all__ = ["command"]

WAIT_S_MAX = 30 * 24 * 3600


def command(argv: list[str]) -> int:
    """`metisfl join`."""
    parser = argparse.ArgumentParser(
        prog="metisfl join",
        description="Make this site's keys, ask the federation's broker for admission, and wait "
        "until its operator has agreed. Learners and drivers join alike.",
    )
    parser.add_argument(
        "code",
        nargs="+",
        metavar="CODE",
        help="what `metisfl invite` printed, line breaks are fine; - reads it from standard input",
    )
    add_option(parser, "home", help="this site's home, which need not exist yet", type=Path)
    parser.add_argument(
        "--wait-s",
        type=whole_number(1, WAIT_S_MAX),
        metavar="SECONDS",
        help="give up after so long (default: wait until the operator has decided)",
    )
    options = parser.parse_args(argv)
    typed = sys.stdin.read(CHARACTERS_MAX + 1) if options.code == ["-"] else " ".join(options.code)
    code, home = parse_code(typed), options.home
    identity = _identity(home, code)
    for server, public in (("broker", code.broker), ("controller", code.controller)):
        add_server(home / "keys", server, public)
    settings = write_site_env(home, code)
    _say(f"{identity.principal}: the key pair of this site is {home / 'keys' / IDENTITY_FILE}")
    joining = Joining(code, identity, _say, options.wait_s)
    joining.until_admitted()
    _say(f"{identity.principal} is admitted to {code.federation}.")
    if code.principal.startswith("learner:"):
        _tell_learner(code, home, settings, joining.controller_is_open())
    else:
        _tell_driver(code, home)
    return 0


def _identity(home: Path, code: Code) -> Identity:
    keys = home / "keys"
    if not (keys / IDENTITY_FILE).exists():
        return create_identity(keys, code.principal)
    identity = load_identity(keys)
    if identity.principal != code.principal:
        raise UserError(
            f"{keys} holds the key of {identity.principal}, and the code is for {code.principal}: "
            "give another --home"
        )
    return identity


def _tell_learner(code: Code, home: Path, settings: Path, is_open: bool | None) -> None:
    if is_open is False:
        _say(
            f"The controller at {code.bulk} does not let this site in yet: ask the operator to run "
            "`metisfl admit` for the controller's home, too."
        )
    elif is_open is None:
        _say(
            f"The controller at {code.bulk} does not answer now; the learner waits for it. May "
            "this machine connect to that port?"
        )
    _say("Start the learner with your application, here or under systemd:")
    _say(f"    set -a; . {shlex.quote(str(settings.absolute()))}; set +a")
    _say(f"    metisfl-learner --home {shlex.quote(str(home))} --app MODULE:OBJECT")


def _tell_driver(code: Code, home: Path) -> None:
    _say("In your federation file, say where the broker is:")
    _say(f'    [broker]\n    ingress = "{code.ingress}"\n    live = "{code.live}"')
    _say("and ask for a run:")
    _say(f"    metisfl run FEDERATION.toml --home {shlex.quote(str(home))}")


def _say(text: str) -> None:
    print(text, flush=True)
