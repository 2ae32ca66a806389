"""What a trainer is given by who neither follows nor cancels it."""

from __future__ import annotations

from collections.abc import Mapping


def _ignore(fraction: float, metrics: Mapping[str, float]) -> None: ...


def _go_on() -> bool:
    return False


UNWATCHED = (_ignore, _go_on)
