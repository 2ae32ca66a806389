"""Bounds of models and ceremonies that events name, too.

Rule: nothing is imported here: a broker counts on these numbers and needs no arrays.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "CEREMONY_BODY_BYTES_MAX",
    "CEREMONY_BYTES",
    "CEREMONY_STEPS",
    "NAME_CHARACTERS_MAX",
    "TENSORS_MAX",
]

TENSORS_MAX: Final = 4096
NAME_CHARACTERS_MAX: Final = 256
"""Of a tensor's name."""
CEREMONY_BYTES: Final = 16
"""Of a manifest's digest, by which a ceremony is known."""
CEREMONY_STEPS: Final = 5
CEREMONY_BODY_BYTES_MAX: Final = 128 * 1024
"""Of what a site says in one step."""
