"""The sum of encrypted updates, block by block, without any key.

Rule 1: updates are added in the order given, which is the order of learner names; so every restart
makes the same file.
Rule 2: memory is a few blocks, whatever the size of the model and the number of updates.
Rule 3: what the sum needs to be read is in its manifest: the exponents, and who is in it with which
weight. The division is done by those who hold the key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from metisfl.controller.state import Terms
from metisfl.controller.store import ModelStore
from metisfl.native_c.ckks import BlockError, Context, fold_payloads
from metisfl.proto import ckks
from metisfl.proto.chunk import exponents_of
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import MachineError, MetisError
from metisfl.proto.model_file import ModelFile, ModelWriter, open_model
from metisfl.proto.model_pb2 import Encryption, Manifest, Share
from metisfl.proto.tensors import encrypted_manifest, encrypted_values, serialise_manifest

__all__ = [
    "EncryptedUpdate",
    "UnusableUpdate",
    "context_of",
    "contexts_of",
    "fold_encrypted",
    "partial_form_of",
    "terms_of",
]


class UnusableUpdate(MetisError):
    """One of the updates cannot be part of the sum; the others can.

    It was checked when it came: its disk has spoilt it since, or it has the seed of another one.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position


@dataclass(frozen=True, slots=True)
class EncryptedUpdate:
    """One learner's update file, and the weight that the learner multiplied its values by."""

    path: Path
    learner: str
    weight: float
    digest: bytes


def context_of(public: PublicPart, *, partials: bool = False) -> Context:
    """What the C library must know of a key to add what is encrypted with it, or partials."""
    fingerprint = public.partial_fingerprint if partials else public.fingerprint
    return Context(fingerprint, public.limb_bits, public.ring_dimension, public.modulus)


def contexts_of(public: PublicPart | None) -> tuple[Context, ...]:
    """The kinds of blocks that sites send under a key."""
    if public is None:
        return ()
    updates = context_of(public)
    return (updates, context_of(public, partials=True)) if public.is_joint else (updates,)


def partial_form_of(public: PublicPart, store: ModelStore, model_digest: bytes) -> Encryption:
    """How a site's partial of a model in the store must look. Raises MachineError without it."""
    with store.open(model_digest) as model:
        return public.partial_form(model.manifest.encryption.exponents, model_digest)


def terms_of(public: PublicPart | None) -> Terms | None:
    """What the key asks of a round."""
    if public is None:
        return None
    return Terms(public.max_learners, public.min_contributors, public.max_share, public.sites)


def fold_encrypted(updates: Sequence[EncryptedUpdate], context: Context, target: Path) -> bytes:
    """Write the sum of `updates` to `target` and return its digest.

    All files had the same manifest when they came. Raises UnusableUpdate and OSError, as for a full
    disk.
    """
    assert updates, "a fold of nothing"
    with ExitStack() as stack:
        models = [stack.enter_context(model) for model in _opened(updates)]
        first = models[0].manifest
        if any(model.manifest_bytes != models[0].manifest_bytes for model in models):
            raise _changed(models, updates)
        manifest = _sum_manifest(first, updates)
        form = manifest.encryption
        writer = stack.enter_context(ModelWriter(target, serialise_manifest(manifest)))
        try:
            fold_payloads(
                context,
                [model.read_payload_into for model in models],
                [1] * len(models),
                ciphertexts=ckks.ciphertexts(encrypted_values(manifest), form.ring_dimension),
                seeds=first.encryption.seeds,
                exponents_digest=exponents_of(manifest),
                polynomials=form.polynomials,
                write=writer.append,
            )
        except BlockError as error:
            raise UnusableUpdate(error.source, str(error)) from None
        return writer.commit()


def _opened(updates: Sequence[EncryptedUpdate]) -> Iterator[ModelFile]:
    for position, update in enumerate(updates):
        try:
            yield open_model(update.path)
        except (FileNotFoundError, MachineError) as error:
            raise UnusableUpdate(position, f"its file is gone or damaged: {error}") from None


def _changed(models: Sequence[ModelFile], updates: Sequence[EncryptedUpdate]) -> UnusableUpdate:
    """Which of the updates is not the one that came."""
    for position, (model, update) in enumerate(zip(models, updates, strict=True)):
        if model.digest() != update.digest:
            return UnusableUpdate(position, f"{model.path} has changed since it came")
    raise AssertionError("updates of different models")


def _sum_manifest(update: Manifest, updates: Sequence[EncryptedUpdate]) -> Manifest:
    """Few updates: their seeds travel with the sum, and learners rebuild the other half.

    Those of partials always do: they stand for masks, which only the sites can take off.
    """
    few = len(updates) <= ckks.SEEDS_FORWARDED or bool(update.encryption.opens)
    forwarded = few and update.encryption.polynomials == 1
    form = Encryption()
    form.CopyFrom(update.encryption)
    form.polynomials = 1 if forwarded else 2
    form.seeds = update.encryption.seeds * len(updates) if forwarded else 0
    for one in updates:
        form.shares.append(Share(learner=one.learner, weight=one.weight, update_digest=one.digest))
    return encrypted_manifest(update, form)
