"""Show a daemon's audit log, and check that nobody has changed it.

Rule: what is shown was checked first. A chain that is whole proves that no line before the last was
changed, taken out or put in. That none is missing at the end is proved by `--head`, with a digest
that the operator has noted elsewhere: lines may follow it, but it must be there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Final

from metisfl.deploy.audit_files import AUDIT_FILE, Checked, check, files_of, read
from metisfl.deploy.audit_line import DIGEST, Fact, Line
from metisfl.proto.errors import MachineError, MetisError, UserError

__all__ = ["AuditBroken", "command"]

UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}
WORD: Final = re.compile(r"[\w.:/+@-]+", re.ASCII)
WORDS: Final = re.compile(r"[\w.:/+@ -]+", re.ASCII)


class AuditBroken(MetisError):
    """The log is not the one that was written; the text says from where on."""

    exit_code = 1


def command(argv: list[str]) -> int:
    """`metisfl audit`. Raises AuditBroken, UserError, or MachineError for unreadable files."""
    parser = argparse.ArgumentParser(
        prog="metisfl audit",
        description="Show what a daemon has recorded for its security, after checking the chain of "
        "its lines: each names the one before it by its SHA-256.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a daemon's home, or one file")
    parser.add_argument("--verify", action="store_true", help="only check, show no facts")
    parser.add_argument(
        "--head",
        metavar="SHA256",
        help="a digest that this command has shown before: lines may follow it, but a log without "
        "it was cut off or changed",
    )
    parser.add_argument(
        "--since",
        metavar="TIME",
        help="show what was recorded from then on: 2026-11-24T09:30 (UTC), or 30m, 12h, 7d ago",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    noted = None if options.head is None else _digest(options.head)
    since = "" if options.since is None else _time(options.since, datetime.now(timezone.utc))
    path: Path = options.path.resolve()
    paths = files_of(path / AUDIT_FILE) if path.is_dir() else [path]
    if not paths:
        raise MachineError(f"{path} holds no {AUDIT_FILE}; name the home of a daemon")
    checked = check(paths, whole=path.is_dir(), noted=noted or "")
    _judge(options.path, checked, noted)
    if options.json:
        _print_json(paths, checked, since, facts=not options.verify)
        return 0
    if not options.verify:
        for _, line in read(paths, checked.lines):
            if line.time >= since:
                print(_shown(line))
    print("\n".join(_summary(checked, noted)))
    return 0


def _judge(path: Path, checked: Checked, noted: str | None) -> None:
    if checked.fault:
        raise AuditBroken(f"{path}: {checked.lines} lines are good; {checked.fault}")
    if noted is not None and checked.noted is None:
        raise AuditBroken(
            f"{path}: {checked.lines} lines follow each other, and none has the digest {noted}: "
            "lines at the end were cut off, or changed together with all behind them"
        )


def _summary(checked: Checked, noted: str | None) -> list[str]:
    last = checked.first + checked.lines - 1
    said = [f"{checked.lines} lines, unbroken; the last has the digest {checked.head}"]
    if checked.first > 1:
        said.append(f"they are lines {checked.first} to {last} of a log: the first are not here")
    if checked.unfinished_bytes:
        said.append(
            f"behind it are {checked.unfinished_bytes} bytes without an end: a line that is being "
            "written, or that a crash has left; the daemon cuts it off when it starts"
        )
    if noted is None:
        said.append(
            "note the digest where nobody who can write here can: given as --head, it later shows "
            "whether lines at the end were cut off, which nothing here can"
        )
    else:
        said.append(f"line {checked.noted} is the one that was noted, of {last}")
    return said


def _print_json(paths: Sequence[Path], checked: Checked, since: str, *, facts: bool) -> None:
    """One object; its lines are printed as they are read, since a log may be larger than memory."""
    about: dict[str, object] = {
        "lines": checked.lines,
        "first": checked.first,
        "head": checked.head,
        "noted": checked.noted,
        "unfinished_bytes": checked.unfinished_bytes,
    }
    if not facts:
        print(json.dumps(about))
        return
    sys.stdout.write(json.dumps(about)[:-1] + ', "facts": [')
    separator = ""
    for data, line in read(paths, checked.lines):
        if line.time >= since:
            sys.stdout.write(separator + data.decode("ascii"))
            separator = ",\n"
    print("]}")


def _shown(line: Line) -> str:
    facts = (f"{_safe(name)}={_safe(value)}" for name, value in line.facts.items())
    what = _safe(line.what, WORDS)
    return "  ".join([f"{line.number:>6}", line.time, what, " ".join(facts)]).rstrip()


def _safe(value: Fact, plain: re.Pattern[str] = WORD) -> str:
    """As it is, or quoted: text from outside must not move the cursor of a terminal."""
    text = str(value)
    return text if plain.fullmatch(text) else json.dumps(text)


def _digest(text: str) -> str:
    digest = text.strip().lower()
    if not DIGEST.fullmatch(digest):
        raise UserError(f"--head {text[:80]!r}: a SHA-256 has 64 digits of 0-9a-f")
    return digest


def _time(text: str, now: datetime) -> str:
    """The time in the form that lines have, in which texts compare as times do."""
    try:
        if match := re.fullmatch(r"(\d+)([mhd])", text, re.ASCII):
            then = now - timedelta(**{UNITS[match[2]]: int(match[1])})
        else:
            then = datetime.fromisoformat(text.replace("Z", "+00:00"))
        then = then.replace(tzinfo=then.tzinfo or timezone.utc).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise UserError(
            f"--since {text[:80]!r}: use a time such as 2026-11-24T09:30, or 30m, 12h, 7d"
        ) from None
    return then.isoformat(timespec="microseconds").replace("+00:00", "Z")
