"""status.py: what a broker tells of itself is bounded, and only a right answer is believed."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.broker.status import (
    EVENT_REFUSALS,
    OFFENDERS_MAX,
    PRINCIPALS_TOLD_MAX,
    REQUEST_REFUSALS,
    BrokerStatus,
    pack_status,
    parse_status,
)
from metisfl.proto.errors import PeerError
from metisfl.proto.frames import STATUS_BYTES_MAX

STATUS = BrokerStatus(
    incarnation=5,
    head=100,
    floor=7,
    log_bytes=8192,
    log_limit_bytes=2**32,
    disk_free_bytes=2**40,
    events_stored=93,
    events_refused=dict.fromkeys(EVENT_REFUSALS, 2),
    full_since_unix_ns=9,
    full_reason="no room",
    connections={"controller": 1, "learner:l1": 2},
    messages_dropped=3,
    insecure=True,
    requests_refused=dict.fromkeys(REQUEST_REFUSALS, 1),
    offenders={"learner:l1": 3},
)


def test_a_status_comes_back_as_it_was() -> None:
    assert parse_status(pack_status(STATUS)) == STATUS


def test_a_status_is_small_whoever_is_connected() -> None:
    many = {f"learner:{number:063}": 8 for number in range(60_000)}
    told = {"full_reason": "\u0000" * 100_000, "connections": many, "offenders": many}
    packed = pack_status(replace(STATUS, **told))  # type: ignore[arg-type]
    assert len(packed) <= STATUS_BYTES_MAX
    assert len(parse_status(packed).connections) == PRINCIPALS_TOLD_MAX
    assert len(parse_status(packed).offenders) == OFFENDERS_MAX


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"head": -1}, "'-1' for head"),
        ({"head": True}, "'True' for head"),
        ({"head": "7"}, "'7' for head"),
        ({"insecure": 1}, "'1' for insecure"),
        ({"full_reason": 7}, "'7' for full_reason"),
        ({"connections": []}, "'[]' for connections"),
        ({"events_refused": {"poison": "many"}}, "for events_refused"),
    ],
)
def test_a_wrong_status_is_refused_with_what_is_wrong(change: dict[str, object], told: str) -> None:
    right = json.loads(pack_status(STATUS))
    with pytest.raises(PeerError) as error:
        parse_status(json.dumps({**right, **change}).encode())
    assert told in str(error.value)
    del right["floor"]
    with pytest.raises(PeerError, match="for floor"):
        parse_status(json.dumps(right).encode())


@given(st.one_of(st.binary(max_size=200), st.just(b"[" * 100_000), st.text().map(str.encode)))
def test_no_bytes_raise_anything_but_a_peer_error(data: bytes) -> None:
    with suppress(PeerError):
        parse_status(data)
