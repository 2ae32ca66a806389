"""Read the records of a run's rounds, and check that nobody has changed them.

Rule: what is shown was checked first. A chain that is whole proves that no record before the newest
was changed; the newest is proved by `--head`, from the log or from any site's log file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from metisfl.controller.round_files import Chain, read_chain
from metisfl.proto.errors import MetisError, UserError
from metisfl.proto.records import Missing, RoundRecord

__all__ = ["ChainBroken", "command"]

DIGEST_CHARACTERS = 64


class ChainBroken(MetisError):
    """The records are not those that were written; the text says from where on."""

    exit_code = 1


def command(argv: list[str]) -> int:
    """`metisfl rounds`. Raises ChainBroken, UserError, or MachineError for unreadable files."""
    parser = argparse.ArgumentParser(
        prog="metisfl rounds",
        description="Show who counted in each round of a run, or verify the records: each names "
        "the one before it by its SHA-256.",
    )
    parser.add_argument("what", choices=("show", "verify"))
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="rounds/<run> in the controller's home"
    )
    parser.add_argument(
        "--head",
        metavar="SHA256",
        help="digest of the newest record, as every site's log names it (`run finished`)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    chain = read_chain(options.folder.resolve())
    if chain.fault:
        raise ChainBroken(f"{options.folder}: {len(chain.records)} records are good; {chain.fault}")
    if options.head is not None:
        _check_head(options.head, chain)
    if options.json:
        print(json.dumps(_as_json(chain)))
        return 0
    if options.what == "show":
        for record in chain.records:
            print("\n".join(_lines(record)))
    print(f"{len(chain.records)} records, unbroken; the newest has the digest {chain.head.hex()}")
    if options.head is None:
        print("compare it with a site's log, or give it as --head: it holds the newest record")
    return 0


def _check_head(text: str, chain: Chain) -> None:
    last, head = chain.records[-1], text.strip().lower()
    if len(head) != DIGEST_CHARACTERS or set(head) - set("0123456789abcdef"):
        raise UserError(f"--head {text[:80]!r}: a SHA-256 has {DIGEST_CHARACTERS} digits of 0-9a-f")
    # What a log names is the last round that was closed; one that was open at the end may follow.
    named = chain.head if last.model_digest else last.previous
    if head not in (chain.head.hex(), named.hex()):
        raise ChainBroken(
            f"the newest record has the digest {chain.head.hex()}, not {head}: it was changed, or "
            "records at the end are missing"
        )


def _lines(record: RoundRecord) -> list[str]:
    what = f"{len(record.counted)} counted" if record.model_digest else "failed"
    if not record.model_digest and any(one.kind == "stopped" for one in record.missing):
        what = "stopped"
    metrics = ", ".join(
        f"{name.replace('.', ' ')} {value:.3f}"
        for name, value in record.metrics.items()
        if name.startswith("test.") and not name.endswith(".examples")
    )
    head = f"round {record.round}: {len(record.invited)} invited, {what}"
    return [
        f"{head}, {metrics}" if metrics else head,
        *(f"  {one.learner}: weight {one.weight:g}" for one in record.counted),
        *(f"  {_absence(one)}" for one in record.missing),
        *(f"  {_absence(one)} (its score of the model)" for one in record.unevaluated),
    ]


def _absence(one: Missing) -> str:
    return f"{one.learner}: {one.kind}, {one.reason or 'no reason given'}"


def _as_json(chain: Chain) -> dict[str, object]:
    return {
        "records": len(chain.records),
        "head": chain.head.hex(),
        "rounds": [
            {
                "round": one.round,
                "model_digest": one.model_digest.hex(),
                "invited": list(one.invited),
                "counted": {c.learner: c.weight for c in one.counted},
                "missing": {m.learner: [m.kind, m.reason] for m in one.missing},
                "unevaluated": {m.learner: [m.kind, m.reason] for m in one.unevaluated},
                "metrics": dict(one.metrics),
            }
            for one in chain.records
        ],
    }
