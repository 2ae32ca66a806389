"""metisfl keys ceremony: what is refused before anything is said, and manifests as files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from metisfl.deploy.key_lists import add_server
from metisfl.deploy.keys import Identity, create_identity
from metisfl.deploy.registry import Peer, admit
from metisfl.learner.ceremony_command import command
from metisfl.learner.ceremony_file import load_manifest
from metisfl.proto.errors import UserError

FEDERATION = """
[federation]
name = "hearts"
rounds = 1
privacy = "ckks-threshold"
[encryption]
error = 1e-5
min_contributors = 3
max_share = 0.5
verify = "full"
[app]
object = "a:b"
[[learners]]
name = "ada"
[[learners]]
name = "bob"
[[learners]]
name = "cyd"
"""


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command sets it up for a process of its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def people(tmp_path: Path) -> dict[str, Identity]:
    return {
        name: create_identity(tmp_path / name / "keys", f"learner:{name}")
        for name in ("ada", "bob", "cyd", "dee")
    }


def write(tmp_path: Path, *arguments: str, file: str = "manifest.toml") -> Path:
    path = tmp_path / file
    assert command(["new", str(path), *arguments]) == 0
    return path


def lines(people: dict[str, Identity], *names: str) -> list[str]:
    return [part for name in names for part in ("--site", people[name].public_line)]


def test_a_manifest_from_public_lines(
    tmp_path: Path, people: dict[str, Identity], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "--name", "hearts", *lines(people, "bob", "ada"), "--error", "1e-4")
    manifest = load_manifest(path)
    assert manifest.sites == (("ada", people["ada"].public), ("bob", people["bob"].public))
    assert (manifest.federation, manifest.error, manifest.min_contributors) == ("hearts", 1e-4, 2)
    assert f"fingerprint: {manifest.told}" in capsys.readouterr().out
    other = write(tmp_path, "--name", "hearts", *lines(people, "bob", "ada"), file="again.toml")
    assert load_manifest(other).number != manifest.number, "every manifest is another ceremony"
    with pytest.raises(UserError, match="exists; a new ceremony has a new file"):
        command(["new", str(path), "--name", "hearts", *lines(people, "bob", "ada")])


def test_a_manifest_from_a_federation_file_and_a_list_of_peers(
    tmp_path: Path, people: dict[str, Identity]
) -> None:
    folder = tmp_path / "broker"
    for one in people.values():
        admit(folder, Peer(one.principal, one.public))
    driver = create_identity(tmp_path / "driver", "driver:ops")
    admit(folder, Peer(driver.principal, driver.public))
    federation = tmp_path / "federation.toml"
    federation.write_text(FEDERATION)
    asked = ["--federation", str(federation), "--peers", str(folder / "peers")]
    manifest = load_manifest(write(tmp_path, *asked))
    assert manifest.names == ("ada", "bob", "cyd"), "who is not in the file is not in the key"
    assert (manifest.error, manifest.min_contributors) == (1e-5, 3)
    assert (manifest.max_share, manifest.verify) == (0.5, "full")
    with pytest.raises(UserError, match="lists bob, cyd, whose key was not given"):
        command(
            ["new", str(tmp_path / "x"), "--federation", str(federation), *lines(people, "ada")]
        )


def test_what_makes_no_manifest_is_said(tmp_path: Path, people: dict[str, Identity]) -> None:
    path = str(tmp_path / "x")
    with pytest.raises(UserError, match="which federation"):
        command(["new", path, *lines(people, "ada", "bob")])
    with pytest.raises(UserError, match="sites: 1 make no joint key"):
        command(["new", path, "--name", "f", *lines(people, "ada")])
    with pytest.raises(UserError, match="whose key is"):
        command(["new", path, "--name", "f", "--site", people["ada"].public.decode()])
    twice = f"learner:ada {people['bob'].public.decode()}"
    with pytest.raises(UserError, match="ada is given with two keys"):
        command(["new", path, "--name", "f", *lines(people, "ada"), "--site", twice])
    assert not Path(path).exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"federation = ", "no TOML: "),
        (b"\xff", "no TOML: "),
        (b"a" + b".a" * 101 + b" = 1", "line 1 has 101 dots; at most 100"),
        (b"#" * (1 << 19), "more than 262144 bytes; this is no manifest"),
        (b"a = " + b"[" * 9000, "no TOML"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(
    tmp_path: Path, content: bytes, complaint: str
) -> None:
    path = tmp_path / "manifest.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {complaint}"):
        load_manifest(path)


def test_a_site_takes_part_only_where_it_is_named_by_its_key(
    tmp_path: Path, people: dict[str, Identity]
) -> None:
    path = write(tmp_path, "--name", "f", *lines(people, "ada", "bob"))
    with pytest.raises(UserError, match="does not name dee, which this is; it names ada, bob"):
        command([str(path), "--folder", str(tmp_path / "dee" / "keys")])
    text = path.read_text().replace(people["ada"].public.decode(), people["cyd"].public.decode())
    path.write_text(text)
    with pytest.raises(
        UserError, match=r"has another key for ada: .* this site's line is: learner"
    ):
        command([str(path), "--folder", str(tmp_path / "ada" / "keys")])
    create_identity(tmp_path / "driver", "driver:ada")
    with pytest.raises(UserError, match="keys folder of driver:ada; only learners have shares"):
        command([str(path), "--folder", str(tmp_path / "driver")])


def test_a_ceremony_under_way_is_not_given_up_by_accident(
    tmp_path: Path, people: dict[str, Identity], capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "ada" / "keys"
    add_server(keys, "broker", people["dee"].public)
    nowhere = ["--ingress", "tcp://127.0.0.1:9", "--live", "tcp://127.0.0.1:9", "--wait-s", "1"]
    first = write(tmp_path, "--name", "f", *lines(people, "ada", "bob"))
    assert command([str(first), "--folder", str(keys), *nowhere]) == 3
    told = capsys.readouterr()
    assert load_manifest(first).told in told.out
    assert "no key within 1 s: this site waits for the broker" in told.err
    other = write(tmp_path, "--name", "f", *lines(people, "ada", "cyd"), file="other.toml")
    assert command([str(other), "--folder", str(keys), *nowhere]) == 2
    assert "is of another ceremony, which is under way" in capsys.readouterr().err
