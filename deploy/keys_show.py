"""Show the public side of the keys in a folder.

Rule: what is printed may go into a `peers` or `servers` file as it is: the public line of the
identity comes first, and everything else is comments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE, load_public
from metisfl.deploy.keys import IDENTITY_FILE, load_identity
from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart

__all__ = ["command"]


def command(argv: list[str]) -> int:
    """`metisfl keys show`. Raises UserError for a folder without keys."""
    parser = argparse.ArgumentParser(
        prog="metisfl keys show",
        description="Print the public line of DIR/identity.key, which is safe to send to anybody, "
        "and what DIR/public.ckks promises.",
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="a keys folder")
    parser.add_argument("--folder", dest="named", type=Path, metavar="DIR", help="the same")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.named is None):
        parser.error("which folder? Give DIR, once")
    folder: Path = options.named or options.folder
    public = load_public(folder)
    line = None
    if public is None or (folder / IDENTITY_FILE).exists():
        line = load_identity(folder).public_line
    facts = {} if public is None else _facts(public, (folder / SECRET_FILE).exists())
    if options.json:
        print(json.dumps({"public_line": line, **facts}))
        return 0
    if line is not None:
        print(line)
    if facts:
        print("\n".join(_lines(folder / PUBLIC_FILE, facts)))
    return 0


def _facts(public: PublicPart, secret_here: bool) -> dict[str, object]:
    learners = public.max_learners
    update = public.update_form(())
    up = (update.polynomials, update.seeds)
    few = learners <= ckks.SEEDS_FORWARDED and not public.is_joint
    down = (1, learners) if few else (2, 0)
    step = 2.0 ** (public.scaling_bits - public.grid_bits)
    noise = ckks.noise_bound(learners, joint=public.is_joint, ring=public.ring_dimension)
    facts = {
        "profile": public.profile,
        "limb_bits": public.limb_bits,
        "fingerprint": public.fingerprint.hex(),
        "largest_sum_of_weights": learners,
        "expected_error": 2.0 ** -(public.grid_bits + 1),
        "promised_error": public.error,
        "up_bytes_per_param": _bytes(public, *up),
        "down_bytes_per_param": _bytes(public, *down),
        "repeatable": step > 2 * noise,
        "min_contributors": public.min_contributors,
        "max_share": public.max_share,
        "verify": public.verify,
        "secret_part_here": secret_here,
    }
    if public.is_joint:
        facts |= {"sites": list(public.sites), "partial_bytes_per_param": _bytes(public, 1, 1)}
    return facts


def _bytes(public: PublicPart, polynomials: int, seeds: int) -> float:
    return round(ckks.bytes_per_parameter(public.limb_bits, polynomials, seeds), 3)


def _lines(path: Path, facts: Mapping[str, Any]) -> list[str]:
    learners = facts["largest_sum_of_weights"]
    rows = {
        "profile": f"{facts['profile']}, {facts['limb_bits']} bits for each parameter",
        "fingerprint": facts["fingerprint"],
        "range": "-1 to 1 times a tensor's scale 2^e; a value beyond it opens the round again with "
        "a larger one",
        "weights": f"their sum is at most {learners}, and so are the learners",
        "error": f"at most {facts['expected_error']:.1e} of a tensor's scale, where the weights "
        f"sum to the number of learners; promised are {facts['promised_error']:g}",
        "bytes": f"{facts['up_bytes_per_param']} a parameter up, "
        f"{facts['down_bytes_per_param']} down with {learners} learners",
        "repeatable": "yes: the grid is wider than twice the noise, so that all sites and all runs "
        "of one seed have the same bits"
        if facts["repeatable"]
        else "no: the noise may cross the grid",
        "sites decrypt": f"sums of at least {facts['min_contributors']} updates, of which none has "
        f"more than {100 * facts['max_share']:g}% of the weights",
        "verify": facts["verify"],
        "secret part": "is in this folder" if facts["secret_part_here"] else "is not here",
    }
    if "sites" in facts:
        rows = _joint_rows(facts) | rows | _joint_costs(facts)
    return [f"# {path}:"] + [f"#   {name:<14} {text}" for name, text in rows.items()]


def _joint_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    sites = facts["sites"]
    return {
        "joint key": f"of {', '.join(sites)}; a round is opened by all of them together "
        f"({len(sites)} of {len(sites)}), and by no fewer",
        "limits": "sites are taken to follow the protocol. What hides a share in its partials is "
        "OpenFHE's flooding, of a fixed width (2^20 a site): a rule of thumb, and no proof",
    }


def _joint_costs(facts: Mapping[str, Any]) -> dict[str, str]:
    return {
        "profile": f"{facts['profile']}, {facts['limb_bits']} bits for each parameter and "
        "polynomial",
        "bytes": f"{facts['up_bytes_per_param']} a parameter up and as many down (two "
        f"polynomials); to open a round {facts['partial_bytes_per_param']} more up, and down (one)",
        "secret part": f"{'is' if facts['secret_part_here'] else 'is not'} in this folder: this "
        "site's share of the key, which never leaves it",
    }
