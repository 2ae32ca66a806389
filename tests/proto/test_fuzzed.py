"""What fuzzers found, and what was found while they were written (see tests/fuzz)."""

from __future__ import annotations

import struct
import zlib

import msgpack
import numpy as np
import pytest
from example_key import PUBLIC

from metisfl.proto import ckks
from metisfl.proto.ckks_key import PUBLIC_MAGIC, PublicPart
from metisfl.proto.errors import MachineError, PeerError
from metisfl.proto.live_frames import HEADER_MAGIC, Header, pack_header, parse_header, parse_live
from metisfl.proto.model_pb2 import Encryption, Share
from metisfl.proto.records import unpack_record
from metisfl.proto.tensors import (
    Tensor,
    encrypted_manifest,
    manifest_of,
    parse_manifest,
    serialise_manifest,
)

RECORD = {
    "version": 2,
    "run_id": "r",
    "round": 1,
    "previous": b"",
    "model_digest": bytes(32),
    "opened_ns": 1,
    "closed_ns": 2,
    "evaluated_ns": 3,
    "invited": ["ada"],
    "counted": [
        {
            "learner": "ada",
            "weight": 1.0,
            "update_digest": bytes(32),
            "examples": 10,
            "training_s": 0.5,
            "metrics": {"loss": 0.5},
        }
    ],
    "missing": [{"learner": "bob", "kind": "late", "reason": ""}],
    "evaluation": {"ada": {"test.loss": 0.5}},
    "unevaluated": [],
    "metrics": {"test.loss": 0.5},
}


@pytest.mark.parametrize("field", range(1, 6))
def test_a_number_beyond_sqlite_is_no_record_of_a_log(field: int) -> None:
    """It would end the reader that keeps it as its place in the log."""
    numbers = [zlib.crc32(b""), 1, 1, 0, 0, 1]
    numbers[field] = 2**63
    with pytest.raises(PeerError, match=f"holds {2**63}; at most {2**63 - 1}"):
        parse_header(struct.pack("<HHIQQQQQ", HEADER_MAGIC, 0, *numbers), b"")


@pytest.mark.parametrize("topic", [b"f/done/\xff/", b"f" * 161])
def test_a_live_record_has_a_topic_that_a_reader_can_read(topic: bytes) -> None:
    header = pack_header(Header(zlib.crc32(b""), 1, 1, 0, 0, 1))
    assert parse_live([b"f/done/ada/", header, b""])
    with pytest.raises(PeerError, match="has the topic b'f"):
        parse_live([topic, header, b""])


@pytest.mark.parametrize("field", sorted(set(RECORD) - {"version"}))
def test_a_round_record_has_fields_of_their_types(field: str) -> None:
    unpack_record(msgpack.packb(RECORD))
    for value in (None, [None], {"ada": {"loss": "low"}}, {"ada": None}):
        with pytest.raises(MachineError, match="no round record"):
            unpack_record(msgpack.packb({**RECORD, field: value}))


def test_a_model_has_no_more_shares_than_a_federation_learners() -> None:
    form = Encryption(
        fingerprint=bytes(16), limb_bits=44, ring_dimension=2048, polynomials=1, seeds=2
    )
    form.exponents.append(0)
    model = manifest_of([Tensor("w", np.zeros(3, np.float32), True)])
    for number in range(ckks.LEARNERS_MAX + 1):
        form.shares.append(Share(learner=f"l{number:04}", weight=1, update_digest=bytes(32)))
    with pytest.raises(PeerError, match=f"{ckks.LEARNERS_MAX + 1} shares; at most"):
        parse_manifest(serialise_manifest(encrypted_manifest(model, form)))
    del form.shares[0]
    assert parse_manifest(serialise_manifest(encrypted_manifest(model, form)))


def test_a_name_that_comes_twice_does_not_fill_the_log() -> None:
    model = manifest_of([Tensor("w", np.zeros(3, np.float32), True)])
    model.tensors[0].name = "w" * 50_000
    model.tensors.append(model.tensors[0])
    with pytest.raises(PeerError, match="names must be unique") as raised:
        parse_manifest(serialise_manifest(model))
    assert len(str(raised.value)) < 200


def test_a_list_in_a_key_is_refused_as_a_field() -> None:
    fields = msgpack.unpackb(PUBLIC.pack()[8:])
    for value in ([1, 2], {"profile": 1}, [[]] * 1000):
        with pytest.raises(PeerError, match="damaged"):
            PublicPart.parse(PUBLIC_MAGIC + msgpack.packb({**fields, "profile": value}))
