"""Bounds of a model that events name, too.

Rule: nothing is imported here: a broker counts on these numbers and needs no arrays.
"""

from __future__ import annotations

from typing import Final

__all__ = ["NAME_CHARACTERS_MAX", "TENSORS_MAX"]

TENSORS_MAX: Final = 4096
NAME_CHARACTERS_MAX: Final = 256
"""Of a tensor's name."""
