"""Whatever is refused how often, the log stays short, and no refusal is lost from the count."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.deploy.audit_refusals import DAY_S, LINES_MAX, QUIET_S, Due, Refusals

FEW = 3
"""The lines of a day in these stories, so that they come to the limit."""

refusals = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.floats(0, DAY_S / 2)), max_size=80
)


def told_by(story: list[tuple[str, str, float]]) -> tuple[Refusals, list[tuple[str, float, Due]]]:
    """The state after a story (what, who, seconds since the one before), and all that was due."""
    state, now_s, dues = Refusals(FEW), 0.0, []
    for what, who, gap_s in story:
        now_s += gap_s
        state, due = state.refused(what, who, now_s)
        if due is not None:
            dues.append((what + who, now_s, due))
    return state, dues


@given(refusals)
@settings(max_examples=300, deadline=None)
def test_every_refusal_has_a_line_or_is_counted_by_one_or_is_pending(
    story: list[tuple[str, str, float]],
) -> None:
    state, dues = told_by(story)
    lines = sum(1 for *_, due in dues if not due.last)
    counted = sum(due.unwritten + due.left_out for *_, due in dues)
    assert lines + counted + state.pending == len(story)


@given(refusals)
@settings(max_examples=300, deadline=None)
def test_the_same_is_written_at_most_once_an_hour(story: list[tuple[str, str, float]]) -> None:
    written = defaultdict(list)
    for what, now_s, due in told_by(story)[1]:
        if not due.last:
            written[what].append(now_s)
    for times in written.values():
        gaps = [b - a for a, b in pairwise(times)]
        assert all(gap >= QUIET_S for gap in gaps), f"written at {times}"


@given(refusals)
@settings(max_examples=300, deadline=None)
def test_a_day_has_so_many_lines_and_then_one_that_says_so(
    story: list[tuple[str, str, float]],
) -> None:
    days: list[list[tuple[float, Due]]] = []
    begun_s, now_s, state = float("-inf"), 0.0, Refusals(FEW)
    for what, who, gap_s in story:
        now_s += gap_s
        if now_s - begun_s >= DAY_S:
            begun_s = now_s
            days.append([])
        state, due = state.refused(what, who, now_s)
        if due is not None:
            days[-1].append((now_s, due))
    for day in days:
        kinds = [due.last for _, due in day]
        assert kinds in [[False] * n for n in range(FEW + 1)] + [[False] * FEW + [True]]


def test_the_line_after_a_quiet_hour_counts_what_came_in_it() -> None:
    story = [("a", "x", 0.0), *[("a", "x", 1.0)] * 41, ("a", "x", QUIET_S)]
    state, dues = told_by(story)
    assert [due for *_, due in dues] == [Due(), Due(unwritten=41)]
    assert state.pending == 0


def test_what_was_left_out_is_told_on_the_next_day() -> None:
    story = [("a", str(n), 0.0) for n in range(FEW + 5)]
    _, dues = told_by([*story, ("a", "x", DAY_S)])
    assert [due for *_, due in dues] == [*[Due()] * FEW, Due(last=True), Due(left_out=5)]


def test_a_line_that_could_not_be_written_is_counted_by_the_next() -> None:
    state, due = Refusals().refused("a", "x", 0.0)
    assert due is not None
    state, due = state.not_written(due).refused("a", "y", 0.0)
    assert due == Due(left_out=1)


def test_many_offenders_cost_bounded_memory() -> None:
    """Each day so many new ones as there are lines, and then as many again that get none."""
    state = Refusals()
    for day in range(5):
        for number in range(2 * LINES_MAX):
            state, _ = state.refused("a", f"{day}.{number}", day * DAY_S)
        assert len(state.known) <= LINES_MAX
    assert state.pending > 0
