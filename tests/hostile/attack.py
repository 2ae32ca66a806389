"""Attack a federation: `python tests/hostile/attack.py --ingress ... ATTACK ...` (see README.md).

Each ATTACK goes on, beside the others, until SIGTERM or for --seconds; then one line of JSON for
each says what the other side did. Whoever is without --home has no key. `{}` in --as and --home
stands for the attack's name, so that each can be somebody else.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

from attacks import bulk, participant, publishing, reading, strangers
from attacks.target import Attack, End, Tally, Target, take_many_files

ATTACKS: dict[str, Attack] = {
    **strangers.ATTACKS,
    **publishing.ATTACKS,
    **reading.ATTACKS,
    **bulk.ATTACKS,
    **participant.ATTACKS,
}
NICE = 19  # what is measured is the defence's cost, not the attack's


def step_back(nice: int) -> None:
    """Take only the time that nobody else wants, whichever way this kernel shares it out."""
    with suppress(OSError):
        os.setsid()  # Linux may give each of these groups of processes the same share
    os.nice(nice)
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(nice))


def _target(options: argparse.Namespace, attack: str) -> Target:
    home = str(options.home).replace("{}", attack) if options.home else ""
    return Target(
        options.ingress,
        options.live,
        options.bulk,
        options.federation,
        options.principal.replace("{}", attack),
        Path(home) if home else None,
        options.insecure,
    )


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="tests/hostile/attack.py", description=__doc__)
    parser.add_argument("attacks", metavar="ATTACK", nargs="+", choices=sorted(ATTACKS))
    for end in ("ingress", "live", "bulk", "federation"):
        parser.add_argument(f"--{end}", required=True)
    parser.add_argument("--as", dest="principal", default="learner:mallory")
    parser.add_argument("--home", help="the folder whose keys/ the attacker has")
    parser.add_argument("--insecure", action="store_true", help="as the federation was started")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--nice", type=int, default=NICE, help=f"({NICE})")
    options = parser.parse_args()
    end = End(options.seconds)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end.tell())
    step_back(options.nice)
    take_many_files()
    tallies = {name: Tally() for name in options.attacks}
    broken: list[str] = []

    def run(name: str) -> None:
        try:
            ATTACKS[name](_target(options, name), end, tallies[name])
        except BaseException:
            broken.append(name)
            raise

    threads = [
        threading.Thread(target=run, args=(name,), name=name, daemon=True) for name in tallies
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not end.wait(0.2):
        pass
    for name, tally in tallies.items():
        print(json.dumps({"attack": name, **tally.counts, "said": tally.said}), flush=True)
    os._exit(1 if broken else 0)  # whatever is still in the middle of something does not matter


if __name__ == "__main__":
    main()
