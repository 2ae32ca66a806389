"""How an update must be encrypted is the round's to say, down to each tensor's exponent."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from example_key import PUBLIC, public_part
from random_updates import EXPONENTS, TENSORS, update_manifest, write_community

from metisfl.controller.admission import Admission, Expected
from metisfl.controller.store import ModelStore
from metisfl.proto.bulk import Open
from metisfl.proto.chunk import federation_digest
from metisfl.proto.errors import PeerError
from metisfl.proto.model_file import write_model
from metisfl.proto.model_pb2 import Encryption, Manifest, Share
from metisfl.proto.tensors import encrypted_manifest, manifest_of, serialise_manifest

FEDERATION = federation_digest("demo", "run-1")
FORM = PUBLIC.update_form(EXPONENTS)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "models")


@pytest.fixture
def expected(store: ModelStore, tmp_path: Path) -> Expected:
    """An update of an encrypted community model."""
    model = write_community(store, tmp_path)
    return Expected("learner:ada", model, FEDERATION, encryption=FORM)


@pytest.fixture
def admission(store: ModelStore, expected: Expected) -> Admission:
    admission = Admission(store)
    admission.expect({"t": expected})
    return admission


def an_open(manifest: Manifest) -> Open:
    content = serialise_manifest(manifest)
    return Open("t", FEDERATION, bytes(32), manifest.payload_bytes, content)


def in_form(**fields: int) -> Manifest:
    """The manifest of an update in another encrypted form."""
    form = Encryption()
    form.CopyFrom(FORM)
    for name, value in fields.items():
        setattr(form, name, value)
    return encrypted_manifest(manifest_of(TENSORS), form)


def test_an_update_of_the_community_model_in_the_rounds_form_is_welcome(
    admission: Admission,
) -> None:
    assert admission.manifest(an_open(update_manifest())) == update_manifest()


def test_the_model_may_be_plain_or_encrypted_and_the_update_is_encrypted(
    admission: Admission, store: ModelStore, expected: Expected
) -> None:
    draft = store.draft(0)
    plain = store.put(draft, write_model(draft, TENSORS))
    for digest in (plain, expected.model_digest):
        admission.expect({"t": replace(expected, model_digest=digest)})
        admission.manifest(an_open(update_manifest()))
        with pytest.raises(PeerError, match="update is plain and this federation's are encrypted"):
            admission.manifest(an_open(manifest_of(TENSORS)))
    for digest in (plain, None):
        admission.expect({"t": replace(expected, model_digest=digest, encryption=None)})
        admission.manifest(an_open(manifest_of(TENSORS)))
        with pytest.raises(PeerError, match="update is encrypted and this federation's are plain"):
            admission.manifest(an_open(update_manifest()))


def test_an_update_for_another_key_is_refused_with_both_fingerprints(
    admission: Admission,
) -> None:
    other = public_part(public_key=b"another")
    words = (
        "encrypted with another key or in another form: its fingerprint is "
        f"{other.fingerprint.hex()}, the federation's is {PUBLIC.fingerprint.hex()}"
    )
    with pytest.raises(PeerError, match=words):
        admission.manifest(an_open(update_manifest(other)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"limb_bits": 48}, "its limb_bits is 48, the federation's is 44"),
        ({"ring_dimension": 4096}, "its ring_dimension is 4096, the federation's is 2048"),
        ({"seeds": 2}, "its seeds is 2, the federation's is 1"),
        ({"polynomials": 2, "seeds": 0}, "its polynomials is 2, the federation's is 1"),
    ],
)
def test_an_update_in_another_form_is_refused_with_what_differs(
    admission: Admission, fields: dict[str, int], words: str
) -> None:
    with pytest.raises(PeerError, match=words):
        admission.manifest(an_open(in_form(**fields)))


def test_a_partial_is_one_of_the_closed_model_and_of_no_other(
    admission: Admission, expected: Expected
) -> None:
    """What a site gave in an earlier round opens nothing in this one."""
    model = expected.model_digest
    assert model is not None
    asked = PUBLIC.partial_form(EXPONENTS, model)
    admission.expect({"t": replace(expected, encryption=asked)})
    partial = encrypted_manifest(manifest_of(TENSORS), asked)
    assert admission.manifest(an_open(partial)) == partial
    for form, words in (
        (PUBLIC.partial_form(EXPONENTS, bytes(32)), f"its opens is {'00' * 32}"),
        (FORM, "its fingerprint is"),
    ):
        with pytest.raises(PeerError, match=words):
            admission.manifest(an_open(encrypted_manifest(manifest_of(TENSORS), form)))


@pytest.mark.parametrize(
    ("the_rounds", "found", "words"),
    [
        (EXPONENTS, (0, 4), "exponent of tensor 'b' is 4; this round's is 3"),
        (EXPONENTS, (1, 4), "exponent of tensor 'w' is 1; this round's is 0"),
        ((), (0, 3), "exponent of tensor 'b' is 3; this round's is 0"),
    ],
)
def test_an_update_with_other_exponents_than_the_rounds_is_refused(
    admission: Admission,
    expected: Expected,
    the_rounds: Sequence[int],
    found: Sequence[int],
    words: str,
) -> None:
    """Its values would be off by a power of two in the sum, and nobody could tell."""
    form = PUBLIC.update_form(the_rounds)
    admission.expect({"t": replace(expected, encryption=form)})
    with pytest.raises(PeerError, match=words):
        admission.manifest(an_open(update_manifest(exponents=found)))


@pytest.mark.parametrize("exponents", [(0,), (5,)])
def test_the_initial_model_may_be_of_any_tensors(
    admission: Admission, expected: Expected, exponents: tuple[int, ...]
) -> None:
    """At first with exponents of 0; once it did not fit, with those that it needs."""
    form = PUBLIC.update_form(exponents if any(exponents) else ())
    admission.expect({"t": replace(expected, model_digest=None, encryption=form)})
    manifest = update_manifest(tensors=TENSORS[:2], exponents=exponents)
    assert admission.manifest(an_open(manifest)) == manifest


def claim(manifest: Manifest) -> None:
    manifest.encryption.shares.append(Share(learner="ada", weight=1.0, update_digest=bytes(32)))


def untrain(manifest: Manifest) -> None:
    manifest.tensors[0].trainable = False


def rename(manifest: Manifest) -> None:
    manifest.tensors[2].name = "bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (claim, "the update's manifest is not that of an update of this model"),
        (untrain, "tensor 'w' is not trainable here and trainable in the federation"),
        (rename, "tensor 'bias' exists here and not in the federation"),
    ],
)
def test_an_update_is_of_the_models_tensors_and_claims_nobody_elses(
    admission: Admission, change: Callable[[Manifest], None], words: str
) -> None:
    manifest = update_manifest()
    change(manifest)
    with pytest.raises(PeerError, match=re.escape(words)):
        admission.manifest(an_open(manifest))
