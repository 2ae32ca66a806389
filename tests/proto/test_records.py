"""A record comes back as it was written; pooled metrics are those of the pooled examples."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metisfl.proto.errors import MachineError
from metisfl.proto.records import (
    Counted,
    Missing,
    RoundRecord,
    pack_record,
    pool_metrics,
    unpack_record,
)

RECORD = RoundRecord(
    run_id="r",
    round=1,
    previous=bytes(32),
    model_digest=bytes(32),
    opened_ns=1,
    closed_ns=2,
    evaluated_ns=3,
    counted=(Counted("ada", 10.0, bytes(32), 10, 0.5, {"loss": 1.0}),),
    invited=("ada", "bob"),
    missing=(Missing("bob", "late", "silent"),),
    evaluation={"ada": {"test.accuracy": 0.5, "test.examples": 4.0}},
    unevaluated=(),
    metrics={"test.accuracy": 0.5, "test.examples": 4.0},
)


def test_a_record_comes_back_as_it_was() -> None:
    assert unpack_record(pack_record(RECORD)) == RECORD


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_other_bytes_are_a_record_or_refused(noise: bytes, at: int) -> None:
    packed = pack_record(RECORD)
    for data in (noise, packed[:at], packed[:at] + noise[:1] + packed[at + 1 :]):
        with contextlib.suppress(MachineError):
            assert isinstance(unpack_record(data), RoundRecord)


sites = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 50)).map(lambda t: (t[0], min(t))), min_size=1
)


@given(sites)
def test_pooled_accuracy_is_the_accuracy_on_all_examples(counts: list[tuple[int, int]]) -> None:
    evaluations = [
        {"test.examples": float(n), "test.accuracy": right / n, "test.loss": 1.0}
        for n, right in counts
    ]
    pooled = pool_metrics(evaluations)
    total, right = sum(n for n, _ in counts), sum(r for _, r in counts)
    assert pooled["test.examples"] == total
    assert pooled["test.accuracy"] == pytest.approx(right / total)
    for order in itertools.islice(itertools.permutations(evaluations), 6):
        assert pool_metrics(order)["test.accuracy"] == pooled["test.accuracy"]


def test_a_site_without_examples_changes_nothing() -> None:
    site = {"test.examples": 4.0, "test.accuracy": 0.5}
    empty = {"test.examples": 0.0, "test.accuracy": 0.0}
    assert pool_metrics([site, empty]) == pool_metrics([site])


@pytest.mark.parametrize(
    "absurd",
    [
        {"test.examples": 1e308, "test.loss": 1.0},
        {"test.examples": 4.0, "test.loss": 1e308},
        {"test.examples": 1e200, "test.loss": -1e200},
    ],
)
def test_what_no_sum_can_hold_is_left_out_and_stops_nobody(absurd: dict[str, float]) -> None:
    other = {"test.examples": 1e200, "test.loss": 1e200}
    honest = {"test.examples": 4.0, "test.accuracy": 0.5}
    pooled = pool_metrics([absurd, absurd, other, honest])
    assert pooled["test.accuracy"] == 0.5
    assert "test.loss" not in pooled
