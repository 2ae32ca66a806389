"""A size on a command line is bytes or has a binary unit; anything else is refused."""

from __future__ import annotations

import argparse

import pytest

from metisfl.deploy.options import size, size_or_none


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 2**20), ("1MiB", 2**20), ("4 GiB", 2**32), ("2TiB", 2**41), ("2048KiB", 2**21)],
)
def test_a_size_is_a_number_of_bytes(text: str, count: int) -> None:
    assert size(text) == size_or_none(text) == count


@pytest.mark.parametrize("text", ["0", "1023KiB", "4GB", "20G", "-1MiB", "1.5GiB", "x", "9" * 21])
def test_what_is_no_size_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="at least 1MiB"):
        size(text)


def test_an_empty_limit_is_none_where_there_may_be_none() -> None:
    assert size_or_none("") is None
    with pytest.raises(argparse.ArgumentTypeError):
        size("")
