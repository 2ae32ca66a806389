"""What is said again and again has few lines, and nobody's lines are hidden by somebody else's."""

from __future__ import annotations

from metisfl.controller.repeats import WHO_MAX, Repeats


def test_the_first_has_a_line_and_then_each_doubling() -> None:
    repeats = Repeats()
    lines = [repeats.line("learner:eve", "late") for _ in range(1000)]
    assert [count for count in lines if count] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def test_everybody_and_every_kind_has_a_first_line() -> None:
    repeats = Repeats()
    for _ in range(3):
        repeats.line("learner:eve", "late")
    assert repeats.line("learner:eve", "refused") == 1
    assert repeats.line("learner:ada", "late") == 1


def test_names_without_end_take_neither_memory_nor_lines() -> None:
    repeats = Repeats()
    lines = sum(bool(repeats.line(f"learner:{number}", "late")) for number in range(3 * WHO_MAX))
    assert lines < WHO_MAX + 20
    assert len(repeats._counts) <= WHO_MAX + 1
