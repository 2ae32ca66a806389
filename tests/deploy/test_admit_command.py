"""`metisfl admit NAME KEY` and `metisfl expel`: what they do to the lists of the servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from metisfl.deploy.admit_command import command
from metisfl.deploy.expel_command import command as expel_command
from metisfl.deploy.registry import load_registry
from metisfl.proto.errors import UserError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
DASHED = "-" + KEY[1:]


@pytest.fixture
def homes(tmp_path: Path) -> list[str]:
    return [part for name in ("broker", "controller") for part in ("--home", str(tmp_path / name))]


def listed(homes: list[str]) -> list[dict[bytes, str]]:
    return [load_registry(Path(home) / "keys").keys for home in homes[1::2]]


@pytest.mark.parametrize("key", [KEY, DASHED])
def test_a_key_is_admitted_at_both_servers_whatever_it_begins_with(
    homes: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["ada", *homes, key]) == 0
    assert listed(homes) == [{key.encode(): "learner:ada"}] * 2
    assert command([*homes, key, "learner:ada"]) == 0
    assert "was admitted already" in capsys.readouterr().out


def test_a_driver_and_a_federation_are_named(homes: list[str]) -> None:
    assert command(["driver:ops", KEY, *homes, "--federation", "lungs"]) == 0
    (peer,) = load_registry(Path(homes[1]) / "keys").peers.values()
    assert (peer.principal, peer.federations) == ("driver:ops", {"lungs"})


@pytest.mark.parametrize("words", [["ada", KEY[1:]], ["ada", KEY, DASHED], ["Ada", KEY]])
def test_what_is_no_name_and_one_key_is_refused(homes: list[str], words: list[str]) -> None:
    with pytest.raises(UserError, match=r"public key|learner name 'Ada'"):
        command([*words, *homes])
    assert not any((Path(home) / "keys" / "peers").exists() for home in homes[1::2])


def test_who_is_expelled_is_listed_nowhere(
    homes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command(["ada", KEY, *homes])
    assert expel_command(["ada", *homes]) == 0
    assert listed(homes) == [{}, {}]
    assert KEY in capsys.readouterr().out
    with pytest.raises(UserError, match="does not list learner:ada"):
        expel_command(["ada", *homes])
