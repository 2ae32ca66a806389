"""Joint keys as a ceremony makes them, put together in one process: for tests of the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from metisfl.learner.joint_key import joint_key, make_share
from metisfl.proto.ckks_key import MASK_KEY_BYTES, PublicPart, SecretPart

__all__ = ["joint_keys"]


def joint_keys(sites: Sequence[str], **policy: Any) -> dict[str, tuple[PublicPart, SecretPart]]:
    """The parts of each site, by name. `policy` is what `joint_key` takes."""
    terms = {"error": 1e-6, "min_contributors": 2, "max_share": 0.95, "verify": "full", **policy}
    coin, mask_key = os.urandom(32), os.urandom(MASK_KEY_BYTES)
    made = {name: make_share(sites=sites, coin=coin) for name in sites}
    shares = {name: share.public for name, share in made.items()}
    return {
        name: joint_key(
            sites=sites,
            coin=coin,
            shares=shares,
            secret=share.secret,
            mask_key=mask_key,
            **terms,
        )
        for name, share in made.items()
    }
