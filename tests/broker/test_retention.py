"""retention.py: what goes, what stays, and when the log takes no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metisfl.broker import retention
from metisfl.broker.retention import Aged, Limits, Pin

DAY_NS = 86_400 * 10**9
NOW = 1000 * DAY_NS
LIMITS = Limits(log_bytes=1_000_000, keep_ns=7 * DAY_NS)


def aged(*days: float, first: int = 1, size: int = 100) -> list[Aged]:
    """Records of so many days ago."""
    return [
        Aged(sequence, NOW - int(ago * DAY_NS), size)
        for sequence, ago in enumerate(days, start=first)
    ]


def trim_to(oldest: list[Aged], pins: list[Pin] | None = None, log_bytes: int = 0) -> int:
    return retention.trim_to(log_bytes, oldest, pins or [], LIMITS, NOW)


def test_what_is_older_than_it_is_kept_goes() -> None:
    assert trim_to(aged(9, 8, 6, 1)) == 2
    assert trim_to(aged(6, 5)) == 0
    assert trim_to([]) == 0


def test_an_old_record_behind_a_young_one_stays_so_that_there_is_no_hole() -> None:
    assert trim_to(aged(9, 1, 9)) == 1


def test_a_log_over_half_its_limit_loses_its_oldest_whatever_their_age() -> None:
    young = aged(*[1] * 50, size=10_000)
    assert trim_to(young, log_bytes=500_000) == 0
    assert trim_to(young, log_bytes=600_000) == 10, "until it is at half, and no further"


def test_nothing_goes_that_a_controller_has_not_read() -> None:
    old = aged(*[30] * 50)
    pins = [Pin("f/", 40, 45), Pin("g/", 3, 17)]
    assert trim_to(old, pins) == 16
    assert trim_to(old, pins, log_bytes=2_000_000) == 16, "not even if the log is full"
    assert trim_to(old, [Pin("f/", 0, 1)]) == 0, "a controller that has read nothing yet"


def test_a_slice_is_small_in_records_and_in_bytes() -> None:
    assert trim_to(aged(*[30] * 5000)) == retention.SLICE_EVENTS
    big = aged(*[30] * 100, size=256 * 1024)
    assert trim_to(big) == retention.SLICE_BYTES // (256 * 1024)


def test_nothing_is_looked_for_in_a_young_and_small_log() -> None:
    def worth(log_bytes: int, oldest: list[Aged]) -> bool:
        return retention.worth_a_look(log_bytes, oldest, LIMITS, NOW)

    assert not worth(100, aged(1))
    assert worth(100, aged(8))
    assert worth(600_000, aged(1))
    assert not worth(600_000, [])


def test_a_full_log_says_what_it_waits_for() -> None:
    assert retention.full_because(999_999, None, LIMITS) is None
    for pin, told in (
        (None, "oldest records are being trimmed"),
        (Pin("hospitals/", 0, 1), "the controller of federation hospitals has read nothing yet"),
        (Pin("f/", 7, 9), "the controller of federation f has read up to 7 only"),
    ):
        reason = retention.full_because(1_000_000, pin, LIMITS)
        assert reason is not None
        assert told in reason
        assert "may take 1000000 (--log-limit)" in reason


def test_a_file_that_is_mostly_free_is_given_back_bit_by_bit() -> None:
    assert retention.pages_to_give_back(1000, 250) == 0
    assert retention.pages_to_give_back(1000, 251) == 251
    assert retention.pages_to_give_back(100_000, 60_000) == retention.GIVE_BACK_PAGES


records = st.lists(
    st.tuples(st.floats(0, 20), st.integers(100, 300_000)), min_size=1, max_size=60
).map(
    lambda made: [Aged(n, NOW - int(ago * DAY_NS), size) for n, (ago, size) in enumerate(made, 1)]
)
pins = st.lists(
    st.integers(1, 70).flatmap(
        lambda unread: st.builds(Pin, st.just("f/"), st.integers(0, unread - 1), st.just(unread))
    ),
    max_size=4,
)


@given(records, pins, st.integers(0, 2_000_000))
def test_whatever_goes_was_read_and_is_old_or_too_much(
    oldest: list[Aged], pins: list[Pin], log_bytes: int
) -> None:
    to = retention.trim_to(log_bytes, oldest, pins, LIMITS, NOW)
    left = log_bytes
    for record in oldest[:to]:
        assert all(record.sequence < pin.unread for pin in pins), "a controller needs it"
        old = record.logged_unix_ns < NOW - LIMITS.keep_ns
        assert old or 2 * left > LIMITS.log_bytes, f"{record} went without need"
        left -= record.bytes
