"""The same attack joins a federation that is insecure, and no other: so the tests here can fail."""

from __future__ import annotations

from typing import Any

import pytest
from client_stories import PATIENCE_S
from daemons import Daemons

from metisfl.deploy.insecure import INSECURE_VARIABLE

pytestmark = pytest.mark.chaos


def test_who_has_no_key_joins_an_insecure_federation_by_any_name(
    field: Any, attackers: Any
) -> None:
    daemons: Daemons = field(**{INSECURE_VARIABLE: "1"})
    told = attackers(daemons).start("join", keys=False).wait(PATIENCE_S)["join"]
    assert told["said"]["welcomed as"] == "learner:mallory"
    assert (told["let in"], told["joined"]) == (3, 1), "all three doors are open"
    assert "refused" not in told


def test_and_is_shut_out_of_any_other(field: Any, attackers: Any) -> None:
    daemons: Daemons = field()
    told = attackers(daemons).start("join", keys=False, seconds=5).wait(PATIENCE_S)["join"]
    assert told["refused"] + told.get("cut off", 0) >= 3, "it has tried each door"
    assert {"let in", "welcomed", "joined"}.isdisjoint(told), told
