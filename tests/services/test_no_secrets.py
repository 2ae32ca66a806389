"""No secret leaves the file that it was made in: not into a log, a database, a record, a command
line or an environment, whoever is killed.

The whole folder of a real, encrypted run is searched, while it goes on and after its end, and so is
whatever the processes of the run were started with. A secret is looked for in every form in which
something could write it down; its own key file, and no other, may hold it.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import pytest
from daemons import METISFL
from zmq.utils import z85

from metisfl.deploy.ckks_keys import SECRET_FILE, load_secret
from metisfl.deploy.keys import IDENTITY_FILE, create_identity, load_identity

VICTIMS = {"round 2": "learner", "round 4": "controller", "round 6": "broker"}
WINDOW_BYTES = 32
WINDOWS = 8
LOOK_S = 0.01
APPS = Path(__file__).parent
SITES = {"ada": "honest 1", "bob": "honest 2", "cyd": "raises"}
FEDERATION = f"""
[federation]
name = "secrets"
rounds = 8
quorum = 2
privacy = "ckks"
[app]
object = "trouble:Site"
path = "{APPS}"
""" + "".join(f"[[learners]]\nname = '{name}'\ndata = '{data}'\n" for name, data in SITES.items())


@dataclass(frozen=True)
class Secret:
    """`home` is the file that may hold it; of the key for updates each site has one."""

    name: str
    homes: frozenset[Path]
    patterns: Mapping[str, bytes]

    def found_in(self, content: bytes) -> list[str]:
        return [f"{self.name} as {form}" for form, p in self.patterns.items() if p in content]


def forms(secret: bytes) -> dict[str, bytes]:
    """What of a secret stands in a text that holds it, however it was written there.

    In base64 it depends on how many bytes of something else stand before it.
    """
    found = {"bytes": secret, "hex": secret.hex().encode(), "HEX": secret.hex().upper().encode()}
    found["repr"] = repr(secret)[2:-1].encode()
    for skipped in range(3):
        part = secret[skipped:]
        part = part[: len(part) // 3 * 3]
        found[f"base64 ({skipped})"] = b64encode(part)
        found[f"base64 of URLs ({skipped})"] = urlsafe_b64encode(part)
    return found


def identity_secret(path: Path) -> Secret:
    identity = load_identity(path.parent)
    raw, text = z85.decode(identity.secret), identity.secret
    patterns = {**forms(raw), **{f"Z85, {form}": p for form, p in forms(text).items()}}
    return Secret(f"the key of {identity.principal}", frozenset({path}), patterns)


def update_secret(paths: Iterable[Path]) -> Secret:
    """Some windows out of the middle of the key that all sites have."""
    homes = frozenset(paths)
    (key,) = {load_secret(path.parent).secret_key for path in homes}
    patterns: dict[str, bytes] = {}
    for number in range(1, WINDOWS + 1):
        place = len(key) * number // (WINDOWS + 1)
        window = key[place : place + WINDOW_BYTES]
        assert len(set(window)) > 8, f"nothing to search for at {place} of {len(key)} bytes"
        patterns |= {f"{form} at {place}": p for form, p in forms(window).items()}
    return Secret("the secret part for updates", homes, patterns)


def secrets_of(folder: Path) -> list[Secret]:
    identities = sorted(folder.rglob(IDENTITY_FILE))
    return [*map(identity_secret, identities), update_secret(folder.rglob(SECRET_FILE))]


def leaks(folder: Path, secrets: Iterable[Secret]) -> list[str]:
    """Where a secret is that must not be there. What is deleted meanwhile is passed by."""
    found = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        for secret in secrets:
            if path not in secret.homes:
                found += [f"{path}: {form}" for form in secret.found_in(content)]
    return found


class Watcher:
    """Keeps what a process and all that come from it were started with, until its block ends."""

    def __init__(self, root: int) -> None:
        self.seen: set[bytes] = set()
        self._root = root
        self._over = Event()
        self._thread = Thread(target=self._watch)

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def pid_of(self, *words: str) -> int:
        """The process whose command line has all these words."""
        for pid in _tree(self._root):
            arguments = _started_with(pid).split(b"\0")
            if all(word.encode() in arguments for word in words):
                return pid
        raise AssertionError(f"no process has {words} on its command line")

    def _watch(self) -> None:
        while not self._over.wait(LOOK_S):
            self.seen |= {_started_with(pid) for pid in _tree(self._root)}


def _tree(root: int) -> list[int]:
    found = [root]
    for pid in found:
        try:
            lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found += [int(child) for text in lists for child in text.split()]
    return found


def _started_with(pid: int) -> bytes:
    """Its command line and its environment; nothing once it has ended."""
    try:
        return b"".join(Path(f"/proc/{pid}/{what}").read_bytes() for what in ("cmdline", "environ"))
    except (FileNotFoundError, ProcessLookupError):
        return b""


# ---- The run --------------------------------------------------------------------------------


def test_a_whole_run_leaves_no_secret_anywhere(tmp_path: Path) -> None:
    """Each daemon is killed once with SIGABRT; a site fails with a traceback; all is logged.

    They may leave core files where they were started, as far as this shell is concerned.
    """
    (tmp_path / "federation.toml").write_text(FEDERATION)
    (tmp_path / "tmp").mkdir()
    folder, said = tmp_path / "run", ""
    secrets: list[Secret] = []
    during: list[str] = []
    left = dict(VICTIMS)
    with (tmp_path / "stdout").open("wb") as output:
        driver = subprocess.Popen(
            [METISFL, "up", "federation.toml", "--run-folder", str(folder)],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), "METISFL_LOG_LEVEL": "debug"},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2
            ),
        )
    try:
        with Watcher(driver.pid) as watcher:
            assert driver.stderr is not None
            for line in driver.stderr:
                said += line
                service = left.pop(line.partition(" of ")[0], None)
                if service is None:
                    continue
                home = folder / ("learners/ada" if service == "learner" else service)
                victim = watcher.pid_of(f"metisfl.{service}.service", str(home))
                os.kill(victim, signal.SIGABRT)
                during += leaks(tmp_path, secrets := secrets_of(folder))
    finally:
        driver.kill()
        driver.communicate()
    assert driver.returncode == 0, said
    assert left == {}, "all were killed"
    (tmp_path / "stderr").write_text(said)
    names = [secret.name.removeprefix("the key of ") for secret in secrets]
    assert {"broker", "controller", "driver:local", "learner:ada"} <= set(names)
    assert during == []
    assert leaks(tmp_path, secrets) == []
    everything = b"\n".join(watcher.seen)
    for words in (b"broker.service", b"controller.service", b"worker_child", b"keys\0new"):
        assert words in everything, f"no process with {words!r} was seen"
    assert [form for secret in secrets for form in secret.found_in(everything)] == []
    logs = "".join(path.read_text() for path in (folder / "logs").iterdir())
    assert "ZeroDivisionError" in logs, "a site failed, and its log says how"
    for searched in ("broker/log/events.db", "controller/audit.jsonl", "controller/controller.db"):
        assert (folder / searched).exists(), "and this was searched, too"


# ---- The search finds what it is for -------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_identity(tmp_path / "ada" / "keys", "learner:ada")
    create_identity(tmp_path / "bob" / "keys", "learner:bob")
    return tmp_path


def test_a_secret_is_found_in_every_form_wherever_it_stands(folder: Path) -> None:
    path = folder / "ada" / "keys" / IDENTITY_FILE
    secret = identity_secret(path)
    assert leaks(folder, [secret]) == [], "its own file may hold it"
    text = load_identity(path.parent).secret
    planted = folder / "logs" / "daemon.log"
    planted.parent.mkdir()
    for whole in (text, z85.decode(text)):
        for before in range(4):
            blob = b"x" * before + whole + b"y" * 5
            for written in (
                blob,
                blob.hex().encode(),
                blob.hex().upper().encode(),
                b64encode(blob),
                urlsafe_b64encode(blob),
                repr(blob).encode(),
            ):
                planted.write_bytes(b'{"event": "' + written + b'"}\n')
                (first, *_) = leaks(folder, [secret])
                assert first.startswith(f"{planted}: the key of learner:ada as "), written


def test_the_key_file_of_another_may_not_hold_it(folder: Path) -> None:
    secrets = [identity_secret(path) for path in sorted(folder.rglob(IDENTITY_FILE))]
    ada, bob = (folder / name / "keys" / IDENTITY_FILE for name in ("ada", "bob"))
    assert leaks(folder, secrets) == []
    bob.write_bytes(bob.read_bytes() + b"# " + ada.read_bytes())
    assert leaks(folder, secrets)[0] == f"{bob}: the key of learner:ada as Z85, bytes"


def test_the_secret_part_for_updates_is_found_by_a_piece_of_it(tmp_path: Path) -> None:
    made = tmp_path / "keys"
    command = [METISFL, "keys", "new", str(made), "--max-learners", "2"]
    subprocess.run(command, check=True, capture_output=True)
    secret = update_secret([made / SECRET_FILE])
    content = (made / SECRET_FILE).read_bytes()
    assert leaks(tmp_path, [secret]) == []
    planted = tmp_path / "models" / "a.model"
    planted.parent.mkdir()
    planted.write_bytes(b"model" + content[len(content) // 4 : len(content) // 2])
    assert leaks(tmp_path, [secret])
    planted.write_bytes(b64encode(b"?" + content))
    assert leaks(tmp_path, [secret])


@pytest.mark.parametrize("place", ["argument", "variable"])
def test_what_a_child_of_a_child_is_started_with_is_seen(place: str) -> None:
    child = "import sys; print(1, flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, *sys.argv])"
    given = {"argument": (["planted"], {}), "variable": ([], {"PLANTED": "planted"})}
    arguments, environment = given[place]
    process = subprocess.Popen(
        [sys.executable, "-c", parent, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process, Watcher(process.pid) as watcher:
        assert process.stdout is not None
        process.stdout.readline()
        assert b"planted" in _started_with(watcher.pid_of(child))
        seen = watcher.seen
        while not any(child.encode() in one and b"planted" in one for one in seen):
            seen = watcher.seen
        process.communicate()
