"""All targets by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fuzzed import databases, files, messages, transfers
from fuzzed.target import Target

__all__ = ["TARGETS"]

TARGETS: Final[Mapping[str, Target]] = MappingProxyType(
    {
        target.name: target
        for group in (messages, transfers, files, databases)
        for target in group.TARGETS
    }
)
