"""Real sites that make a joint key over a real broker, killed at any step, or lied to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from daemons import METISFL, Daemons

from metisfl.deploy.ckks_keys import load_public, load_secret
from metisfl.deploy.keys import load_identity
from metisfl.learner.ceremony_install import DONE_FILE, FORMER
from metisfl.learner.ceremony_kept import STATE_FILE
from metisfl.proto.ckks_key import CEREMONY_MAGIC, PublicPart, SecretPart

SITES = {"ada": "0", "bob": "0", "cyd": "0"}
DEADLINE_S = 60.0

# A site that breaks the rules in the way that is put in.
LIAR = """
import sys
from metisfl.learner import ceremony_shell as shell
from metisfl.learner.ceremony_command import command

say, seal, make_share = shell.Ceremony._say, shell.box_for, shell.make_share
{lie}
command(sys.argv[1:])
"""
ANOTHER_SHARE = """
def lie(self, effect):
    if effect.step == 4:
        effect = shell.core.Say(4, bytes([effect.body[0] ^ 1]) + effect.body[1:])
    say(self, effect)

shell.Ceremony._say = lie
"""
ANOTHER_BOX = """
shell.box_for = lambda key, part: seal(key, bytes(32))
"""
NO_POLYNOMIAL = """
def lie(**more):
    share = make_share(**more)
    return type(share)(bytes([255]) * len(share.public), share.secret)

shell.make_share = lie
"""
LIES = {
    ANOTHER_SHARE: "cyd has said in step 4 another thing than it was bound to by step 3",
    ANOTHER_BOX: "says that its box of cyd does not hold what cyd is bound to",
    NO_POLYNOMIAL: "says that the share of cyd is no part of a key",
}


class Sites:
    """The sites' commands, each a process, and the broker that they talk over."""

    def __init__(self, folder: Path) -> None:
        self.daemons = Daemons(folder, SITES, started=False)
        self.daemons.start("broker")
        self.folder = folder
        self.running: dict[str, subprocess.Popen[str]] = {}
        self.lie = ""  # of cyd
        self.manifest = self.new_manifest("manifest.toml", *SITES)

    def keys(self, name: str) -> Path:
        return self.daemons.homes.learners[name] / "keys"

    def new_manifest(self, file: str, *names: str) -> Path:
        path = self.folder / file
        command = [METISFL, "keys", "ceremony", "new", str(path), "--name", "outages"]
        for name in names:
            command += ["--site", load_identity(self.keys(name)).public_line]
        subprocess.run(command, check=True, capture_output=True)
        return path

    def start(self, name: str, *more: str) -> None:
        start = [METISFL, "keys", "ceremony"]
        if self.lie and name == "cyd":
            start = [sys.executable, "-c", LIAR.format(lie=self.lie)]
        options = ["--folder", str(self.keys(name)), "--json", *more]
        options += ["--ingress", self.daemons.ingress, "--live", self.daemons.live]
        self.running[name] = subprocess.Popen(
            [*start, str(self.manifest), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.communicate()

    def end(self, name: str) -> tuple[int, str, str]:
        process = self.running.pop(name)
        out, told = process.communicate(timeout=DEADLINE_S)
        return process.returncode, out, told

    def step(self, name: str) -> int:
        """The newest step that a site has heard of, by its disk; 9: it has its key."""
        try:
            data = (self.keys(name) / STATE_FILE).read_bytes()
        except FileNotFoundError:
            return 9 if (self.keys(name) / DONE_FILE).exists() else 0
        heard = msgpack.unpackb(data[len(CEREMONY_MAGIC) :])["heard"]
        return max((step for step, _, _ in heard), default=0)

    def until(self, name: str, step: int) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while self.step(name) < step:
            assert time.monotonic() < deadline, f"{name} is at step {self.step(name)}"
            os.sched_yield()

    def check_made(self, *names: str) -> PublicPart:
        """All of them end well, with one public part, one mask key and a share of their own."""
        for name in names:
            code, out, told = self.end(name)
            assert code == 0, told
            public = load_public(self.keys(name))
            assert public is not None
            assert json.loads(out)["fingerprint"] == public.fingerprint.hex()
        contents = {(self.keys(name) / "public.ckks").read_bytes() for name in names}
        assert len(contents) == 1, "sites have different public parts"
        secrets: list[SecretPart] = [load_secret(self.keys(name)) for name in names]
        assert len({secret.secret_key for secret in secrets}) == len(names)
        assert len({secret.mask_key for secret in secrets}) == 1
        assert public is not None
        assert public.sites == tuple(sorted(names))
        assert not any((self.keys(name) / STATE_FILE).exists() for name in names)
        return public

    def stop(self) -> None:
        for name in list(self.running):
            self.kill(name)
        self.daemons.stop()


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    made = Sites(tmp_path)
    yield made
    made.stop()


def test_sites_make_a_key_and_say_so_when_asked_again(sites: Sites) -> None:
    for name in SITES:
        sites.start(name)
    public = sites.check_made(*SITES)
    sites.daemons.end("broker", signal.SIGKILL)
    sites.start("ada")
    code, out, told = sites.end("ada")
    assert code == 0, told
    assert "was finished before" in told
    assert json.loads(out)["fingerprint"] == public.fingerprint.hex()


@pytest.mark.chaos
@pytest.mark.parametrize("victim", ["ada", "bob", "cyd", "broker"])
def test_a_kill_at_any_step_changes_nothing(sites: Sites, victim: str) -> None:
    for name in SITES:
        sites.start(name)
    killed = 0
    for step in (1, 2, 3, 4, 5):
        seen_at = "ada" if victim == "broker" else victim
        sites.until(seen_at, step)
        if sites.step(seen_at) == 9:
            break
        if victim == "broker":
            sites.daemons.restart("broker", signal.SIGKILL)
        else:
            sites.kill(victim)
            sites.start(victim)
        killed += 1
    assert killed >= 3, "it was over before it could be disturbed"
    sites.check_made(*SITES)


@pytest.mark.parametrize("lie", LIES, ids=["another share", "another box", "no polynomial"])
def test_a_site_that_lies_is_named_by_all_others(sites: Sites, lie: str) -> None:
    sites.lie = lie
    for name in SITES:
        sites.start(name)
    for name in ("ada", "bob"):
        code, out, told = sites.end(name)
        assert code == 4, told
        assert LIES[lie] in told
        assert "write a new manifest" in told
        assert out == ""
        assert not (sites.keys(name) / "public.ckks").exists()
    sites.daemons.end("broker", signal.SIGKILL)
    sites.start("bob")
    code, _, told = sites.end("bob")
    assert code == 4, "a stop is for good"
    assert LIES[lie] in told


def test_a_new_manifest_makes_a_new_key_and_keeps_the_former_one(sites: Sites) -> None:
    for name in SITES:
        sites.start(name)
    former = sites.check_made(*SITES)
    held = load_secret(sites.keys("ada"))
    sites.manifest = sites.new_manifest("without-cyd.toml", "ada", "bob")
    for name in ("ada", "bob"):
        sites.start(name)
    now = sites.check_made("ada", "bob")
    assert now.fingerprint != former.fingerprint
    place = sites.keys("ada") / FORMER / former.fingerprint.hex()
    assert (place / "public.ckks").read_bytes() == former.pack()
    assert SecretPart.parse((place / "secret.ckks").read_bytes()) == held
    assert load_public(sites.keys("cyd")) == former, "who is not named keeps what it has"
    sites.start("cyd")
    code, _, told = sites.end("cyd")
    assert code == 2
    assert "does not name cyd" in told


def test_who_waits_too_long_says_for_whom_and_goes_on_later(sites: Sites) -> None:
    sites.start("ada", "--wait-s", "3")
    code, _, told = sites.end("ada")
    assert code == 3
    assert "this site waits for bob, cyd to begin (1 of 5)" in told
    for name in SITES:
        sites.start(name)
    sites.check_made(*SITES)


def test_a_running_daemon_is_named(sites: Sites) -> None:
    sites.start("ada")
    sites.until("ada", 1)
    first = sites.running.pop("ada")
    sites.start("ada")
    code, _, told = sites.end("ada")
    assert code == 3
    assert f"process {first.pid}" in told
    assert "takes turns with the learner's daemon, which must be stopped" in told
    sites.running["ada"] = first
