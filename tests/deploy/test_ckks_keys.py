"""ckks_keys.py: the files of a key are safe where they belong, and found where they do not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from example_key import PUBLIC, public_part, secret_of
from hypothesis import given, settings
from hypothesis import strategies as st

from metisfl.deploy import ckks_keys
from metisfl.deploy.ckks_keys import (
    load_public,
    load_secret,
    refuse_secret_parts,
    write_new_key,
    write_secret,
)
from metisfl.deploy.run_folder import create_run_folder
from metisfl.proto.ckks_key import CEREMONY_MAGIC, FILE_BYTES_MAX, SEALED_MAGIC, SECRET_MAGIC
from metisfl.proto.errors import MachineError, UserError

SECRET = secret_of(PUBLIC)
OTHER = secret_of(public_part(context=b"another"))


@pytest.fixture(params=[0o000, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A site's keys folder with both parts."""
    write_new_key(tmp_path / "keys", PUBLIC, SECRET)
    return tmp_path / "keys"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property; each example writes its file anew."""
    return tmp_path_factory.mktemp("home")


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_written_key_loads_as_it_was(folder: Path) -> None:
    assert load_public(folder) == PUBLIC
    assert load_secret(folder) == SECRET


@pytest.mark.usefixtures("umask")
def test_the_secret_part_is_for_its_owner_alone_and_the_public_one_for_all(tmp_path: Path) -> None:
    write_new_key(tmp_path / "keys", PUBLIC, SECRET)
    assert mode_of(tmp_path / "keys") == 0o700
    assert mode_of(tmp_path / "keys" / "secret.ckks") == 0o600
    assert mode_of(tmp_path / "keys" / "public.ckks") == 0o644


@pytest.mark.parametrize("there", ["public.ckks", "secret.ckks"])
def test_a_key_is_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{there} exists, and a key is never overwritten"):
        write_new_key(tmp_path, PUBLIC, SECRET)
    assert (tmp_path / there).read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 1, "half of a key was left"


def test_a_secret_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret.ckks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="never overwritten"):
        write_secret(tmp_path, SECRET)
    assert not (tmp_path / "elsewhere").exists()


def test_half_a_key_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ckks_keys.write_new

    def full_disk(path: Path, content: bytes) -> None:
        if path.name == "public.ckks":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(ckks_keys, "write_new", full_disk)
    with pytest.raises(MachineError, match=r"public\.ckks: cannot be written: No space left"):
        write_new_key(tmp_path, PUBLIC, SECRET)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        write_new_key(tmp_path / "file" / "keys", PUBLIC, SECRET)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o666])
def test_a_secret_part_open_to_others_is_refused_with_the_remedy(folder: Path, mode: int) -> None:
    path = folder / "secret.ckks"
    path.chmod(mode)
    with pytest.raises(UserError, match=f"mode {mode:04o} .*`chmod 600 {path}`"):
        load_secret(folder)


def test_a_systemd_credential_may_show_its_acl_as_group_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "secret.ckks").chmod(0o440)
    with pytest.raises(UserError, match="0440"):
        load_secret(folder)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert load_secret(folder) == SECRET


def test_a_public_part_that_anybody_may_change_is_refused(folder: Path) -> None:
    (folder / "public.ckks").chmod(0o666)
    with pytest.raises(UserError, match=r"changed by others; `chmod 644 .*public\.ckks`"):
        load_public(folder)


def test_a_folder_without_keys_has_no_public_part_and_says_how_to_get_the_secret_one(
    tmp_path: Path,
) -> None:
    assert load_public(tmp_path) is None
    assert load_public(tmp_path / "nowhere") is None
    with pytest.raises(UserError, match=r"secret\.ckks does not exist; .*keys open FILE"):
        load_secret(tmp_path)


def test_parts_of_two_keys_are_refused_with_both_fingerprints(folder: Path) -> None:
    (folder / "secret.ckks").write_bytes(OTHER.pack())
    with pytest.raises(UserError) as raised:
        load_secret(folder)
    assert OTHER.fingerprint.hex() in str(raised.value)
    assert PUBLIC.fingerprint.hex() in str(raised.value)
    (folder / "public.ckks").unlink()
    assert load_secret(folder) == OTHER, "alone it is compared with nothing"


@pytest.mark.parametrize("name", ["public.ckks", "secret.ckks"])
@pytest.mark.parametrize(
    ("content", "story"),
    [
        (b"", "does not begin with MFCK"),
        (b"MFCKPUB1\x80", "must hold profile|does not begin with"),
        (bytes(FILE_BYTES_MAX + 1), f"{FILE_BYTES_MAX + 1} bytes; a part of a key is a file"),
    ],
)
def test_a_damaged_part_is_named_with_its_path(
    folder: Path, name: str, content: bytes, story: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=story) as raised:
        load_secret(folder)
    assert str(raised.value).startswith(f"{folder / name}: ")


def test_a_folder_in_the_place_of_a_part_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "public.ckks").mkdir()
    with pytest.raises(UserError, match=r"public\.ckks: cannot be read: Is a directory"):
        load_public(tmp_path)


def test_a_box_in_the_place_of_the_secret_part_is_known_as_one(folder: Path) -> None:
    (folder / "secret.ckks").write_bytes(SEALED_MAGIC + bytes(200))
    with pytest.raises(UserError, match=r"secret\.ckks is sealed: .*keys open FILE --folder"):
        load_secret(folder)


def test_parts_of_two_keys_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="parts of two keys"):
        write_new_key(tmp_path, PUBLIC, OTHER)
    assert list(tmp_path.iterdir()) == []


# ---- Where a secret part must not be -----------------------------------------------


def refused(home: Path) -> str:
    """What a controller says that starts with this home; "" if it starts."""
    try:
        refuse_secret_parts("the controller", [home])
    except UserError as error:
        return str(error)
    return ""


def test_a_server_starts_beside_the_public_part(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "public.ckks").write_bytes(PUBLIC.pack())
    (tmp_path / "keys" / "identity.key").write_text("principal controller")
    assert refused(tmp_path) == ""
    assert refused(tmp_path / "nowhere") == ""


@pytest.mark.parametrize("content", [SECRET.pack(), SEALED_MAGIC + bytes(200)])
@pytest.mark.parametrize("place", ["keys/secret.ckks", "x", "spool/run/.a/b.model"])
def test_a_secret_part_is_found_wherever_it_is_and_whatever_it_is_called(
    tmp_path: Path, place: str, content: bytes
) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    said = refused(tmp_path)
    assert said.startswith(f"{path} is the secret part of a key")
    for part in ("the controller must never hold it", "read every site's updates", "delete it"):
        assert part in said


def test_a_link_to_a_secret_part_counts_and_a_link_to_a_folder_does_not(
    folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "folder").symlink_to(folder)
    (home / "round").symlink_to(home)
    assert refused(home) == ""
    (home / "file").symlink_to(folder / "secret.ckks")
    assert str(home / "file") in refused(home)


def test_the_home_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(folder)
    assert "secret.ckks" in refused(tmp_path / "home")


def test_credentials_are_looked_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert str(folder / "secret.ckks") in refused(tmp_path / "home")


def test_what_is_no_file_that_can_be_read_is_passed_by(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a-fifo")  # to open it would wait for a writer
    (tmp_path / "b-dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c-round").symlink_to(tmp_path / "c-round")
    assert refused(tmp_path) == ""
    (tmp_path / "d").write_bytes(SECRET.pack())
    assert refused(tmp_path).startswith(str(tmp_path / "d"))


def test_of_each_file_only_the_first_bytes_are_read(tmp_path: Path) -> None:
    for number in range(20):
        with (tmp_path / str(number)).open("wb") as file:
            file.truncate(1 << 40)  # takes no room, and could not be read in any time
    assert refused(tmp_path) == ""


SECRETS = (SECRET_MAGIC, SEALED_MAGIC, CEREMONY_MAGIC)


@settings(deadline=None)  # a busy disk is no mistake
@given(st.binary(max_size=12) | st.sampled_from([*SECRETS, PUBLIC.pack()]))
def test_a_file_is_refused_exactly_for_its_first_bytes(scratch: Path, content: bytes) -> None:
    (scratch / "file").write_bytes(content)
    assert bool(refused(scratch)) == content.startswith(SECRETS)


def test_one_secret_part_among_a_thousand_files_is_found(tmp_path: Path) -> None:
    for number in range(1000):
        path = tmp_path / str(number % 10) / f"{number:03}.model"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PUBLIC.pack())
    assert refused(tmp_path) == ""
    (tmp_path / "7" / "517.model").write_bytes(SECRET.pack())
    assert refused(tmp_path).startswith(str(tmp_path / "7" / "517.model"))


def test_a_file_that_is_closed_to_this_user_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, found = tmp_path / "a", tmp_path / "b"
    for path in (closed, found):
        path.write_bytes(SECRET.pack())

    def open_as_another(path: str, *arguments: object, **options: object) -> object:
        if path == str(closed):
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(ckks_keys, "open", open_as_another, raising=False)  # root may open all
    assert refused(tmp_path).startswith(str(found))


@pytest.mark.parametrize(
    ("server", "place"),
    [
        ("broker", "keys/secret.ckks"),
        ("broker", "log/old"),
        ("controller", "keys/public.ckks.old"),
        ("controller", "spool/run/task.part"),
        ("controller", "models/00.model"),
    ],
)
def test_a_server_that_holds_a_secret_part_does_not_start(
    tmp_path: Path, server: str, place: str
) -> None:
    home = create_run_folder(tmp_path / "run", ["ada"]).folder / server
    (home / "keys" / "public.ckks").write_bytes(PUBLIC.pack())
    (home / place).parent.mkdir(parents=True, exist_ok=True)
    (home / place).write_bytes(SECRET.pack())
    daemon = str(Path(sys.executable).with_name(f"metisfl-{server}"))
    options = ["--federation", "f"] if server == "controller" else []
    ended = subprocess.run(
        [daemon, "--home", str(home), *options], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == UserError.exit_code, ended.stderr
    assert f"{home / place} is the secret part of a key for encrypted updates" in ended.stderr
    assert f"the {server} must never hold it" in ended.stderr
    assert "Traceback" not in ended.stderr
