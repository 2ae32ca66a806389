"""ceremony.py: all sites make one key, or all stop for one reason and say who gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from ceremony_world import Log, Site, manifest_of, run, step
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.learner import ceremony as core
from metisfl.proto import ceremony as c
from metisfl.proto import events_pb2 as pb

MANIFEST = manifest_of()
NAMES = MANIFEST.names
Alter = Callable[[core.Heard], list[core.Heard]]


def federation(**alter: Alter) -> tuple[list[Site], Log]:
    log: Log = []
    return [
        Site(MANIFEST, name, log, alter[name]) if name in alter else Site(MANIFEST, name, log)
        for name in NAMES
    ], log


def instead(number: int, change: Callable[[bytes], bytes]) -> Alter:
    """Say another body in this step."""

    def alter(said: core.Heard) -> list[core.Heard]:
        if said.step.step != number:
            return [said]
        return [step(MANIFEST, said.step.learner, number, change(said.step.body))]

    return alter


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda body: body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def check_stopped(sites: list[Site], by: str, match: str) -> None:
    """All honest sites name `by`, for one reason, and have no key."""
    run(sites)
    reasons = {site.stopped for site in sites if site.name != by}
    assert len(reasons) == 1, f"they stopped for several reasons: {reasons}"
    stopped = reasons.pop()
    assert stopped is not None, "they have not stopped"
    assert stopped.site == by
    assert match in stopped.reason
    assert not any(site.key for site in sites)


# ---- All are honest --------------------------------------------------------------


def test_undisturbed_sites_make_one_key_in_fifteen_records() -> None:
    sites, log = federation()
    run(sites)
    assert len({site.key for site in sites}) == 1
    assert sites[0].key is not None
    assert len(log) == 5 * len(NAMES), "nothing was said twice"


Moves = st.lists(
    st.tuples(st.sampled_from(["read", "restart", "repeat", "other"]), st.integers(0, 2)),
    max_size=80,
)


@given(Moves)
@settings(max_examples=150, deadline=None)
def test_any_order_repeats_and_restarts_give_the_same_key_everywhere(
    moves: list[tuple[str, int]],
) -> None:
    sites, log = federation()
    for what, who in moves:
        if what == "restart":
            sites[who].restart()
        elif what == "repeat" and log:
            log.append(log[who * 7 % len(log)])
        elif what == "other":
            log.append(step(manifest_of(number="1" * 32), NAMES[who], 1, bytes(32)))
        elif sites[who].behind:
            sites[who].read()
    run(sites)
    assert [site.stopped for site in sites] == [None] * 3
    assert [site.doubts for site in sites] == [[]] * 3, "what is of another ceremony is no forgery"
    assert len({site.key for site in sites}) == 1, "sites hold different keys"
    assert sites[0].key is not None, "there is no key"
    assert [site.shares_made for site in sites] == [1, 1, 1], "a share is made once, for good"


@given(st.integers(0, 40), st.integers(0, 2))
@settings(deadline=None)
def test_a_restart_after_any_record_changes_nothing(records: int, who: int) -> None:
    sites, _ = federation()
    for _ in range(records):
        for site in sites:
            if site.behind:
                site.read()
        sites[who].restart()
    run(sites)
    assert len({site.key for site in sites}) == 1
    assert sites[0].key is not None


def test_nothing_is_said_before_all_have_said_what_comes_before_it() -> None:
    sites, log = federation()
    run(sites)
    steps = [heard.step.step for heard in log]
    assert steps == sorted(steps)


def test_an_order_of_records_is_judged_alike_by_all() -> None:
    """Two sites break the rules; whoever is first in the log is the one that is named."""

    def early(said: core.Heard) -> list[core.Heard]:
        if said.step.step != 3:
            return [said]
        return [step(MANIFEST, "cyd", 5, b"\1"), said]

    sites, _ = federation(cyd=early, bob=instead(2, flipped(3)))
    run(sites)
    assert sites[0].stopped == sites[2].stopped
    assert sites[0].stopped is not None
    assert sites[0].stopped.site == "bob"


# ---- Who breaks the rules is named --------------------------------------------------


def complaint(kind: int, about: str) -> Callable[[bytes], bytes]:
    return lambda _: c.pack_complaint(kind, about)


ATTACKS: Mapping[str, tuple[Alter, str]] = {
    "another part of the coin": (instead(2, flipped(0)), "than it was bound to by step 1"),
    "another share": (instead(4, flipped(8)), "than it was bound to by step 3"),
    "another box": (instead(4, flipped(-1 % 100 + c.SHARE_BYTES)), "bound to by step 3"),
    "another key": (instead(5, flipped(1)), "confirms another key"),
    "another mask key": (instead(5, flipped(40)), "confirms another key"),
    "a short hash": (instead(1, lambda body: body[:-1]), "cannot be read: 31 bytes; it has 32"),
    "a long part": (instead(2, lambda body: body + b"!"), "cannot be read: 33 bytes"),
    "a short offer": (instead(4, lambda body: body[:-1]), "cannot be read: 16575 bytes"),
    "no confirmation": (instead(5, lambda _: b"\7what"), "are no confirmation and no complaint"),
    "a complaint about nobody": (instead(5, complaint(c.BOX, "eve")), "no confirmation and no"),
    "a complaint": (instead(5, complaint(c.BOX, "ada")), "nobody else can tell which"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_whoever_breaks_the_rules_is_named_by_all_others(attack: str) -> None:
    alter, match = ATTACKS[attack]
    sites, _ = federation(cyd=alter)
    check_stopped(sites, "cyd", match)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_two_bodies_for_one_step_stop_the_ceremony(number: int) -> None:
    def twice(said: core.Heard) -> list[core.Heard]:
        if said.step.step != number:
            return [said]
        other = step(MANIFEST, "ada", number, flipped(1)(said.step.body))
        return [said, other]

    sites, _ = federation(ada=twice)
    check_stopped(sites, "ada", f"two different things in step {number}")


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_a_step_before_its_time_stops_the_ceremony(number: int) -> None:
    def early(said: core.Heard) -> list[core.Heard]:
        if said.step.step != 1:
            return [said]
        return [step(MANIFEST, "cyd", number, bytes(32)), said]

    sites, _ = federation(cyd=early)
    check_stopped(sites, "cyd", f"step {number} before its time: step 1 of")


def offered(offer: c.Offer) -> list[Site]:
    """Sites of which cyd is bound to this offer, and makes it."""
    body = c.pack_offer(offer)
    bound = c.commitment(MANIFEST, "cyd", 4, body)
    sites, log = federation(cyd=instead(3, lambda _: bound))
    run(sites)
    log.append(step(MANIFEST, "cyd", 4, body))
    run(sites)
    return sites[:2]


def check_told(sites: list[Site], match: str) -> None:
    stopped = sites[0].stopped
    assert stopped is not None, "they have not stopped"
    assert stopped == sites[1].stopped, "they stopped for several reasons"
    assert match in stopped.reason
    assert not any(site.key for site in sites)


BOXES = (bytes(c.BOX_BYTES),) * 2


def test_a_box_that_does_not_open_is_told_to_all_and_stops_all() -> None:
    check_told(
        offered(c.Offer(bytes(c.SHARE_BYTES), bytes(32), BOXES)),
        "ada says that its box of cyd does not hold what cyd is bound to",
    )


def test_a_share_that_is_no_polynomial_is_told_to_all_and_stops_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(c, "mask_commitment", lambda *_: bytes(32))  # not what this is about
    check_told(
        offered(c.Offer(b"\xff" * c.SHARE_BYTES, bytes(32), BOXES)),
        "ada says that the share of cyd is no part of a key",
    )


def test_a_commitment_cannot_be_said_again_by_another() -> None:
    """Who copies a commitment, and later what it stands for, would have the same share."""
    sites, log = federation()
    ada = next(heard.step.body for heard in log if heard.step.learner == "ada")
    log.clear()
    log += [step(MANIFEST, name, 1, ada) for name in ("ada", "bob", "cyd")]
    state = core.begin(MANIFEST, "ada", sites[0]._kept.coin_part)
    for heard in log:
        state, _ = core.handle(state, heard, lambda *_: True)
    assert state.step == 2
    copied = step(MANIFEST, "bob", 2, sites[0]._kept.coin_part)
    _, effects = core.handle(state, copied, lambda *_: True)
    assert isinstance(effects[0], core.Stopped)
    assert effects[0].site == "bob"


def test_a_stop_is_for_good() -> None:
    sites, log = federation(cyd=instead(2, flipped(0)))
    check_stopped(sites, "cyd", "step 1")
    before = len(log)
    for site in sites[:2]:
        site.restart()
        assert site.stopped is not None
    log.append(step(MANIFEST, "bob", 1, bytes(32)))
    check_stopped(sites, "cyd", "step 1")
    assert len(log) == before + 1, "a stopped site says nothing more"


def test_a_site_whose_secrets_are_lost_stops_and_says_so() -> None:
    sites, log = federation()
    while sites[0].behind:
        sites[0].read()
    again = Site(MANIFEST, "ada", log, lambda _: [])
    while again.behind:
        again.read()
    assert again.stopped is not None
    assert again.stopped.site == "ada"
    assert "its secrets of this ceremony are lost" in again.stopped.reason


# ---- Who did nothing is not blamed ---------------------------------------------------


def test_a_forged_signature_blames_nobody_and_is_told_once() -> None:
    sites, log = federation()
    forged = step(MANIFEST, "cyd", 5, b"\7")
    forged.step.signature = bytes(64)
    log[:0] = [forged] * 3
    run(sites)
    assert [site.doubts for site in sites] == [["cyd"]] * 3
    assert [site.stopped for site in sites] == [None] * 3
    assert len({site.key for site in sites}) == 1
    assert sites[0].key is not None


def test_who_speaks_under_anothers_name_is_not_heard() -> None:
    """The broker lets nobody; if it did, not even a doubt would fall on whose name it is."""
    sites, log = federation()
    forged = step(MANIFEST, "cyd", 5, b"\7")
    forged.step.signature = bytes(64)
    log.insert(0, core.Heard("learner:eve", forged.step))
    run(sites)
    assert [site.doubts for site in sites] == [[]] * 3
    assert sites[0].key is not None


@pytest.mark.parametrize("field", ["ceremony", "learner", "step", "body"])
def test_a_signature_covers_all_that_counts(field: str) -> None:
    """A record of bob's, put to another use by the broker, is nothing that bob has said."""
    sites, log = federation()
    said = next(heard for heard in log if heard.step.learner == "bob")
    moved = pb.CeremonyStep()
    moved.CopyFrom(said.step)
    publisher = "learner:bob"
    if field == "ceremony":
        moved.ceremony = bytes(16)
    elif field == "learner":
        moved.learner, publisher = "cyd", "learner:cyd"
    elif field == "step":
        moved.step = 5
    else:
        moved.body = bytes(32)
    log.insert(0, core.Heard(publisher, moved))
    run(sites)
    assert [site.stopped for site in sites] == [None] * 3
    assert sites[0].key is not None


def test_strangers_are_not_heard() -> None:
    sites, log = federation()
    eve = manifest_of(("ada", "eve"))
    for number in (1, 2, 5):
        said = step(eve, "eve", number, bytes(32))
        said.step.ceremony = MANIFEST.ceremony
        log.append(said)
    run(sites)
    assert [site.doubts for site in sites] == [[]] * 3
    assert sites[0].key is not None
