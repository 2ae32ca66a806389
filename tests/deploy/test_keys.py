"""keys.py: secrets stay secret, lists say what is wrong with them, writing never loses a key."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from hypothesis import given, settings
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


def test_missing_files_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"identity\.key does not exist; .*metisfl keys identity"):
        keys.load_identity(tmp_path)
    with pytest.raises(UserError, match=r"peers does not exist; create it"):
        keys.load_peers(tmp_path)
    with pytest.raises(UserError, match=r"servers does not exist; create it"):
        keys.load_servers(tmp_path)


def test_lists_have_comments_blank_lines_and_keys_with_hashes(tmp_path: Path) -> None:
    (tmp_path / "peers").write_bytes(
        b"# the sites\r\n\n  learner:a\t"
        + KEY_WITH_HASH
        + b" \r\n # b is late\ncontroller "
        + KEY_B
    )
    assert keys.load_peers(tmp_path) == {KEY_WITH_HASH: "learner:a", KEY_B: "controller"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learner:a", r"peers:1: 1 words; allowed is `principal publickey`"),
        (f"# x\nlearner:a {KEY_A.decode()} # site a", r"peers:2: 5 words"),
        (f"learner:A {KEY_A.decode()}", r"peers:1: learner name 'A': use 1 to 63 of a-z"),
        (f"learner {KEY_A.decode()}", r"peers:1: principal 'learner': use broker, controller, lea"),
        (f"broker:x {KEY_A.decode()}", r"peers:1: principal 'broker:x': use broker"),
        (f"learner:a {KEY_A.decode()[1:]}", r"peers:1: .* is not a public key: 40 characters"),
        (f"learner:a {'#' * 40}", r"peers:1: .* is not a public key"),
        (f"learner:a é{KEY_A.decode()[1:]}", r"peers:1: .* is not a public key"),
        (
            f"learner:a {KEY_A.decode()}\n\nlearner:a {KEY_B.decode()}",
            r"peers:3: the principal of line 1 again",
        ),
        (
            f"learner:a {KEY_A.decode()}\nlearner:b {KEY_A.decode()}",
            r"peers:2: the key of line 1 again",
        ),
    ],
)
def test_a_wrong_line_is_named_with_what_is_allowed(
    tmp_path: Path, text: str, complaint: str
) -> None:
    (tmp_path / "peers").write_text(text)
    with pytest.raises(UserError, match=complaint):
        keys.load_peers(tmp_path)


def test_only_servers_are_listed_as_servers(tmp_path: Path) -> None:
    (tmp_path / "servers").write_text(f"learner:a {KEY_A.decode()}")
    with pytest.raises(UserError, match="not a server; use broker or controller"):
        keys.load_servers(tmp_path)
    with pytest.raises(UserError, match="use broker or controller"):
        keys.add_server(tmp_path, "driver:d", KEY_B)


def test_a_list_that_anybody_may_write_is_refused(tmp_path: Path) -> None:
    keys.add_peer(tmp_path, "learner:a", KEY_A)
    (tmp_path / "peers").chmod(0o666)
    with pytest.raises(UserError, match=r"changed by others; `chmod 644 .*peers`"):
        keys.load_peers(tmp_path)


def test_a_list_has_a_size_limit(tmp_path: Path) -> None:
    with (tmp_path / "peers").open("wb") as file:
        file.truncate(keys.FILE_BYTES_MAX + 1)
    with pytest.raises(UserError, match="4194305 bytes"):
        keys.load_peers(tmp_path)


def test_adding_keeps_what_people_wrote_and_is_harmless_when_repeated(tmp_path: Path) -> None:
    (tmp_path / "peers").write_text(f"# our sites\nlearner:a {KEY_A.decode()}")
    (tmp_path / "peers").chmod(0o640)
    keys.add_peer(tmp_path, "learner:b", KEY_B)
    keys.add_peer(tmp_path, "learner:b", KEY_B)
    expected = f"# our sites\nlearner:a {KEY_A.decode()}\nlearner:b {KEY_B.decode()}\n"
    assert (tmp_path / "peers").read_text() == expected
    assert mode_of(tmp_path / "peers") == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["peers"], "a temporary file was left"


def test_adding_never_replaces_a_key_silently(tmp_path: Path) -> None:
    keys.add_server(tmp_path, "broker", KEY_A)
    for principal, key in (("broker", KEY_B), ("controller", KEY_A)):
        with pytest.raises(UserError, match="remove that line first"):
            keys.add_server(tmp_path, principal, key)
    assert keys.load_servers(tmp_path) == {"broker": KEY_A}


@settings(deadline=None)  # a busy disk is no mistake
@given(st.dictionaries(principals, public_keys, max_size=5))
def test_what_was_added_is_what_loads(scratch: Path, listed: dict[str, bytes]) -> None:
    (scratch / "peers").unlink(missing_ok=True)
    distinct = {principal: key for key, principal in {k: p for p, k in listed.items()}.items()}
    for principal, key in distinct.items():
        keys.add_peer(scratch, principal, key)
    if distinct:
        assert keys.load_peers(scratch) == {key: who for who, key in distinct.items()}


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from(
            [b"learner:a", b"broker", b" ", b"\n", b"#", KEY_A, KEY_B, b"\xff", b"\x00"]
        )
    ).map(b"".join)
)
def test_any_bytes_are_a_list_or_a_user_error(scratch: Path, content: bytes) -> None:
    (scratch / "peers").write_bytes(content)
    try:
        peers = keys.load_peers(scratch)
    except UserError:
        return
    assert all(len(z85.decode(key)) == 32 for key in peers)


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
