"""invitations.py: a file that lets nobody in, changed by one at a time, and never half."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zmq.utils import z85

from metisfl.deploy.invitations import (
    HEADING,
    INVITATIONS_FILE,
    INVITATIONS_MAX,
    Invitations,
    change,
    find,
    load,
)
from metisfl.proto.enrolment import Invitation
from metisfl.proto.errors import MachineError, UserError

NOW = 1000
KEY, OTHER = z85.encode(bytes(32)), z85.encode(bytes([255] * 32))
ADA = Invitation("learner:ada", KEY, "f", NOW + 1)

keys = st.binary(min_size=32, max_size=32).map(z85.encode)
names = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name != "all")
invitations = st.lists(
    st.builds(
        Invitation,
        principal=st.builds("{}:{}".format, st.sampled_from(["learner", "driver"]), names),
        public=keys,
        federation=names,
        expires_unix_s=st.integers(NOW + 1, 2**40),
        asked=st.none() | keys,
    ),
    max_size=4,
).map(lambda made: {it.principal: it for it in made})


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples of a property; each example writes its file anew."""
    return tmp_path_factory.mktemp("keys")


def put(folder: Path, *made: Invitation) -> None:
    change(folder, lambda _: {it.principal: it for it in made}, now_unix_s=NOW)


def test_without_a_file_nobody_is_invited(tmp_path: Path) -> None:
    assert load(tmp_path) == {}
    with pytest.raises(UserError, match="no invitation for learner:ada: `metisfl invite` makes"):
        find(tmp_path, "learner:ada")


@settings(deadline=None)  # a busy disk is no mistake
@given(invitations)
def test_what_was_written_is_what_loads(scratch: Path, made: dict[str, Invitation]) -> None:
    change(scratch, lambda _: made, now_unix_s=NOW)
    assert load(scratch) == made


@settings(deadline=None)
@given(
    st.binary(max_size=200)
    | st.lists(
        st.sampled_from([b"learner:a", b" ", b"\n", b"-", b"f", b"1000", KEY, OTHER, b"\xff"])
    ).map(b"".join)
)
def test_any_bytes_are_invitations_or_a_user_error(scratch: Path, content: bytes) -> None:
    path = scratch / INVITATIONS_FILE
    path.write_bytes(content)
    path.chmod(0o600)
    try:
        found = load(scratch)
    except UserError:
        return
    finally:
        path.unlink()
    assert all(len(z85.decode(it.public)) == 32 for it in found.values())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("learner:a", "invitations:1: 1 words; allowed are principal, key, federation"),
        (f"learner:a {KEY.decode()} f 1000", "invitations:1: 4 words"),
        (f"nobody {KEY.decode()} f 1000 -", "invitations:1: principal 'nobody'"),
        ("learner:a KEY f 1000 -", "invitations:1: 'KEY' is not a public key"),
        (f"learner:a {KEY.decode()} f 1000 KEY", "invitations:1: 'KEY' is not a public key"),
        (f"learner:a {KEY.decode()} F 1000 -", "invitations:1: federation 'F'"),
        (f"learner:a {KEY.decode()} f -1 -", "invitations:1: '-1' is no time"),
        (f"learner:a {KEY.decode()} f {2**41} -", "is no time"),
        (f"learner:a {KEY.decode()} f 1 -\n" * 2, "invitations:2: learner:a again"),
    ],
)
def test_a_wrong_line_is_named_with_what_is_allowed(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / INVITATIONS_FILE).write_text(line)
    (tmp_path / INVITATIONS_FILE).chmod(0o600)
    with pytest.raises(UserError, match=why):
        load(tmp_path)


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        put(tmp_path, ADA)
    finally:
        os.umask(before)
    path = tmp_path / INVITATIONS_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().startswith(HEADING)
    path.chmod(0o644)
    with pytest.raises(UserError, match=f"`chmod 600 {path}`"):
        load(tmp_path)


def test_what_root_writes_belongs_to_the_daemon_whose_folder_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, int, int, bool]] = []

    def chown(path: Path, uid: int, gid: int, *, follow_symlinks: bool) -> None:
        given.append((path.name, uid, gid, follow_symlinks))

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", chown)
    put(tmp_path, ADA)
    owner = tmp_path.stat()
    assert {name for name, *_ in given} == {INVITATIONS_FILE, ".invitations.lock"}
    assert {(uid, gid) for _, uid, gid, _ in given} == {(owner.st_uid, owner.st_gid)}
    assert not any(follow for *_, follow in given), "the daemon could give itself any file"


def test_who_writes_drops_what_has_expired(tmp_path: Path) -> None:
    bob = replace(ADA, principal="learner:bob", public=OTHER, expires_unix_s=NOW + 9)
    put(tmp_path, ADA, bob)
    change(tmp_path, lambda before: before, now_unix_s=NOW + 1)
    assert load(tmp_path) == {"learner:bob": bob}


def test_there_is_room_for_a_thousand_and_the_file_stays_as_it_was(tmp_path: Path) -> None:
    put(tmp_path, ADA)
    many = [replace(ADA, principal=f"learner:l{n}") for n in range(INVITATIONS_MAX + 1)]
    with pytest.raises(UserError, match="1001 invitations at a time; at most 1000"):
        put(tmp_path, *many)
    assert load(tmp_path) == {"learner:ada": ADA}
    put(tmp_path, *many[1:])
    assert len(load(tmp_path)) == INVITATIONS_MAX


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder whose file somebody is changing."""
    put(tmp_path, ADA)
    with (tmp_path / ".invitations.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def test_the_broker_waits_for_no_command(locked: Path) -> None:
    def forget(_: Invitations) -> Mapping[str, Invitation]:
        raise AssertionError("changed while somebody else does")

    assert not change(locked, forget, now_unix_s=NOW, wait=False)
    assert load(locked) == {"learner:ada": ADA}


def test_nobody_changes_the_file_while_it_is_changed(tmp_path: Path) -> None:
    inner: list[bool] = []

    def slow(before: Invitations) -> Mapping[str, Invitation]:
        inner.append(change(tmp_path, lambda _: {}, now_unix_s=NOW, wait=False))
        return {**before, "learner:ada": ADA}

    assert change(tmp_path, slow, now_unix_s=NOW)
    assert inner == [False]
    assert load(tmp_path) == {"learner:ada": ADA}


def test_a_folder_that_is_not_there_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be opened"):
        put(tmp_path / "none", ADA)
