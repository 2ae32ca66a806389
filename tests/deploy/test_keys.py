"""keys.py: secrets stay secret, and a key pair is never lost."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.deploy import keys, keys_command
from metisfl.proto.errors import MachineError, UserError

KEY_A = b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
KEY_B = b"Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
KEY_WITH_HASH = KEY_A[:35] + b"0####"

public_keys = st.binary(min_size=32, max_size=32).map(z85.encode)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name != "all")
principals = st.sampled_from(["broker", "controller"]) | st.builds(
    "{}:{}".format, st.sampled_from(["learner", "driver"]), names
)


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property; each example writes its file anew."""
    return tmp_path_factory.mktemp("keys")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_created_identity_loads_as_it_was(tmp_path: Path) -> None:
    made = keys.create_identity(tmp_path / "keys", "learner:cleveland")
    assert keys.load_identity(tmp_path / "keys") == made
    assert zmq.curve_public(made.secret) == made.public


@pytest.mark.usefixtures("open_umask")
def test_the_identity_file_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    keys.create_identity(tmp_path / "keys", "broker")
    assert mode_of(tmp_path / "keys" / "identity.key") == 0o600
    assert mode_of(tmp_path / "keys") == 0o700


def test_a_key_pair_is_never_overwritten(tmp_path: Path) -> None:
    made = keys.create_identity(tmp_path, "broker")
    with pytest.raises(UserError, match="never overwritten"):
        keys.create_identity(tmp_path, "controller")
    assert keys.load_identity(tmp_path) == made


def test_a_folder_that_cannot_be_made_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        keys.create_identity(tmp_path / "file" / "keys", "broker")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_an_identity_open_to_others_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    keys.create_identity(tmp_path, "broker")
    path = tmp_path / "identity.key"
    path.chmod(mode)
    with pytest.raises(UserError, match=f"mode {mode:04o} .*`chmod 600 {path}`"):
        keys.load_identity(tmp_path)


def test_an_identity_may_come_as_a_credential_of_the_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = keys.create_identity(tmp_path / "credentials", "broker")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    assert keys.load_identity(tmp_path / "none") == given
    keys.create_identity(tmp_path / "home", "controller")
    assert keys.load_identity(tmp_path / "home") == given, "what the unit is given comes first"


def test_a_systemd_credential_may_show_its_acl_as_group_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.create_identity(tmp_path, "broker")
    (tmp_path / "identity.key").chmod(0o440)
    with pytest.raises(UserError, match="0440"):
        keys.load_identity(tmp_path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert keys.load_identity(tmp_path).principal == "broker"
    (tmp_path / "identity.key").chmod(0o444)
    with pytest.raises(UserError, match="0444"):
        keys.load_identity(tmp_path)


def test_the_secret_shows_neither_in_repr_nor_in_errors(tmp_path: Path) -> None:
    made = keys.create_identity(tmp_path, "broker")
    secret = made.secret.decode()
    assert secret not in repr(made)
    path = tmp_path / "identity.key"
    damaged = path.read_text().replace("secret ", "secrte ")
    path.write_text(damaged)
    with pytest.raises(UserError) as raised:
        keys.load_identity(tmp_path)
    assert secret not in str(raised.value)
    assert str(raised.value).startswith(f"{path}:5: expected")


def test_an_identity_of_two_different_pairs_is_refused(tmp_path: Path) -> None:
    made = keys.create_identity(tmp_path, "broker")
    path = tmp_path / "identity.key"
    other_secret = zmq.curve_keypair()[1].decode()
    path.write_text(path.read_text().replace(made.secret.decode(), other_secret))
    with pytest.raises(UserError, match="not a key pair"):
        keys.load_identity(tmp_path)


@pytest.mark.parametrize("cut", ["principal", "public", "secret"])
def test_a_cut_identity_says_what_is_missing(tmp_path: Path, cut: str) -> None:
    keys.create_identity(tmp_path, "broker")
    path = tmp_path / "identity.key"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(cut)]
    path.write_text("\n".join(kept))
    with pytest.raises(UserError, match=f"no line {cut};"):
        keys.load_identity(tmp_path)


def test_a_missing_identity_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"identity\.key does not exist; .*metisfl keys identity"):
        keys.load_identity(tmp_path)


@given(st.text(max_size=80))
def test_only_principals_pass_as_principals(text: str) -> None:
    try:
        assert keys.check_principal(text) == text
    except UserError:
        return
    role, _, name = text.partition(":")
    assert text in ("broker", "controller") or (role in ("learner", "driver") and name)


def test_the_command_prints_the_public_line_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert keys_command.command(["identity", "learner:a", "--folder", str(folder)]) == 0
    made = keys.load_identity(folder)
    printed = capsys.readouterr()
    assert printed.out == f"learner:a {made.public.decode()}\n"
    assert made.secret.decode() not in printed.err
    assert keys_command.command(["show", "--folder", str(folder)]) == 0
    assert capsys.readouterr().out == printed.out


def test_the_commands_help_says_what_a_principal_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        keys_command.command(["identity", "--help"])
    assert ended.value.code == 0
    assert keys.PRINCIPALS_ALLOWED in capsys.readouterr().out
