"""frames.py and envelope.py: what is packed comes back, and nothing else gets through."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto import frames
from metisfl.proto.envelope import (
    ENVELOPE_BYTES_MAX,
    INTEGER_MAX,
    build_envelope,
    envelope_fault,
    parse_envelope,
    topic_fault,
)
from metisfl.proto.errors import PeerError
from metisfl.proto.events import PAYLOAD_BYTES_MAX
from metisfl.proto.events_pb2 import Envelope, Hello, Welcome
from metisfl.proto.frames import (
    Ack,
    Beat,
    Busy,
    CursorReport,
    Fetch,
    FetchedBatch,
    Head,
    Header,
    Nack,
    RawRecord,
    Receipt,
    Reject,
    SayHello,
    StatusAnswer,
    StatusRequest,
)

integers = st.integers(0, INTEGER_MAX)
small = st.integers(0, 2**32 - 1)
lanes = st.sampled_from(["f/", "f/task/l1/", "hospitals/run/all/"])
texts = st.text(max_size=40)

requests = st.one_of(
    st.builds(Hello, protocol=small, software=texts, epoch=integers),
    st.builds(Fetch, small, integers, st.integers(1, frames.FETCH_EVENTS_MAX), lanes, integers),
    st.builds(Receipt, integers),
    st.builds(CursorReport, integers, lanes),
    st.builds(StatusRequest),
    st.builds(Beat, st.just("f/beat/l1/"), st.sampled_from(["Progress", "Heartbeat"]), st.binary()),
)
replies = st.one_of(
    st.builds(SayHello),
    st.builds(Welcome, protocol=small, software=texts, head=integers, principal=texts),
    st.builds(Ack, integers, integers),
    st.builds(Nack, integers, integers),
    st.builds(Reject, st.integers(1, 3), integers, texts),
    st.builds(Busy, small, small, texts),
    st.builds(StatusAnswer, st.binary()),
)


def packed(request: frames.Request) -> list[bytes]:
    if isinstance(request, Hello):
        return frames.pack_hello(request)
    if isinstance(request, Fetch):
        return frames.pack_fetch(request)
    if isinstance(request, CursorReport):
        return frames.pack_cursor(request)
    if isinstance(request, Receipt):
        return frames.pack_receipt(request)
    if isinstance(request, StatusRequest):
        return [frames.STATUS]
    return frames.pack_beat(request)


def record(envelope: bytes, sequence: int = 7) -> RawRecord:
    header = Header(zlib.crc32(envelope), 1, sequence, sequence - 1, sequence - 1, 99)
    return RawRecord(b"f/done/l1/", header, envelope)


def flat(record: RawRecord) -> list[bytes]:
    return [record.topic, frames.pack_header(record.header), record.envelope]


@given(requests)
def test_a_request_comes_back_as_it_was(request: frames.Request) -> None:
    assert frames.parse_request(packed(request)) == request


@given(replies)
def test_a_reply_comes_back_as_it_was(reply: frames.Reply) -> None:
    assert frames.parse_reply(frames.pack_reply(reply)) == reply


@given(st.lists(st.binary(max_size=50), max_size=5), small, integers, integers, integers, integers)
def test_a_batch_comes_back_as_it_was(
    envelopes: list[bytes], request: int, head: int, through: int, floor: int, receipt: int
) -> None:
    records = tuple(record(envelope, at + 1) for at, envelope in enumerate(envelopes))
    flat_records = [part for record in records for part in flat(record)]
    parts = frames.pack_batch(request, head, through, floor, receipt, flat_records)
    assert frames.parse_reply(parts) == FetchedBatch(
        request, head, through, floor, records, receipt
    )


def test_live_messages_come_back_as_they_were() -> None:
    assert frames.parse_live(flat(record(b"x"))) == record(b"x")
    beat = Beat("f/beat/l1/", "Progress", b"p")
    assert frames.parse_live(frames.pack_live_beat(beat)) == beat
    head = frames.pack_head(Head(3, 4))
    assert frames.parse_live(head) == Head(3, 4)
    assert frames.parse_live([b"".join(head)]) == Head(3, 4, link_up=True)


def test_the_record_header_has_the_layout_of_the_contract() -> None:
    header = frames.pack_header(Header(0x01020304, 2, 3, 4, 5, 6))
    assert frames.HEADER_BYTES == len(header) == 48
    assert header[:8] == bytes.fromhex("014d 0000 04030201")
    assert header[8:] == b"".join(value.to_bytes(8, "little") for value in (2, 3, 4, 5, 6))


@pytest.mark.parametrize(
    "data",
    [
        Welcome(software="x" * 2000).SerializeToString(),
        Welcome(head=2**63).SerializeToString(),
        b"\xff",
    ],
)
def test_a_welcome_beyond_its_limits_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError, match="welcome"):
        frames.parse_reply([frames.WELCOME, data])


def test_a_reason_is_cut_whoever_gives_it() -> None:
    for reply in (Busy(1, 2, "x" * 5000), Reject(1, 2, "x" * 5000)):
        assert sum(map(len, frames.pack_reply(reply))) < 2100


parts = st.lists(
    st.one_of(
        st.sampled_from([bytes([kind]) for kind in b"HPFCBWANRYESK"]),
        st.sampled_from([b"", b"hb/", b"f/", b"f/done/l1/"]),
        st.binary(max_size=60),
    ),
    max_size=6,
)


@given(parts)
def test_no_bytes_raise_anything_but_a_peer_error(parts: Sequence[bytes]) -> None:
    for parse in (
        frames.parse_request,
        frames.parse_reply,
        frames.parse_publish,
        frames.parse_live,
    ):
        with suppress(PeerError):
            parse(parts)


FETCH = frames.pack_fetch(Fetch(1, 2, 3, "f/"))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([], "unknown message kind"),
        ([b"Q"], "b'Q'"),
        ([b"H"], "1 parts; it has exactly 2"),
        ([b"H", bytes(2000)], "2000 bytes; at most 1024"),
        ([b"H", b"\xff\xff"], "not protobuf"),
        ([b"H", Hello(epoch=2**63).SerializeToString()], f"{2**63}; at most {INTEGER_MAX}"),
        ([*FETCH, b""], "4 parts; it has exactly 3"),
        ([b"F", FETCH[1][:-1], b"f/"], "23 bytes; it has exactly 24"),
        ([b"F", frames.pack_fetch(Fetch(1, 2**63, 3, "f/"))[1], b"f/"], f"at most {INTEGER_MAX}"),
        ([b"F", frames.pack_fetch(Fetch(1, 2, 257, "f/"))[1], b"f/"], "257 events; allowed are 1"),
        ([b"F", FETCH[1], b"f"], "not a lane"),
        ([b"F", FETCH[1], b"f/" * 100], "200 bytes; at most 160"),
        ([b"F", FETCH[1], b"\xff/"], "not UTF-8"),
        ([b"B", b"f/beat/l1/", b"Progress", bytes(65_537)], "65537 bytes; at most 65536"),
        ([b"B", b"f/beat/l1/", b"no name", b""], "'no name' is not a message name"),
        ([b"C", bytes(7), b"f/"], "7 bytes; it has exactly 8"),
        ([b"K", bytes(7)], "7 bytes; it has exactly 8"),
        ([b"K", bytes(8), b""], "3 parts; it has exactly 2"),
        ([b"F", frames.pack_fetch(Fetch(1, 2, 3, "f/", 2**63))[1], b"f/"], f"most {INTEGER_MAX}"),
        ([b"S", b""], "b'S' of 2 parts"),
    ],
)
def test_a_bad_request_is_refused_with_value_and_bound(parts: list[bytes], told: str) -> None:
    with pytest.raises(PeerError) as error:
        frames.parse_request(parts)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([b"P", bytes(4)], "2 parts"),
        ([b"P", bytes(3), b""], "crc of 4 bytes"),
        ([b"P", bytes(4), bytes(ENVELOPE_BYTES_MAX + 1)], f"at most {ENVELOPE_BYTES_MAX}"),
    ],
)
def test_a_bad_publish_is_refused_with_value_and_bound(parts: list[bytes], told: str) -> None:
    with pytest.raises(PeerError, match=told):
        frames.parse_publish(parts)


def test_a_batch_with_too_many_or_too_few_records_is_refused() -> None:
    many = frames.pack_batch(1, 2, 2, 0, 3, flat(record(b"x")) * 257)
    with pytest.raises(PeerError, match="257 records; at most 256"):
        frames.parse_reply(many)
    with pytest.raises(PeerError, match="exactly 5"):
        frames.parse_reply(frames.pack_batch(1, 2, 2, 0, 3, flat(record(b"x")))[:-1])


def test_a_damaged_record_is_refused() -> None:
    topic, header, _ = flat(record(b"right"))
    with pytest.raises(PeerError, match="record 7 is damaged"):
        frames.parse_live([topic, header, b"wrong"])
    with pytest.raises(PeerError, match="begins with 0x0000"):
        frames.parse_live([topic, bytes(48), b"right"])


def envelope(**fields: object) -> Envelope:
    good: dict[str, object] = {
        "version": 1,
        "event_id": bytes(16),
        "topic": "f/done/l1/",
        "publisher": "learner:l1",
        "epoch": 1,
        "sequence": 1,
        "type": "TaskFailed",
    }
    return Envelope(**{**good, **fields})  # type: ignore[arg-type]


def test_a_built_envelope_is_what_was_asked_for() -> None:
    data = build_envelope(
        event_id=bytes(range(16)),
        topic="f/done/l1/",
        publisher="learner:l1",
        epoch=5,
        sequence=6,
        created_unix_ns=7,
        type="TaskFailed",
        correlation_id="t",
        payload=b"p",
    )
    assert parse_envelope(data) == envelope(
        event_id=bytes(range(16)),
        epoch=5,
        sequence=6,
        created_unix_ns=7,
        correlation_id="t",
        payload=b"p",
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"version": 2}, "version 2; known is 1"),
        ({"event_id": bytes(15)}, "15 bytes; it has exactly 16"),
        ({"type": "drop table"}, "not a message name"),
        ({"correlation_id": "x" * 201}, "201 characters; at most 200"),
        ({"payload": bytes(PAYLOAD_BYTES_MAX + 1)}, f"at most {PAYLOAD_BYTES_MAX}"),
    ],
)
def test_a_bad_envelope_has_a_fault(fields: dict[str, object], told: str) -> None:
    assert told in str(envelope_fault(envelope(**fields)))
    assert envelope_fault(envelope()) is None


@pytest.mark.parametrize("topic", ["f/done/l1", "f/done/", "f/none/l1/", "f/beat/l1/", "", "/" * 9])
def test_a_bad_topic_has_a_fault(topic: str) -> None:
    assert topic_fault(topic)
    assert topic_fault("f/done/l1/") is None


@pytest.mark.parametrize("fields", [{"epoch": 0}, {"sequence": 0}, {"epoch": 2**63}])
def test_an_envelope_without_a_place_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(PeerError, match="allowed are 1 to"):
        parse_envelope(envelope(**fields).SerializeToString())
