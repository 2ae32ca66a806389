"""CKKS at a site: OpenFHE encrypts and decrypts; limbs go in and out through its serialisation.

Rule 1: what OpenFHE does is proved when a key is loaded: a sum that the C library folded must come
back exact, else this OpenFHE is refused.
Rule 2: a seed comes from the operating system, for one block, and is never used again under a key:
two updates with one seed would show their difference.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from metisfl.deploy.ckks_keys import PUBLIC_FILE, load_public, load_secret
from metisfl.learner.ciphertext_layout import Layout, parse_ciphertext, parse_secret_key
from metisfl.learner.openfhe_door import (
    Template,
    another_openfhe,
    load_openfhe,
    new_context,
    version,
)
from metisfl.learner.packing import coefficients_of, round_to_grid, slots_of
from metisfl.learner.partials import hide, reveal
from metisfl.native_c import ckks as native
from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart, SecretPart
from metisfl.proto.errors import MachineError, MetisError, PeerError, UserError

__all__ = ["Crypto", "generate"]

THREADS_MAX: Final = 4
SELF_TEST_LEARNERS: Final = 3

Floats = NDArray[np.float64]
Limbs = NDArray[np.uint64]


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
        context = new_context(openfhe, limb_bits, found.scaling_bits)
        pair = context.KeyGen()
    except (RuntimeError, TypeError, AttributeError) as problem:
        raise another_openfhe(problem) from problem
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
        site_names="",
        context=openfhe.Serialize(context, openfhe.BINARY),
        public_key=openfhe.Serialize(pair.publicKey, openfhe.BINARY),
    )
    secret = SecretPart(public.fingerprint, openfhe.Serialize(pair.secretKey, openfhe.BINARY))
    return public, secret


class Crypto:
    """A key's both parts, loaded and proved. Arrays have the shape (ciphertexts, N)."""

    def __init__(self, public: PublicPart, secret: SecretPart) -> None:
        """Raises MachineError for an OpenFHE that is missing or another, UserError for the key."""
        self._openfhe = load_openfhe()
        self.public = public
        self.context = native.Context(
            public.fingerprint, public.limb_bits, public.ring_dimension, public.modulus
        )
        self.partial_context = replace(self.context, fingerprint=public.partial_fingerprint)
        self._mask_key = secret.mask_key
        if secret.fingerprint != public.fingerprint:
            raise UserError("the secret part belongs to another key than the public part")
        if bool(secret.mask_key) != public.is_joint:
            raise UserError(
                "the secret part has a mask key, or lacks one, against what the public part says; "
                "take both from the folder in which they were made"
            )
        binary = self._openfhe.BINARY
        try:
            self._context = self._openfhe.DeserializeCryptoContextString(public.context, binary)
            self._public_key = self._openfhe.DeserializePublicKeyString(public.public_key, binary)
            self._secret_key = self._openfhe.DeserializePrivateKeyString(secret.secret_key, binary)
        except (RuntimeError, MemoryError) as error:
            raise UserError(
                f"OpenFHE {version()} cannot read this key ({error}); copy both parts again from "
                "the site that made it"
            ) from None
        self.threads = min(THREADS_MAX, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self.threads)
        try:
            self._secret = self._secret_limbs()
            self._by_secret = self._template(self._secret_key)
            self._by_public = self._template(self._public_key)
            (self._joint_self_test if public.is_joint else self._self_test)()
        except MachineError:
            raise
        except (MetisError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise another_openfhe(error) from error

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
        secret-key form a fresh seed stands for half of every ciphertext; in the public-key form,
        which is that of a joint key, both halves are there.
        """
        c0, c1 = np.empty(values.shape, np.uint64), np.empty(values.shape, np.uint64)
        public_key = public_key or self.public.is_joint
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
        place = {"index": index, "count": count}
        return self.decrypted(*self._opened(block, ciphertexts, exponents_digest, place))

    def partial_block(
        self,
        block: bytes | bytearray | memoryview,
        *,
        ciphertexts: int,
        exponents_digest: bytes,
        partials_digest: bytes,
        **place: int,
    ) -> bytearray:
        """This site's partial of a block of a model, masked. Raises BlockError.

        The digests are those that the blocks of the model and of its partials name.
        """
        _, c1 = self._opened(block, ciphertexts, exponents_digest, place)
        return hide(
            self.partial_context,
            self.partials(c1),
            self._mask_key,
            exponents_digest=partials_digest,
            **place,
        )

    def decrypt_jointly(
        self,
        block: bytes | bytearray | memoryview,
        partials: bytes | bytearray | memoryview,
        *,
        ciphertexts: int,
        exponents_digest: bytes,
        partials_digest: bytes,
        **place: int,
    ) -> Floats:
        """Decrypt a block, (ciphertexts, N), with the fold of all sites' partials of it.

        Raises BlockError, and PeerError if they are not those of all sites.
        """
        c0, _ = self._opened(block, ciphertexts, exponents_digest, place)
        sums, count = reveal(
            self.partial_context,
            partials,
            self._mask_key,
            ciphertexts=ciphertexts,
            exponents_digest=partials_digest,
            **place,
        )
        if count != len(self.public.sites):
            raise PeerError(
                f"the partials of {count} sites; the key has {len(self.public.sites)}, and all "
                "have to give theirs"
            )
        c0 += sums
        c0 %= np.uint64(self.public.modulus)
        return self.decrypted(c0, np.zeros_like(c0))

    def _opened(
        self, block: Any, ciphertexts: int, exponents_digest: bytes, place: dict[str, int]
    ) -> tuple[Limbs, Limbs]:
        shape = ciphertexts, self.public.ring_dimension
        c0, c1 = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
        native.open_block(
            self.context, block, exponents_digest=exponents_digest, c0=c0, c1=c1, **place
        )
        return c0, c1

    def decrypted(self, c0: Limbs, c1: Limbs) -> Floats:
        """What these ciphertexts hold, rounded to the grid. Of a c1 of zeros no key matters."""
        slots = np.empty((len(c0), c0.shape[1] // 2), np.complex128)

        def decrypt(row: int) -> None:
            plain = self._context.Decrypt(self._secret_key, self._object(c0[row], c1[row]))
            plain.SetLength(slots.shape[1])
            slots[row] = plain.GetCKKSPackedValueArray()

        list(self._threads.map(decrypt, range(len(c0))))
        values = coefficients_of(slots)
        self.to_grid(values)
        return values

    def partials(self, c1: Limbs, key: Any = None) -> Limbs:
        """c1 times this site's share of a joint key, flooded: each time with other noise.

        Whoever gets many of the same c1 averages the noise away, and has the share.
        """
        found = np.empty(c1.shape, np.uint64)
        share, zeros = key or self._secret_key, np.zeros(c1.shape[1], np.uint64)

        def decrypt(row: int) -> None:
            (one,) = self._context.MultipartyDecryptMain([self._object(zeros, c1[row])], share)
            data = self._openfhe.Serialize(one, self._openfhe.BINARY)
            layout = parse_ciphertext(data, 1)
            self._check_ring(layout)
            found[row] = np.frombuffer(data, "<u8", layout.ring_dimension, *layout.polynomials)

        list(self._threads.map(decrypt, range(len(c1))))
        return found

    def _object(self, c0: Limbs, c1: Limbs) -> Any:
        data = self._by_secret.with_limbs((c0, c1))
        return self._openfhe.DeserializeCiphertextString(data, self._openfhe.BINARY)

    def to_grid(self, values: Floats) -> None:
        """Round to the key's grid, in place."""
        round_to_grid(values, self.public.grid_bits)

    def _serialised(self, key: Any, slots: NDArray[np.complex128]) -> bytes:
        plain = self._context.MakeCKKSPackedPlaintext(slots)
        data: bytes = self._openfhe.Serialize(
            self._context.Encrypt(key, plain), self._openfhe.BINARY
        )
        return data

    def _template(self, key: Any) -> Template:
        slots = np.zeros(self.public.ring_dimension // 2, np.complex128)
        fresh = self._serialised(key, slots)
        layout = parse_ciphertext(fresh)
        self._check_ring(layout)
        return Template(fresh, layout)

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
                raise another_openfhe(f"a sum came back wrong by {off:.1e}")

    def _joint_self_test(self) -> None:
        """The same under the joint key of two shares that are made for it and thrown away."""
        digest = ckks.exponents_digest([0])
        shares = [self._context.MultipartyKeyGen(self._public_key, False, True) for _ in range(2)]
        first, second = (share.publicKey for share in shares)
        joint = self._context.MultiAddPubKeys(first, second, first.GetKeyTag())
        sent = np.random.default_rng(0).uniform(-1, 1, (2, self.public.ring_dimension))
        self.to_grid(sent)
        template, modulus = self._template(joint), np.uint64(self.public.modulus)
        sums = [
            sum(limbs) % modulus
            for limbs in zip(
                *(template.limbs(self._serialised(joint, slots)) for slots in slots_of(sent)),
                strict=True,
            )
        ]
        place = {"index": 0, "count": 1, "exponents_digest": digest}
        with native.Fold(self.partial_context) as fold:
            fold.begin(0, 1, 1, digest, 1)
            for share in shares:
                partial = self.partials(sums[1][None], share.secretKey)
                fold.absorb(hide(self.partial_context, partial, self._mask_key, **place))
            block = bytearray(fold.out_bytes)
            fold.finalise(block)
        opened, _ = reveal(self.partial_context, block, self._mask_key, ciphertexts=1, **place)
        c0 = (sums[0][None] + opened) % modulus
        off = float(np.abs(self.decrypted(c0, np.zeros_like(c0)) - sent.sum(axis=0)).max())
        if off:
            raise another_openfhe(f"a sum under a joint key came back wrong by {off:.1e}")
