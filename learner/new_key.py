"""Make the key of an encrypted federation, at one of its sites.

Rule: the secret part never leaves the folder that it was made in, except sealed to another site.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from metisfl.deploy.ckks_keys import PUBLIC_FILE, SECRET_FILE, write_new_key
from metisfl.deploy.options import whole_number
from metisfl.deploy.settings import load_federation
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.key_terms import add_terms, default_terms
from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import UserError

__all__ = ["command"]

DEFAULTS = default_terms(verify="none")


def command(argv: list[str]) -> int:
    """Make a key for the number of learners and the settings that `argv` or the file gives."""
    options = _parser().parse_args(argv)
    asked, learners = DEFAULTS, options.max_learners
    if options.federation is not None:
        federation = load_federation(options.federation)
        if federation.privacy == ckks.JOINT:
            raise UserError(
                f'{options.federation}: federation.privacy is "{ckks.JOINT}": its key is made by '
                "all sites together, each at its own: metisfl keys ceremony"
            )
        if federation.privacy != "ckks":
            raise UserError(
                f'{options.federation}: federation.privacy is "{federation.privacy}"; a key is '
                'only used where it is "ckks"'
            )
        asked, learners = federation.encryption, learners or len(federation.learners)
    if learners is None:
        raise UserError(
            "for how many learners? Give --max-learners N, or --federation FILE.toml that lists "
            "them"
        )
    error = options.error or asked.error
    profile, why = options.profile or asked.profile, "as asked for"
    if profile is None:
        profile = ckks.smallest_profile(learners, error)
        why = f"the smallest that keeps an error of {error:g} for {learners} learners"
    if not profile:
        finest = ckks.parameters_for(max(ckks.PROFILES.values()), learners).error
        raise UserError(
            f"no profile keeps an error of {error:g} for {learners} learners; the finest has "
            f"{finest:.1e}"
        )
    min_contributors = options.min_contributors or asked.min_contributors
    max_share = options.max_share or asked.max_share
    _check_policy(learners, min_contributors, max_share)
    public, secret = generate(
        profile,
        max_learners=learners,
        error=error,
        min_contributors=min_contributors,
        max_share=max_share,
        verify=options.verify or asked.verify,
    )
    Crypto(public, secret)  # what cannot be used is not handed out
    write_new_key(options.folder, public, secret)
    if options.json:
        print(json.dumps(_as_json(public, why)))
    else:
        _tell(options.folder, public, why)
    return 0


def _check_policy(learners: int, min_contributors: int, max_share: float) -> None:
    """Raise UserError if the sites could never open a model."""
    if min_contributors > learners:
        raise UserError(
            f"{learners} learners can never make a model of {min_contributors} updates: give "
            "--min-contributors, or --max-learners, another value"
        )
    if max_share * learners < 1:
        raise UserError(
            f"of {learners} learners one always has more than {max_share:g} of the weights: give "
            f"--max-share a value of {1 / learners:.3g} or more"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metisfl keys new",
        description="Make a key for encrypted updates: DIR/public.ckks, for everybody, and "
        "DIR/secret.ckks, for the sites alone. Run it at one site.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--federation",
        type=Path,
        metavar="FILE.toml",
        help="take the number of learners and the table [encryption] from this federation file",
    )
    parser.add_argument(
        "--max-learners",
        type=whole_number(1, ckks.LEARNERS_MAX),
        metavar="N",
        help="the most learners that the key can serve; also the largest sum of weights",
    )
    parser.add_argument(
        "--profile",
        choices=list(ckks.PROFILES),
        help="bytes against precision (default: the smallest that keeps the error)",
    )
    add_terms(parser, DEFAULTS)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def _as_json(public: PublicPart, why: str) -> dict[str, object]:
    return {
        "profile": public.profile,
        "why": why,
        "fingerprint": public.fingerprint.hex(),
        "max_learners": public.max_learners,
        "error": public.parameters.error,
    }


def _tell(folder: Path, public: PublicPart, why: str) -> None:
    print(f"profile {public.profile}: {why}")
    print(f"wrote {folder / PUBLIC_FILE} (fingerprint {public.fingerprint.hex()})")
    print(f"wrote {folder / SECRET_FILE}; whoever has it can read every update")
    print(
        f"next: give {PUBLIC_FILE} to the controller and to every site (into its keys folder), and "
        f"make a sealed copy of the secret part for each other site:\n"
        f"  metisfl keys seal {folder} --to 'learner:NAME PUBLICKEY'",
        file=sys.stderr,
    )
