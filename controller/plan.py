"""Whether a run can begin with this controller, and what its rounds hand out.

Rule: what cannot end well is refused before anyone trains, with the value and the bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from metisfl.controller.state import Terms
from metisfl.proto import events_pb2 as pb
from metisfl.proto.ckks import JOINT, check_shares
from metisfl.proto.events import PAYLOAD_BYTES_MAX
from metisfl.proto.limits import TENSORS_MAX

__all__ = ["largest", "mode_of", "reference_weight", "refusal", "uncounted"]


def refusal(plan: pb.RunStarted, terms: Terms | None) -> str:
    """Why this run cannot be; "" if it can. `terms` are the key's, None without one."""
    names = list(plan.learners)
    if sorted(set(names)) != names or plan.quorum > len(names):
        return "learners must be sorted and unique, and the quorum at most their number"
    privacy = mode_of(terms)
    if plan.privacy != privacy:
        have = "holds the public part of a key" if terms else "has no keys/public.ckks"
        return (
            f"privacy mode {plan.privacy!r}; this controller {have}, so its runs have the privacy "
            f"mode {privacy!r}"
        )
    if plan.continues and not (terms and terms.sites):
        return (
            f"it goes on from run {plan.continues}; only sites of a joint key keep what they have "
            "opened: start without --continue"
        )
    if terms and len(names) > terms.weight_sum_max:
        return (
            f"{len(names)} learners; the key is made for at most {terms.weight_sum_max}: make a "
            f"new one with `metisfl keys new --max-learners {len(names)}`"
        )
    if terms and terms.sites and tuple(names) != terms.sites:
        return (
            f"its learners are {', '.join(names)}; the joint key's sites are "
            f"{', '.join(terms.sites)}. All of them open a model together, and nobody else can: "
            "change the list, or make another key with `metisfl keys ceremony`"
        )
    if terms and plan.quorum < terms.min_contributors:
        return (
            f"a quorum of {plan.quorum}; with this key the sites open no model of fewer than "
            f"{terms.min_contributors} updates: raise the quorum"
        )
    # A learner's part of RoundClosed: twice its name, the run's, numbers and a digest. It leaves
    # some room for a reason where a learner is missing.
    round_bytes = 1_024 + 2 * TENSORS_MAX
    round_bytes += sum(2 * len(name) + len(plan.run_id) + 76 for name in names)
    if round_bytes > PAYLOAD_BYTES_MAX:
        return (
            f"{len(names)} learners with names as long as these need events of {round_bytes} "
            f"bytes; at most {PAYLOAD_BYTES_MAX}: shorten the names or invite fewer"
        )
    return ""


def mode_of(terms: Terms | None) -> str:
    """The privacy mode of a federation whose key has these terms."""
    if terms is None:
        return "plain"
    return JOINT if terms.sites else "ckks"


def uncounted(
    plan: pb.RunStarted, terms: Terms | None, declared: Mapping[str, int]
) -> dict[str, str]:
    """Who of a round cannot count, for the examples that it declared (0: it did not say), and why.

    Who has more than the run allows; and in an encrypted run who would be a larger part of the sum
    than its sites open, even if everyone else came. Where that leaves less than a quorum the rest
    stay: who is awaited still may bring what makes the largest of them small enough.
    """
    most, rest, out = plan.max_examples, dict(declared), {}
    for name, examples in declared.items() if most else ():
        if examples > most:
            out[name] = (
                f"declares {examples} examples; this run counts nobody with more than "
                f"max_examples, {most}"
            )
            del rest[name]
    while terms and len(rest) >= max(2, plan.quorum):
        silent = reference_weight(rest.values())  # who does not say counts for no more than that
        shares = [(name, examples or silent) for name, examples in rest.items()]
        if not (why := check_shares(shares, 1, terms.max_share)):
            break
        name = max(shares, key=lambda share: share[1])[0]
        out[name] = f"declares {rest.pop(name)} examples: of what was declared, {why}"
    return out


def reference_weight(declared: Iterable[int]) -> float:
    """What weights are divided by, so that they sum to about the number of learners.

    The mean of the examples that these learners declared; 1 if none did.
    """
    known = [examples for examples in declared if examples > 0]
    return math.fsum(known) / len(known) if known else 1.0


def largest(exponents: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """For each tensor the largest exponent that anyone needs; who names none needs none."""
    given = [tuple(one) for one in exponents if len(one)]
    return tuple(max(column) for column in zip(*given, strict=True))
