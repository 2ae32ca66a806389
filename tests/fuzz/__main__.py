"""Fuzz the parsers of foreign bytes: `python -I tests/fuzz [--seconds 600] [TARGET ...]`.

What one run finds interesting is in the target's corpus, and the next goes on from there.
`python -I tests/fuzz TARGET --input FILE` shows a finding again. Exit code 1: a law was broken, and
the last lines say by which file.

Python puts this folder on its path when it is run as a whole, also with -I.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from fuzzed.engine import fuzz_all, replay
from fuzzed.table import TARGETS

from metisfl.proto.errors import MachineError


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz", description="fuzz the parsers")
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seconds", type=float, default=1, help="for each target (1)")
    parser.add_argument("--total", type=float, help="instead: for all targets together")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="of what is found")
    parser.add_argument("--input", type=Path, help="give one file to one target, and no more")
    options = parser.parse_args()
    if unknown := [name for name in options.targets if name not in TARGETS]:
        parser.error(f"{unknown[0]!r} is no target; there are {', '.join(TARGETS)}")
    targets = [TARGETS[name] for name in options.targets] or [*TARGETS.values()]
    if options.input:
        replay(targets[0], options.input)
        return 0
    seconds = options.seconds if options.total is None else options.total / len(targets)
    try:
        found = fuzz_all(targets, seconds, options.folder)
    except MachineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if found:
        print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
