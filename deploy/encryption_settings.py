"""What a federation file says of encryption, and what of it cannot be.

Rule: what would let a round close whose sum the sites then refuse to open is refused before
anything starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from metisfl.proto import ckks
from metisfl.proto.errors import UserError

__all__ = ["ENCRYPTED", "Encryption", "check_encryption"]

ENCRYPTED: Final = ("ckks", ckks.JOINT)


@dataclass(frozen=True, slots=True)
class Encryption:
    """What a new key is made for, and what the sites ask of a sum before they decrypt it.

    `error` is the largest error of a mean, relative to its tensor's scale. `profile` None: the
    smallest that keeps it. `max_share` is the largest part of the weights that one site may have.
    """

    profile: str | None
    error: float
    min_contributors: int
    max_share: float
    verify: str


def check_encryption(privacy: str, encryption: Encryption, quorum: int, learners: int) -> None:
    """Raise UserError for what no key can be made for, or no round can be opened with."""
    if privacy == ckks.JOINT:
        _check_joint(encryption, learners)
    _check_sums(encryption, quorum, learners)


def _check_joint(encryption: Encryption, learners: int) -> None:
    """Refuse what no joint key can be made for."""
    if encryption.profile not in (None, ckks.JOINT_PROFILE):
        raise UserError(
            f'encryption.profile: a joint key has the profile "{ckks.JOINT_PROFILE}"; remove the '
            "line, or take another privacy mode"
        )
    most = ckks.joint_sites_max(encryption.error)
    if not 2 <= learners <= most:
        raise UserError(
            f"federation.privacy: a joint key of {learners} sites; with an error of "
            f"{encryption.error:g} allowed are 2 to {most}"
        )


def _check_sums(encryption: Encryption, quorum: int, learners: int) -> None:
    """Refuse what would let a round close whose sum the sites then refuse to decrypt."""
    least, share = encryption.min_contributors, encryption.max_share
    if learners == 1 and (least > 1 or share < 1):
        raise UserError(
            "federation.privacy: a sum over one learner hides nothing of what it sends; allowed is "
            '"plain", or "ckks" with encryption.min_contributors = 1 and encryption.max_share = 1'
        )
    if least > learners:
        raise UserError(
            f"encryption.min_contributors: {least} is more than the {learners} learners listed; "
            f"allowed is 1 to {learners}"
        )
    if quorum < least:
        raise UserError(
            f"federation.quorum: {quorum} is less than encryption.min_contributors, {least}: the "
            f"sites would not decrypt what such a round gives; allowed is {least} to {learners}"
        )
    if share * quorum < 1:
        raise UserError(
            f"encryption.max_share: {share:g} cannot be kept by the {quorum} learners of a quorum: "
            f"one of them has at least 1/{quorum}; allowed is "
            f"{math.ceil(1e4 / quorum) / 1e4:g} to 1"
        )
