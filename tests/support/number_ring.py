"""Polynomials modulo X^N + 1 and a prime, as OpenFHE holds them: for tests that attack.

Rule: exact, in Python's whole numbers. Limbs are the values at the primitive roots, in the order
of OpenFHE's transform; coefficients are centred around 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NumberRing"]

Whole = NDArray[Any]  # of Python's int
Limbs = NDArray[np.uint64]


class NumberRing:
    """The transform between both, for N a power of two and q 1 modulo 2N."""

    def __init__(self, dimension: int, modulus: int) -> None:
        self.dimension, self.modulus = dimension, modulus
        bits = dimension.bit_length() - 1
        root = self._smallest_root()
        powers = [1]
        for _ in range(dimension - 1):
            powers.append(powers[-1] * root % modulus)
        order = [int(f"{place:0{bits}b}"[::-1], 2) for place in range(dimension)]
        self._roots = np.array([powers[place] for place in order], object)
        inverses = [pow(powers[place], -1, modulus) for place in order]
        self._inverses = np.array(inverses, object)

    def limbs(self, coefficients: Any) -> Limbs:
        """The limbs of a polynomial with these whole coefficients, (N,)."""
        found = np.array([int(one) for one in coefficients], object) % self.modulus
        groups = 1
        while groups < self.dimension:
            split = found.reshape(groups, 2, -1)
            high = split[:, 1] * self._roots[groups : 2 * groups, None]
            found = np.stack([split[:, 0] + high, split[:, 0] - high], 1).reshape(-1)
            found %= self.modulus
            groups *= 2
        return found.astype(np.uint64)

    def coefficients(self, limbs: Any) -> Whole:
        """The coefficients of the polynomial with these limbs, each within half the modulus."""
        found, groups = np.asarray(limbs).astype(object), self.dimension // 2
        while groups:
            split = found.reshape(groups, 2, -1)
            low = split[:, 0] + split[:, 1]
            high = (split[:, 0] - split[:, 1]) * self._inverses[groups : 2 * groups, None]
            found = np.stack([low, high], 1).reshape(-1) % self.modulus
            groups //= 2
        found = found * pow(self.dimension, -1, self.modulus) % self.modulus
        return np.where(found > self.modulus // 2, found - self.modulus, found)

    def times(self, one: Any, other: Any) -> Limbs:
        """The limbs of a product, of limbs."""
        product = np.asarray(one).astype(object) * np.asarray(other).astype(object)
        return (product % self.modulus).astype(np.uint64)

    def quotient(self, one: Any, other: Any) -> Limbs:
        return self.times(one, [pow(int(limb), -1, self.modulus) for limb in other])

    def plus(self, *terms: Any) -> Limbs:
        return (sum(np.asarray(one).astype(object) for one in terms) % self.modulus).astype(
            np.uint64
        )

    def minus(self, one: Any, other: Any) -> Limbs:
        difference = np.asarray(one).astype(object) - np.asarray(other).astype(object)
        return (difference % self.modulus).astype(np.uint64)

    def _smallest_root(self) -> int:
        """Of X^N + 1, which OpenFHE takes."""
        order, modulus = 2 * self.dimension, self.modulus
        tried = (pow(base, (modulus - 1) // order, modulus) for base in range(2, 1000))
        root = next(one for one in tried if pow(one, self.dimension, modulus) == modulus - 1)
        return min(pow(root, odd, modulus) for odd in range(1, order, 2))
