"""On which terms a key is made, as the commands that make one take them."""

from __future__ import annotations

import argparse

from metisfl.deploy.options import number, whole_number
from metisfl.deploy.settings import Encryption
from metisfl.proto import ckks
from metisfl.proto.ckks_key import VERIFY

__all__ = ["add_terms", "default_terms"]


def default_terms(*, verify: str) -> Encryption:
    """What holds where neither the command nor a federation file says otherwise."""
    return Encryption(
        profile=None, error=ckks.ERROR, min_contributors=2, max_share=0.95, verify=verify
    )


def add_terms(parser: argparse.ArgumentParser, defaults: Encryption) -> None:
    """Add --error, --min-contributors, --max-share and --verify; each is None if not given."""
    parser.add_argument(
        "--error",
        type=number(1e-12, 0.1),
        metavar="E",
        help="promised error of a mean, relative to a tensor's scale (default: "
        f"{defaults.error:g})",
    )
    parser.add_argument(
        "--min-contributors",
        type=whole_number(1, ckks.LEARNERS_MAX),
        metavar="N",
        help=f"sites open no model of fewer updates (default: {defaults.min_contributors})",
    )
    parser.add_argument(
        "--max-share",
        type=number(1e-3, 1.0),
        metavar="S",
        help="sites open no model of which one site is more than this part, 0 to 1 (default: "
        f"{defaults.max_share})",
    )
    parser.add_argument(
        "--verify",
        choices=VERIFY,
        help="full: every site fetches all updates and folds them itself; none: it believes the "
        f"controller (default: {defaults.verify})",
    )
