"""Who may upload what: the open tasks, and what an update for each must look like.

Rule: only the learner that holds an open task uploads for it, and its update has the manifest of
the model that it was asked to train. A refusal says in words what was found and what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from metisfl.controller.store import ModelStore
from metisfl.proto.bulk import Code, Open
from metisfl.proto.errors import PeerError
from metisfl.proto.model_pb2 import Encryption, Manifest
from metisfl.proto.tensors import (
    MANIFEST_BYTES_MAX,
    compare_manifests,
    encrypted_manifest,
    float_specs,
    is_encrypted,
    parse_manifest,
    serialise_manifest,
)

__all__ = ["REJECTED_MAX", "Admission", "Expected", "Refusal"]

SHARE_BYTES: Final = 128  # a name of 63, a weight, a digest of 32, and their frames
REJECTED_MAX: Final = 8  # updates of a task: each costs a look at up to 252 KiB of manifest
_parsed = lru_cache(maxsize=8)(parse_manifest)  # one model, many learners


@dataclass(frozen=True, slots=True)
class Expected:
    """An open task: whose it is and what its update must look like."""

    learner: str
    """The principal, `learner:<name>`."""
    model_digest: bytes | None = None
    """The model whose manifest the update must have; None takes any (the initial model)."""
    federation: bytes | None = None
    """`proto.chunk.federation_digest` of federation and run; None takes any."""
    stored_digest: bytes = b""
    """The digest of the update that is known to be stored already, if there is one."""
    encryption: Encryption | None = None
    """How the update must be encrypted (without exponents: they are all 0); None: it is plain."""
    learners: int = 0
    """How many may be in the sum, whose manifest names each of them."""


@dataclass(frozen=True, slots=True)
class Refusal:
    code: Code
    reason: str


class Admission:
    """Judges OPENs. Belongs to the endpoint's thread."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._rejected: dict[str, dict[bytes, Refusal]] = {}
        self._manifests: dict[bytes, bytes] = {}
        self.expected: Mapping[str, Expected] = MappingProxyType({})

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """These tasks are open, and no others."""
        self.expected = expected
        models = {one.model_digest for one in expected.values()}
        self._rejected = {key: value for key, value in self._rejected.items() if key in expected}
        self._manifests = {key: value for key, value in self._manifests.items() if key in models}

    def judge(self, frame: Open, principal: str) -> Refusal | None:
        """Why this learner may not upload this update now; None when it may."""
        expected = self.expected.get(frame.task_id)
        if expected is None:
            return closed(frame.task_id)
        if expected.learner != principal:
            return Refusal(Code.NOT_YOURS, f"task {frame.task_id} is not {principal}'s")
        if expected.federation not in (None, frame.federation):
            return Refusal(
                Code.OTHER_FEDERATION,
                f"task {frame.task_id} belongs to another federation or run than the update",
            )
        known = self._rejected.get(frame.task_id, {})
        if frame.digest in known or len(known) < REJECTED_MAX:
            return known.get(frame.digest)
        last = [*known.values()][-1]
        why = f"{len(known)} updates for task {frame.task_id} were refused; it gets no more chances"
        return Refusal(last.code, f"{why}. The last: {last.reason}")

    def remember(self, task_id: str, digest: bytes, refusal: Refusal) -> None:
        """This update was refused for what it is: it will be refused again at once, unread.

        So is every other one for this task after REJECTED_MAX different ones.
        """
        self._rejected.setdefault(task_id, {})[digest] = refusal

    def manifest(self, frame: Open) -> Manifest:
        """The checked manifest of an update that may be uploaded.

        Raises PeerError if it is not the model's, MachineError if the model is not here.
        """
        manifest = _parsed(frame.manifest)
        if frame.payload_bytes != manifest.payload_bytes:
            raise PeerError(
                f"OPEN announces {frame.payload_bytes} payload bytes and its manifest has "
                f"{manifest.payload_bytes}"
            )
        expected = self.expected[frame.task_id]
        model = manifest
        if expected.model_digest is not None:
            wanted_plain = self._manifest_of(expected.model_digest)
            if expected.encryption is None and frame.manifest == wanted_plain:
                return manifest
            model = _parsed(wanted_plain)
            if difference := compare_manifests(manifest, model):
                raise PeerError(difference)
        if difference := _other_form(manifest, expected.encryption):
            raise PeerError(difference)
        if expected.encryption is not None:
            sum_bytes = len(frame.manifest) + expected.learners * SHARE_BYTES
            if sum_bytes > MANIFEST_BYTES_MAX:
                raise PeerError(
                    f"the manifest has {len(frame.manifest)} bytes; with {expected.learners} "
                    f"learners that of a sum has {sum_bytes}, at most {MANIFEST_BYTES_MAX}: use "
                    "shorter tensor names or fewer tensors"
                )
        wanted = _update_manifest(model, expected.encryption)
        if serialise_manifest(wanted) != frame.manifest:
            raise PeerError("the update's manifest is not that of an update of this model")
        return manifest

    def _manifest_of(self, model_digest: bytes) -> bytes:
        if model_digest not in self._manifests:
            with self._store.open(model_digest) as model:
                self._manifests[model_digest] = model.manifest_bytes
        return self._manifests[model_digest]


def _update_manifest(model: Manifest, encryption: Encryption | None) -> Manifest:
    """The manifest that an update of `model` has."""
    if encryption is None:
        return model
    form = Encryption()
    form.CopyFrom(encryption)
    if not form.exponents:
        form.exponents.extend([0] * len(float_specs(model)))
    return encrypted_manifest(model, form)


def _other_form(manifest: Manifest, wanted: Encryption | None) -> str:
    """What differs in how the update is encrypted; "" if nothing does."""
    if wanted is None or not is_encrypted(manifest):
        words = {True: "encrypted", False: "plain"}
        have, want = words[is_encrypted(manifest)], words[wanted is not None]
        return "" if have == want else f"the update is {have} and this federation's are {want}"
    found = manifest.encryption
    for field in ("fingerprint", "limb_bits", "ring_dimension", "polynomials", "seeds", "opens"):
        here, there = getattr(found, field), getattr(wanted, field)
        if here != there:
            shown = [v.hex() if isinstance(v, bytes) else v for v in (here, there)]
            return (
                f"the update is encrypted with another key or in another form: its {field} is "
                f"{shown[0]}, the federation's is {shown[1]}"
            )
    exponents = list(wanted.exponents) or [0] * len(found.exponents)
    for name, here, there in zip(float_specs(manifest), found.exponents, exponents, strict=False):
        if here != there:
            return (
                f"the update's exponent of tensor {name.name!r} is {here}; this round's is {there}"
            )
    return ""


def closed(task_id: str) -> Refusal:
    return Refusal(
        Code.UNKNOWN_TASK, f"task {task_id} is not open: its round is over, or it never was"
    )
