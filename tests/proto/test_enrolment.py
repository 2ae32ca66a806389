"""enrolment.py: `J` and its answer have one form, and a fingerprint covers all that must agree."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.proto.enrolment import (
    ADMITTED,
    ANSWER_BYTES_MAX,
    REFUSED,
    WAITING,
    Answer,
    Ask,
    fingerprint,
    pack_answer,
    pack_ask,
    parse_answer,
    parse_ask,
)
from metisfl.proto.errors import PeerError

keys = st.binary(min_size=32, max_size=32).map(z85.encode)
messages = st.lists(
    st.sampled_from([b"J", b"P", b"", bytes(31), bytes(32), bytes(33)]) | st.binary(), max_size=5
)
A, B, C, D = (z85.encode(bytes([number] * 32)) for number in range(4))


@given(keys, keys)
def test_a_wish_arrives_as_it_was_sent(invitation: bytes, site: bytes) -> None:
    if invitation != site:
        ask = Ask(invitation, site)
        assert parse_ask(pack_ask(ask)) == ask


@given(messages)
def test_any_message_is_a_wish_or_a_peer_error(parts: list[bytes]) -> None:
    try:
        ask = parse_ask(parts)
    except PeerError:
        return
    assert pack_ask(ask) == parts


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([], "allows to ask for admission only"),
        ([b"H", b""], "allows to ask for admission only, not b'H'"),
        ([b"P", bytes(4), b"event"], "allows to ask for admission only"),
        ([b"J", bytes(32)], "2 parts; it has exactly 3"),
        ([b"J", bytes(32), bytes([1] * 32), b""], "4 parts"),
        ([b"J", bytes(31), bytes([1] * 32)], "31 bytes; it has exactly 32"),
        ([b"J", bytes(32), bytes([1] * 40)], "40 bytes; it has exactly 32"),
        ([b"J", bytes(32), bytes(32)], "cannot be the site's"),
    ],
)
def test_what_is_no_wish_is_named(parts: list[bytes], why: str) -> None:
    with pytest.raises(PeerError, match=why):
        parse_ask(parts)


@pytest.mark.parametrize("state", [WAITING, ADMITTED, REFUSED])
@given(reason=st.text(max_size=100))
def test_an_answer_arrives_as_it_was_sent(state: int, reason: str) -> None:
    assert parse_answer(pack_answer(Answer(state, reason))) == Answer(state, reason)


def test_a_reason_has_a_limit_and_is_cut_by_who_gives_it() -> None:
    answer = parse_answer(pack_answer(Answer(REFUSED, "é" * ANSWER_BYTES_MAX)))
    assert len(answer.reason) <= ANSWER_BYTES_MAX
    with pytest.raises(PeerError, match="2049 bytes; at most 2048"):
        parse_answer([b"J", bytes([REFUSED]), bytes(ANSWER_BYTES_MAX + 1)])


@given(messages)
def test_any_message_is_an_answer_or_a_peer_error(parts: list[bytes]) -> None:
    try:
        answer = parse_answer(parts)
    except PeerError:
        return
    assert answer.state in (WAITING, ADMITTED, REFUSED)


def test_a_state_of_a_later_version_is_named() -> None:
    with pytest.raises(PeerError, match="state 9, unknown here; its version is another"):
        parse_answer([b"J", b"\x09", b""])


def test_a_fingerprint_is_five_groups_of_four_that_can_be_read_aloud() -> None:
    shown = fingerprint("learner:ada", site=A, broker=B, controller=C)
    assert re.fullmatch(r"([A-Z2-7]{4}-){4}[A-Z2-7]{4}", shown)
    assert shown == "HWU2-QHRY-4KI6-QKH3-TFAS", "two versions would show two fingerprints"


def test_a_fingerprint_changes_with_whatever_must_agree() -> None:
    """Also with the servers' keys: a site led elsewhere by another code reads out another one."""
    same = {"site": A, "broker": B, "controller": C}
    variants = [same, {**same, "site": D}, {**same, "broker": D}, {**same, "controller": D}]
    variants.append({"site": A, "broker": C, "controller": B})
    shown = [fingerprint("learner:ada", **variant) for variant in variants]
    shown += [fingerprint(who, **same) for who in ("learner:adb", "driver:ada")]
    assert len(set(shown)) == len(shown)
