"""An OpenFHE that does not do what MetisFL relies on is refused before it encrypts anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from metisfl.learner import crypto as module
from metisfl.learner.crypto import Crypto, generate
from metisfl.learner.openfhe_door import load_openfhe
from metisfl.proto import ckks
from metisfl.proto.errors import MachineError

RING = ckks.RING_DIMENSION
PUBLIC, SECRET = generate("standard", max_learners=4)


class Altered:
    """An object of OpenFHE, some of whose attributes are others; None: they are not there."""

    def __init__(self, real: Any, **changed: Any) -> None:
        self._real, self._changed = real, changed

    def __getattr__(self, name: str) -> Any:
        if self._changed.get(name, self) is None:
            raise AttributeError(name)
        return self._changed.get(name) or getattr(self._real, name)


def serialises(change: Callable[[bytes], bytes]) -> dict[str, Any]:
    real = load_openfhe()
    return {"Serialize": lambda thing, form: change(real.Serialize(thing, form))}


def in_context(**changed: Callable[[Any], Any]) -> dict[str, Any]:
    """`changed` make attributes of a context from the real one."""
    real = load_openfhe()

    def read(data: bytes, form: Any) -> Any:
        context = real.DeserializeCryptoContextString(data, form)
        return Altered(context, **{name: make(context) for name, make in changed.items()})

    return {"DeserializeCryptoContextString": read}


def after(count: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Leave the first `count` objects as they are."""
    seen: list[int] = []

    def maybe(data: bytes) -> bytes:
        seen.append(len(data))
        return change(data) if len(seen) > count else data

    return maybe


def without_secret_keys(context: Any) -> Any:
    def encrypt(key: Any, plain: Any) -> Any:
        if type(key).__name__ == "PrivateKey":
            raise TypeError("Encrypt(): incompatible function arguments")
        return context.Encrypt(key, plain)

    return encrypt


def wrong_with_public_keys(context: Any) -> Any:
    def encrypt(key: Any, plain: Any) -> Any:
        found = context.Encrypt(key, plain)
        return context.EvalAdd(found, found) if type(key).__name__ == "PublicKey" else found

    return encrypt


def refusing(_: Any) -> Any:
    def decrypt(*_: Any) -> Any:
        raise RuntimeError("not like this")

    return decrypt


def reversed_limbs(data: bytes) -> bytes:
    """Both polynomials of a ciphertext and that of a key, back to front."""
    modulus = PUBLIC.modulus.to_bytes(8, "little")
    out, end = bytearray(data), 0
    while (place := data.find(modulus, end)) >= 0:
        start, end = place - 8 * RING, place + 8
        if start > 500 and data[start - 8 : start] == RING.to_bytes(8, "little"):
            limbs = np.frombuffer(data, "<u8", RING, start)
            out[start:place] = limbs[::-1].tobytes()
    return bytes(out)


OTHERS = {
    "writes more": (lambda: serialises(lambda data: data + b"\0"), "behind the end"),
    "writes less": (lambda: serialises(lambda data: data[:-8]), "beyond the end"),
    "keeps limbs in another order": (lambda: serialises(reversed_limbs), "a sum came back wrong"),
    "writes at several lengths": (
        lambda: serialises(after(4, lambda data: data + b"\0")),
        "objects of one kind have several lengths",
    ),
    "writes in several forms": (
        lambda: serialises(after(4, lambda data: data[:-1] + b"\7")),
        "objects of one kind differ in more than their limbs",
    ),
    "has no secret-key encryption": (
        lambda: in_context(Encrypt=without_secret_keys),
        "Encrypt(): incompatible function arguments",
    ),
    "encrypts otherwise with the public key": (
        lambda: in_context(Encrypt=wrong_with_public_keys),
        "a sum came back wrong",
    ),
    "cannot encode arrays": (
        lambda: in_context(MakeCKKSPackedPlaintext=lambda _: None),
        "MakeCKKS",
    ),
    "refuses to decrypt": (lambda: in_context(Decrypt=refusing), "not like this"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_an_openfhe_that_works_otherwise_is_refused_when_the_key_is_loaded(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, words = OTHERS[how]
    altered = Altered(load_openfhe(), **changed())
    monkeypatch.setattr(module, "load_openfhe", lambda: altered)
    with pytest.raises(MachineError) as refusal:
        Crypto(PUBLIC, SECRET)
    text = str(refusal.value)
    assert words in text
    assert "OpenFHE 1." in text, "the version found"
    assert "1.6.1 does: install it with `pip install metisfl[fhe]`" in text


@pytest.mark.parametrize("name", ["reseed", "seal_block"])
def test_what_c_makes_of_the_limbs_is_proved_too(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a polynomial were multiplied, or written, in another order than OpenFHE's."""
    real = getattr(module.native, name)

    def altered(context: Any, *arguments: Any, **named: Any) -> None:
        real(context, *arguments, **named)
        if name == "reseed":
            arguments[0][:] = arguments[0][:, ::-1].copy()
        else:
            real(context, **{**named, "c0": named["c0"][:, ::-1].copy()})

    monkeypatch.setattr(module.native, name, altered)
    with pytest.raises(MachineError, match=r"a sum came back wrong by .*; 1.6.1 does: install"):
        Crypto(PUBLIC, SECRET)


@pytest.mark.parametrize("changed", [{"modulus": PUBLIC.modulus - 2}, {"ring_dimension": 1024}])
def test_a_key_whose_ring_is_not_that_of_its_context_is_refused(changed: dict[str, int]) -> None:
    public = replace(PUBLIC, **changed)
    with pytest.raises(MachineError, match=f"a ring of 2048 modulo {PUBLIC.modulus}; the key has"):
        Crypto(public, replace(SECRET, fingerprint=public.fingerprint))


def test_an_openfhe_without_complex_slots_makes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    altered = Altered(load_openfhe(), COMPLEX=None)
    monkeypatch.setattr(module, "load_openfhe", lambda: altered)
    with pytest.raises(MachineError, match="does not do what MetisFL relies on"):
        generate("standard", max_learners=4)


def test_a_machine_without_openfhe_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "openfhe", None)
    with pytest.raises(MachineError, match=r"Python 3.10, or 3.12 with glibc 2.38"):
        load_openfhe()


ASK_OPENMP = """
import ctypes, os
from metisfl.learner.openfhe_door import load_openfhe
load_openfhe()
print(ctypes.CDLL("libgomp.so.1").omp_get_max_threads(), os.environ.get("OMP_NUM_THREADS"))
"""


@pytest.mark.parametrize(("asked", "found"), [(None, "1 None"), ("3", "3 3")])
def test_openfhe_gets_one_thread_of_its_own_unless_the_operator_says_otherwise(
    asked: str | None, found: str
) -> None:
    """Only OpenFHE: what else this process loads or starts may use what it finds."""
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ran = subprocess.run(
        [sys.executable, "-Ic", ASK_OPENMP],
        env=given | ({} if asked is None else {"OMP_NUM_THREADS": asked}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout.strip() == found, ran.stderr
