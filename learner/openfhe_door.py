"""OpenFHE, and the way in and out of its objects: their bytes.

Rule 1: the only file that imports OpenFHE. What it does not do as relied on is said with the
release that does.
Rule 2: what arrives becomes limbs in an object of our own making; OpenFHE never reads a byte from
elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from metisfl.learner.ciphertext_layout import Layout
from metisfl.proto.errors import MachineError

__all__ = ["OPENFHE_KNOWN", "Template", "another_openfhe", "load_openfhe", "new_context", "version"]

OPENFHE_KNOWN: Final = "1.6.1"
"""The release that the extra `fhe` installs."""
OPENMP_THREADS: Final = "OMP_NUM_THREADS"

Limbs = NDArray[np.uint64]


def load_openfhe() -> ModuleType:
    """The openfhe package. Raises MachineError where it is missing."""
    # Its threads split a ciphertext by towers, of which there is one; ours are faster. It asks
    # once; what an application starts later is none of our business.
    asked = os.environ.get(OPENMP_THREADS)
    os.environ.setdefault(OPENMP_THREADS, "1")
    try:
        import openfhe
    except ImportError as error:
        raise MachineError(
            f"OpenFHE cannot be loaded ({error}); install it with `pip install metisfl[fhe]`, on "
            "Python 3.10, or 3.12 with glibc 2.38, and libgomp1"
        ) from None
    finally:
        if asked is None:
            del os.environ[OPENMP_THREADS]
    return openfhe  # type: ignore[no-any-return]


def new_context(
    openfhe: ModuleType, limb_bits: int, scaling_bits: int, *, joint: bool = False
) -> Any:
    """A context of one modulus and depth 0; `joint`: for keys that several sites make together."""
    settings = openfhe.CCParamsCKKSRNS()
    settings.SetMultiplicativeDepth(0)
    settings.SetFirstModSize(limb_bits)
    settings.SetScalingModSize(scaling_bits)
    settings.SetSecurityLevel(openfhe.HEStd_128_classic)
    settings.SetScalingTechnique(openfhe.FLEXIBLEAUTO)
    settings.SetKeySwitchTechnique(openfhe.BV)  # without the keys of the other, N is half
    settings.SetCKKSDataType(openfhe.COMPLEX)
    context = openfhe.GenCryptoContext(settings)
    context.Enable(openfhe.PKE)
    context.Enable(openfhe.LEVELEDSHE)
    if joint:
        context.Enable(openfhe.MULTIPARTY)
    return context


@dataclass(frozen=True, slots=True)
class Template:
    """An object of ours: its bytes, and where its limbs are."""

    data: bytes
    layout: Layout

    def limbs(self, data: bytes) -> list[Limbs]:
        """The limbs of an object that differs from the template in nothing else.

        Cheaper than parsing each. Raises MachineError.
        """
        size = self.layout.polynomial_bytes
        if len(data) != len(self.data):
            raise another_openfhe("objects of one kind have several lengths")
        end = 0
        for place in (*self.layout.polynomials, len(data)):
            if data[end:place] != self.data[end:place]:
                raise another_openfhe("objects of one kind differ in more than their limbs")
            end = place + size
        ring = self.layout.ring_dimension
        return [np.frombuffer(data, "<u8", ring, place) for place in self.layout.polynomials]

    def with_limbs(self, polynomials: Iterable[Limbs]) -> bytes:
        """The template with these limbs."""
        data = bytearray(self.data)
        for place, limbs in zip(self.layout.polynomials, polynomials, strict=True):
            data[place : place + limbs.nbytes] = limbs.tobytes()
        return bytes(data)


def version() -> str:
    """The installed release, for messages."""
    try:
        return metadata.version("openfhe")
    except metadata.PackageNotFoundError:
        return "without a version"


def another_openfhe(what: object) -> MachineError:
    """The installed OpenFHE is not one that can be relied on."""
    return MachineError(
        f"OpenFHE {version()} does not do what MetisFL relies on ({what}); "
        f"{OPENFHE_KNOWN} does: install it with `pip install metisfl[fhe]`"
    )
