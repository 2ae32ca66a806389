"""Memory is at most the limit and what comes in a look; a cut that cannot help is rare."""

from __future__ import annotations

from metisfl.deploy.memory_guard import CALM_S, LOOK_S, SUSPECTS_MAX, MemoryGuard, suspects

LIMIT = 800


def cuts(held: list[int], look_s: float = LOOK_S) -> list[int]:
    """At which of these looks, one after another, the connections are cut."""
    guard, at = MemoryGuard(LIMIT), []
    for number, held_bytes in enumerate(held):
        guard, cut = guard.look(held_bytes, number * look_s)
        at += [number] * cut
    return at


def test_nothing_is_cut_up_to_the_limit_and_everything_beyond_it() -> None:
    assert cuts([0, LIMIT, LIMIT, LIMIT + 1]) == [3]


def test_who_comes_back_after_a_cut_that_helped_is_cut_off_at_the_next_look_over_the_limit() -> (
    None
):
    assert cuts([900, 100, 900, 100, 900]) == [0, 2, 4]


def test_a_cut_that_did_not_help_is_tried_again_only_after_a_while() -> None:
    looks = round(3 * CALM_S / LOOK_S)
    assert len(cuts([900] * looks)) == 3


def test_memory_that_grows_although_it_was_never_below_the_limit_is_cut_again() -> None:
    assert cuts([900, 950, 1000, 1001, 1100, 1101]) == [0, 3]
    assert cuts([900, 850, 950, 951]) == [0, 3], "grown since the least that the cut has left"


def test_what_the_cut_gives_back_late_is_no_growth() -> None:
    assert cuts([900, 890, 850, 820, 850, 870]) == [0]


def test_who_never_completed_a_message_is_suspected_before_all_others() -> None:
    heard = {"learner:ada": 2, "driver:d": 1}
    assert suspects({"learner:ada": 5, "learner:eve": 1, "driver:d": 1}, heard) == ["learner:eve"]


def test_else_it_is_who_has_most_connections_without_a_message() -> None:
    heard = {"learner:ada": 2, "learner:bob": 3, "learner:eve": 1}
    assert suspects({"learner:ada": 3, "learner:bob": 3, "learner:eve": 9}, heard) == [
        "learner:eve",
        "learner:ada",
    ]


def test_however_many_there_are_a_few_are_told() -> None:
    crowd = {f"learner:{number}": 1 for number in range(1000)}
    assert len(suspects(crowd, {})) == SUSPECTS_MAX
    assert suspects(crowd, crowd) == []
