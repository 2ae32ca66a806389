"""patience.py: who sends what leads nowhere is read less, and nobody else is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metisfl.controller.patience import FUTILE_PER_S, PEERS_MAX, Patience

steps = st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 0.05)), max_size=600)


@given(steps)
def test_of_each_no_more_is_read_than_its_burst_and_its_rate(
    steps: list[tuple[str, float]],
) -> None:
    patience, now = Patience(), 0.0
    read = dict.fromkeys("ab", 0)
    for who, pause_s in steps:
        now += pause_s
        if not patience.is_out(who, now):
            patience.spend(who, now)
            read[who] += 1
    for who, count in read.items():
        assert count <= 2 * FUTILE_PER_S + now * FUTILE_PER_S, f"{who} was read {count} times"


def test_who_wastes_nothing_is_always_read() -> None:
    patience = Patience()
    for _ in range(10_000):
        patience.spend("rude", 0.0)
        assert not patience.is_out("honest", 0.0)
    assert patience.is_out("rude", 0.0)
    assert not patience.is_out("rude", 1.0), "it is read again after a while"


def test_memory_is_bounded_whatever_names_there_are() -> None:
    patience = Patience()
    for number in range(2 * PEERS_MAX):
        patience.spend(f"claimed-{number}", 0.0)
    assert patience.is_out("one more", 0.0), "newcomers beyond the bound do not share a bucket"
    assert not patience.is_out("claimed-0", 0.0)
