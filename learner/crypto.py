"""CKKS at a site: OpenFHE encrypts and decrypts; limbs go in and out through its serialisation.

Rule 1: the only file that imports OpenFHE. What it does is proved when it is loaded: a sum that the
C library folded must come back exact, else this OpenFHE is refused.
Rule 2: a seed comes from the operating system, for one block, and is never used again under a key:
two updates with one seed would show their difference.
Rule 3: a ciphertext that arrives becomes limbs in a ciphertext of our own making; OpenFHE never
reads a byte from elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from metisfl.deploy.ckks_keys import PUBLIC_FILE, load_public, load_secret
from metisfl.learner.ciphertext_layout import Layout, parse_ciphertext, parse_secret_key
from metisfl.learner.packing import coefficients_of, round_to_grid, slots_of
from metisfl.native_c import ckks as native
from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart, SecretPart
from metisfl.proto.errors import MachineError, MetisError, PeerError, UserError

__all__ = ["Crypto", "generate", "load_openfhe"]

OPENFHE_KNOWN: Final = "1.6.1"
"""The release that the extra `fhe` installs."""
OPENMP_THREADS: Final = "OMP_NUM_THREADS"
THREADS_MAX: Final = 4
SELF_TEST_LEARNERS: Final = 3

Floats = NDArray[np.float64]
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


def generate(
    profile: str,
    *,
    max_learners: int,
    error: float = ckks.ERROR,
    min_contributors: int = 2,
    max_share: float = 0.95,
    verify: str = "none",
) -> tuple[PublicPart, SecretPart]:
    """Make a context and a key.

    Raises UserError if the profile cannot keep the error with so many learners, MachineError for
    an OpenFHE that is missing or another.
    """
    openfhe = load_openfhe()
    limb_bits = ckks.PROFILES[profile]
    found = ckks.parameters_for(limb_bits, max_learners)
    if found.grid_bits < 1 or found.error > error:
        better = ckks.smallest_profile(max_learners, error)
        raise UserError(
            f"profile {profile} with {max_learners} learners has an error of {found.error:.1e}, "
            f"above the {error:.1e} that is promised: take "
            + (f"profile {better}, or " if better else "")
            + "a key for fewer learners, or promise less"
        )
    try:
        context = _new_context(openfhe, limb_bits, found.scaling_bits)
        pair = context.KeyGen()
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise _another_openfhe(problem) from problem
    public = PublicPart(
        profile=profile,
        limb_bits=limb_bits,
        ring_dimension=context.GetRingDimension(),
        modulus=context.GetModulusCKKS(),
        scaling_bits=found.scaling_bits,
        grid_bits=found.grid_bits,
        max_learners=max_learners,
        error=error,
        min_contributors=min_contributors,
        max_share=max_share,
        verify=verify,
        context=openfhe.Serialize(context, openfhe.BINARY),
        public_key=openfhe.Serialize(pair.publicKey, openfhe.BINARY),
    )
    secret = SecretPart(public.fingerprint, openfhe.Serialize(pair.secretKey, openfhe.BINARY))
    return public, secret


def _new_context(openfhe: ModuleType, limb_bits: int, scaling_bits: int) -> Any:
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
    return context


@dataclass(frozen=True, slots=True)
class _Template:
    """A ciphertext of ours: its bytes, and where its limbs are."""

    data: bytes
    layout: Layout

    def limbs(self, data: bytes) -> list[Limbs]:
        """The limbs of a ciphertext that differs from the template in nothing else.

        Cheaper than parsing each. Raises MachineError.
        """
        size = self.layout.polynomial_bytes
        if len(data) != len(self.data):
            raise _another_openfhe("ciphertexts of one key have several lengths")
        end = 0
        for place in (*self.layout.polynomials, len(data)):
            if data[end:place] != self.data[end:place]:
                raise _another_openfhe("ciphertexts of one key differ in more than their limbs")
            end = place + size
        ring = self.layout.ring_dimension
        return [np.frombuffer(data, "<u8", ring, place) for place in self.layout.polynomials]

    def with_limbs(self, polynomials: Iterable[Limbs]) -> bytes:
        """The template with these limbs."""
        data = bytearray(self.data)
        for place, limbs in zip(self.layout.polynomials, polynomials, strict=True):
            data[place : place + limbs.nbytes] = limbs.tobytes()
        return bytes(data)


def _version() -> str:
    try:
        return metadata.version("openfhe")
    except metadata.PackageNotFoundError:
        return "without a version"


def _another_openfhe(what: object) -> MachineError:
    return MachineError(
        f"OpenFHE {_version()} does not do what MetisFL relies on ({what}); "
        f"{OPENFHE_KNOWN} does: install it with `pip install metisfl[fhe]`"
    )


class Crypto:
    """A key's both parts, loaded and proved. Arrays have the shape (ciphertexts, N)."""

    def __init__(self, public: PublicPart, secret: SecretPart) -> None:
        """Raises MachineError for an OpenFHE that is missing or another, UserError for the key."""
        self._openfhe = load_openfhe()
        self.public = public
        self.context = native.Context(
            public.fingerprint, public.limb_bits, public.ring_dimension, public.modulus
        )
        if secret.fingerprint != public.fingerprint:
            raise UserError("the secret part belongs to another key than the public part")
        binary = self._openfhe.BINARY
        try:
            self._context = self._openfhe.DeserializeCryptoContextString(public.context, binary)
            self._public_key = self._openfhe.DeserializePublicKeyString(public.public_key, binary)
            self._secret_key = self._openfhe.DeserializePrivateKeyString(secret.secret_key, binary)
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"OpenFHE {_version()} cannot read this key ({error}); copy both parts again from "
                "the site that made it"
            ) from None
        self.threads = min(THREADS_MAX, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self.threads)
        try:
            self._secret = self._secret_limbs()
            self._by_secret = self._template(self._secret_key)
            self._by_public = self._template(self._public_key)
            self._self_test()
        except MachineError:
            raise
        except (MetisError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise _another_openfhe(error) from error

    @classmethod
    def load(cls, folder: Path) -> Crypto:
        """Load public.ckks and secret.ckks of a keys folder. Raises UserError, MachineError."""
        public = load_public(folder)
        if public is None:
            raise UserError(
                f"{folder / PUBLIC_FILE} does not exist; copy it from the site that made the key"
            )
        return cls(public, load_secret(folder))

    def encrypt_block(
        self,
        values: Floats,
        *,
        index: int,
        count: int,
        exponents_digest: bytes,
        public_key: bool = False,
    ) -> bytearray:
        """Encrypt grid values into block `index` of `count`.

        `values` are multiples of 2^-grid_bits, at most the largest sum of weights. In the
        secret-key form a fresh seed stands for half of every ciphertext; in the public-key form
        both halves are there.
        """
        c0, c1 = np.empty(values.shape, np.uint64), np.empty(values.shape, np.uint64)
        key, template = self._secret_key, self._by_secret
        if public_key:
            key, template = self._public_key, self._by_public
        slots = slots_of(values)

        def encrypt(row: int) -> None:
            c0[row], c1[row] = template.limbs(self._serialised(key, slots[row]))

        list(self._threads.map(encrypt, range(len(values))))
        seed = None if public_key else os.urandom(native.SEED_BYTES)
        if seed is not None:
            native.reseed(self.context, c0, c1, self._secret, seed)
        polynomials, seeds = (2, 0) if seed is None else (1, 1)
        block = bytearray(native.block_bytes(self.context, len(values), polynomials, seeds))
        native.seal_block(
            self.context,
            index=index,
            count=count,
            exponents_digest=exponents_digest,
            c0=c0,
            c1=c1 if seed is None else None,
            seed=seed,
            out=block,
        )
        return block

    def decrypt_block(
        self,
        block: bytes | bytearray | memoryview,
        *,
        ciphertexts: int,
        index: int,
        count: int,
        exponents_digest: bytes,
    ) -> Floats:
        """Decrypt a block, (ciphertexts, N), rounded to the grid. Raises native_c's BlockError."""
        shape = ciphertexts, self.public.ring_dimension
        c0, c1 = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
        native.open_block(
            self.context,
            block,
            index=index,
            count=count,
            exponents_digest=exponents_digest,
            c0=c0,
            c1=c1,
        )
        slots = np.empty((shape[0], shape[1] // 2), np.complex128)

        def decrypt(row: int) -> None:
            data = self._by_secret.with_limbs((c0[row], c1[row]))
            found = self._openfhe.DeserializeCiphertextString(data, self._openfhe.BINARY)
            plain = self._context.Decrypt(self._secret_key, found)
            plain.SetLength(slots.shape[1])
            slots[row] = plain.GetCKKSPackedValueArray()

        list(self._threads.map(decrypt, range(ciphertexts)))
        values = coefficients_of(slots)
        self.to_grid(values)
        return values

    def to_grid(self, values: Floats) -> None:
        """Round to the key's grid, in place."""
        round_to_grid(values, self.public.grid_bits)

    def _serialised(self, key: Any, slots: NDArray[np.complex128]) -> bytes:
        plain = self._context.MakeCKKSPackedPlaintext(slots)
        data: bytes = self._openfhe.Serialize(
            self._context.Encrypt(key, plain), self._openfhe.BINARY
        )
        return data

    def _template(self, key: Any) -> _Template:
        slots = np.zeros(self.public.ring_dimension // 2, np.complex128)
        fresh = self._serialised(key, slots)
        layout = parse_ciphertext(fresh)
        self._check_ring(layout)
        return _Template(fresh, layout)

    def _secret_limbs(self) -> Limbs:
        data = self._openfhe.Serialize(self._secret_key, self._openfhe.BINARY)
        layout = parse_secret_key(data)
        self._check_ring(layout)
        return np.frombuffer(data, "<u8", layout.ring_dimension, layout.polynomials[0]).astype(
            np.uint64
        )

    def _check_ring(self, layout: Layout) -> None:
        found = layout.ring_dimension, layout.modulus
        if found != (self.public.ring_dimension, self.public.modulus):
            raise PeerError(
                f"a ring of {found[0]} modulo {found[1]}; the key has {self.public.ring_dimension} "
                f"and {self.public.modulus}"
            )

    def _self_test(self) -> None:
        """Encrypt, fold in C, decrypt, in all forms; exact on the grid. Raises MachineError."""
        digest = ckks.exponents_digest([0])
        learners = min(SELF_TEST_LEARNERS, self.public.max_learners)
        random = np.random.default_rng(0)
        sent = random.uniform(-1, 1, (learners, 1, self.public.ring_dimension))
        sent[:, 0, :2] = 1.0, -1.0  # the sum's extremes
        self.to_grid(sent)
        for public_key, polynomials in ((False, 1), (False, 2), (True, 2)):
            with native.Fold(self.context) as fold:
                fold.begin(0, 1, 1, digest, polynomials)
                for values in sent:
                    fold.absorb(
                        self.encrypt_block(
                            values,
                            index=0,
                            count=1,
                            exponents_digest=digest,
                            public_key=public_key,
                        )
                    )
                block = bytearray(fold.out_bytes)
                fold.finalise(block)
            found = self.decrypt_block(
                block, ciphertexts=1, index=0, count=1, exponents_digest=digest
            )
            noise = ckks.noise_bound(learners, public_key=True) if public_key else 0.0
            allowed = 2 * noise * 2.0**-self.public.scaling_bits
            off = float(np.abs(found - sent.sum(axis=0)).max())
            if not off <= allowed:
                raise _another_openfhe(f"a sum came back wrong by {off:.1e}")
