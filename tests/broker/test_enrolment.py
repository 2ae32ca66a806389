"""enrolment.py: one key for each code, nobody admitted but by the operator, every no with a why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.broker.enrolment import Decision, decide, open_invitations
from metisfl.proto.enrolment import ADMITTED, REFUSED, WAITING, Answer, Ask, Invitation

NOW = 1000
ADA, BOB = "learner:ada", "learner:bob"
CODE, OTHER_CODE, SITE, THIEF = b"code", b"other code", b"site", b"thief"
INVITED = Invitation(ADA, CODE, "f", NOW + 1)
ASKED = replace(INVITED, asked=SITE)

some_key = st.sampled_from([CODE, OTHER_CODE, SITE, THIEF])
some_name = st.sampled_from([ADA, BOB])
some_peers = st.dictionaries(some_key, some_name, max_size=3)
some_invitations = st.dictionaries(
    some_name,
    st.builds(
        Invitation,
        principal=some_name,
        public=some_key,
        federation=st.just("f"),
        expires_unix_s=st.sampled_from([NOW - 1, NOW, NOW + 1]),
        asked=st.none() | some_key,
    ),
)


def ask(
    invitation: Invitation | None = INVITED,
    *,
    site: bytes = SITE,
    code: bytes = CODE,
    peers: Mapping[bytes, str] | None = None,
    now: float = NOW,
    others: Mapping[str, Invitation] | None = None,
) -> Decision:
    known = dict(others or {}) | ({ADA: invitation} if invitation else {})
    wish = Ask(code, site)
    return decide(ADA, wish, invitations=known, peers=peers or {}, now_unix_s=now)


def test_the_first_key_that_asks_is_bound_to_the_code() -> None:
    assert ask() == Decision(Answer(WAITING), bind=ASKED)


def test_the_same_key_may_ask_again_and_nothing_is_written() -> None:
    assert ask(ASKED) == Decision(Answer(WAITING))


def test_another_key_is_refused_and_the_operator_hears_of_it() -> None:
    """Whichever of the two the thief is."""
    decision = ask(ASKED, site=THIEF)
    assert decision.answer.state == REFUSED
    assert "another key has asked with this code before" in decision.answer.reason
    assert decision.suspect
    assert decision.bind is None


def test_once_the_operator_has_listed_the_key_it_is_admitted_with_or_without_an_invitation() -> (
    None
):
    for invitation in (ASKED, None):
        assert ask(invitation, peers={SITE: ADA}) == Decision(Answer(ADMITTED))


@pytest.mark.parametrize(
    ("decision", "why"),
    [
        (ask(None), "no invitation for learner:ada any more"),
        (ask(now=NOW + 1), "has expired"),
        (ask(ASKED, now=NOW + 1), "has expired"),
        (ask(code=OTHER_CODE), "a newer code for learner:ada has replaced this one"),
        (ask(peers={THIEF: ADA}), "admitted already, with another key"),
        (ask(peers={SITE: BOB}), "this key is learner:bob's already"),
        (
            ask(others={BOB: Invitation(BOB, OTHER_CODE, "f", NOW + 1, asked=SITE)}),
            "asked by another invitation already",
        ),
    ],
)
def test_every_no_has_a_reason(decision: Decision, why: str) -> None:
    assert decision.answer.state == REFUSED
    assert why in decision.answer.reason
    assert decision.bind is None
    assert not decision.suspect


@given(some_name, some_key, some_key, some_peers, some_invitations)
def test_whatever_is_known_the_laws_hold(
    principal: str,
    code: bytes,
    site: bytes,
    peers: dict[bytes, str],
    invitations: dict[str, Invitation],
) -> None:
    decision = decide(
        principal, Ask(code, site), invitations=invitations, peers=peers, now_unix_s=NOW
    )
    answer, bound = decision.answer, decision.bind
    assert (answer.state == ADMITTED) == (peers.get(site) == principal), "only the list admits"
    assert (answer.state == REFUSED) == bool(answer.reason)
    if bound is not None:
        before = invitations[principal]
        assert before.asked is None, "a code that was used is bound to another key"
        assert bound == replace(before, asked=site)
        assert code == before.public
    if answer.state == WAITING:
        known = {**invitations, **({principal: bound} if bound else {})}
        again = decide(principal, Ask(code, site), invitations=known, peers=peers, now_unix_s=NOW)
        assert again == Decision(Answer(WAITING)), "to ask again changes something"


@given(some_invitations)
def test_an_invitation_opens_the_door_until_it_expires(known: dict[str, Invitation]) -> None:
    still = open_invitations(known, NOW)
    assert all((who in still) == (it.expires_unix_s > NOW) for who, it in known.items())
