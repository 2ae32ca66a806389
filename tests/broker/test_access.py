"""access.py: who may publish and read what."""

from __future__ import annotations

import pytest

from metisfl.broker.access import SUBSCRIPTIONS_MAX, Subscriptions, may_publish, may_read
from metisfl.proto.topics import parse_topic


@pytest.mark.parametrize(
    ("principal", "topic"),
    [
        ("controller", "f/run/all/"),
        ("controller", "f/task/l1/"),
        ("controller", "f/ledger/l1/"),
        ("learner:l1", "f/done/l1/"),
        ("learner:l1", "f/member/l1/"),
        ("learner:l1", "f/beat/l1/"),
        ("learner:l1", "f/ceremony/all/"),
        ("driver:me", "f/run/all/"),
    ],
)
def test_a_principal_publishes_what_is_its_own(principal: str, topic: str) -> None:
    assert may_publish(principal, parse_topic(topic))


@pytest.mark.parametrize(
    ("principal", "topic"),
    [
        ("learner:l1", "f/done/l10/"),
        ("learner:l1", "f/done/all/"),
        ("learner:l1", "f/task/l1/"),
        ("learner:l1", "f/ledger/l1/"),
        ("learner:l1", "f/run/all/"),
        ("learner:l1", "f/ceremony/l1/"),
        ("learner:", "f/ceremony/all/"),
        ("controller", "f/ceremony/all/"),
        ("driver:me", "f/ceremony/all/"),
        ("controller", "f/done/l1/"),
        ("driver:me", "f/task/l1/"),
        ("driver:me", "f/run/l1/"),
        ("broker", "f/run/all/"),
        ("learner", "f/done/l1/"),
        ("", "f/run/all/"),
    ],
)
def test_a_principal_publishes_nothing_else(principal: str, topic: str) -> None:
    assert not may_publish(principal, parse_topic(topic))


@pytest.mark.parametrize(
    ("principal", "prefix"),
    [
        ("controller", "f/"),
        ("controller", "f/beat/"),
        ("controller", "f/done/l1/"),
        ("driver:me", "f/"),
        ("learner:l1", "f/task/l1/"),
        ("learner:l1", "f/run/all/"),
        ("learner:l1", "f/ledger/l1/"),
        ("learner:l1", "f/ceremony/all/"),
        ("controller", "f/ceremony/"),
        ("driver:me", "f/ceremony/all/"),
        ("learner:l1", "hb/"),
    ],
)
def test_a_principal_reads_what_concerns_it(principal: str, prefix: str) -> None:
    assert may_read(principal, prefix)


@pytest.mark.parametrize(
    ("principal", "prefix"),
    [
        ("learner:l1", "f/"),
        ("learner:l1", "f/task/"),
        ("learner:l1", "f/task/l10/"),
        ("learner:l1", "f/task/l1"),
        ("learner:l1", "f/done/l2/"),
        ("learner:l1", "f/task/all/"),
        ("learner:l1", "f/access/all/"),
        ("learner:l1", "f/ceremony/"),
        ("invited:learner:l1", "f/ceremony/all/"),
        ("learner:l1", ""),
        ("controller", ""),
        ("controller", "f"),
        ("controller", "f/none/"),
        ("controller", "f/done/l1/more/"),
        ("broker", "f/"),
        ("learner:all", ""),
        ("invited:learner:l1", "hb/"),
        ("invited:learner:l1", "f/task/l1/"),
    ],
)
def test_a_principal_reads_nothing_else(principal: str, prefix: str) -> None:
    assert not may_read(principal, prefix)


def test_the_sixteenth_subscription_is_the_last() -> None:
    held = Subscriptions()
    for number in range(SUBSCRIPTIONS_MAX):
        assert held.subscribe("controller", f"f{number}/".encode()) is None
    assert held.subscribe("controller", b"f0/") is None, "the same one again costs nothing"
    assert held.subscribe("controller", b"more/") == "controller has 16 subscriptions; at most 16"
    assert held.subscribe("driver:me", b"more/") is None, "each principal has its own sixteen"
    held.unsubscribe(b"f3/")
    assert held.subscribe("controller", b"more/") is None


@pytest.mark.parametrize("prefix", [b"x" * 256, b"\xff/", b"f/done/", b""])
def test_a_subscription_beyond_the_rules_is_refused(prefix: bytes) -> None:
    assert Subscriptions().subscribe("learner:l1", prefix)
