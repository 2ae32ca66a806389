"""Times cases against each other on a machine that may slow down or be shared meanwhile.

Rule: what is compared is measured in the same run, on the same arrays, in turns and in changing
order; a ratio is taken within each turn and the median is reported, so that whatever slows the
machine slows both sides.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

__all__ = ["Turn", "in_turns", "ratio"]

TURNS = 9
QUIET_S = 2.0

Turn = Mapping[str, float]
"""Nanoseconds per unit, by case."""


def in_turns(cases: Mapping[str, Callable[[], None]], units: int, turns: int = TURNS) -> list[Turn]:
    """Run every case `turns` times; times are divided by `units`. Tells its progress on stderr."""
    started_s = time.monotonic()
    found: list[Turn] = []
    for turn in range(turns):
        if time.monotonic() - started_s > QUIET_S:
            print(f"turn {turn + 1} of {turns}", file=sys.stderr)
        # In another order each time: what ran before decides what the caches still hold.
        order = random.Random(turn).sample(sorted(cases), len(cases))
        found.append({name: _time_ns(cases[name]) / units for name in order})
    return found


def ratio(turns: Sequence[Turn], above: str, below: str) -> float:
    """The median over the turns of one case's time divided by another's."""
    return median(turn[above] / turn[below] for turn in turns)


def _time_ns(case: Callable[[], None]) -> int:
    start_ns = time.perf_counter_ns()
    case()
    return time.perf_counter_ns() - start_ns
