"""A topic names one federation, kind and subject, and no other topic starts with it."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto import topics
from metisfl.proto.errors import UserError

names = st.from_regex(topics.NAME, fullmatch=True)
any_topic = st.builds(topics.Topic, names, st.sampled_from(sorted(topics.KINDS)), names)


@given(any_topic)
def test_a_topic_comes_back_as_it_was(topic: topics.Topic) -> None:
    if len(str(topic)) <= topics.TOPIC_BYTES_MAX:
        assert topics.parse_topic(str(topic)) == topic
        assert not topics.lane_of_federation(str(topic))


@given(any_topic, any_topic)
def test_no_topic_is_a_prefix_of_another(a: topics.Topic, b: topics.Topic) -> None:
    assert a == b or not str(a).startswith(str(b))


@given(st.text(max_size=200))
def test_any_text_is_a_topic_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(topics.parse_topic(text)) == text


@pytest.mark.parametrize("name", ["", "all", "Ada", "a/b", "-a", "a" * 64, "a b"])
def test_a_name_that_cannot_be_a_subject_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(UserError, match="use 1 to 63 of a-z"):
        topics.check_name(name, "learner")


def test_a_federation_is_a_lane_of_all_its_topics() -> None:
    assert topics.lane_of_federation(topics.federation_lane("f"))
    assert topics.task_topic("f", "l1").startswith(topics.federation_lane("f"))
