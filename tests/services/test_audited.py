"""What real daemons leave in their audit logs: who came, who asked for what, who was refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq
from daemons import DEADLINE_S, METISFL, Daemons

from metisfl.deploy.audit_files import AUDIT_FILE, check, files_of
from metisfl.deploy.ckks_keys import load_public
from metisfl.deploy.keys import load_identity
from metisfl.native_c import crc32c
from metisfl.proto.bulk import Code, Open, Refused, pack, parse
from metisfl.proto.chunk import federation_digest

ANSWER_MS = 20_000


def audited(home: Path) -> list[tuple[str, dict[str, Any]]]:
    """The facts in the log of a daemon, which must be whole."""
    paths = files_of(home / AUDIT_FILE)
    assert check(paths).fault == ""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [(line["what"], line["facts"]) for line in lines]


def of_runs(home: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(what, facts) for what, facts in audited(home) if what.startswith("run ")]


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    daemons = Daemons(tmp_path, {"ada": "honest 1", "bob": "honest 2"}, encrypted=True)
    try:
        yield daemons
    finally:
        daemons.stop()


def run(daemons: Daemons, rounds: int = 1) -> None:
    driver = daemons.run(rounds)
    _, said = driver.communicate(timeout=DEADLINE_S)
    assert driver.returncode == 0, said


def test_the_logs_tell_of_keys_and_runs_and_of_nothing_twice(daemons: Daemons) -> None:
    run(daemons)
    for name in ("controller", "ada"):
        daemons.restart(name, signal.SIGKILL)
    run(daemons, rounds=2)
    homes = daemons.homes
    key = load_public(homes.controller / "keys")
    assert key is not None
    starts = [facts for what, facts in audited(homes.controller) if what == "started"]
    assert len(starts) == 2, "one of each process"
    public = load_identity(homes.controller / "keys").public.decode()
    assert starts[0]["public"] == public
    assert starts[0]["key"] == key.fingerprint.hex()
    (first, *_) = [facts for what, facts in audited(homes.learners["ada"]) if what == "started"]
    assert (first["controller"], first["key"]) == (public, key.fingerprint.hex())

    runs = of_runs(homes.controller)
    assert [what for what, _ in runs] == ["run asked for", "run finished"] * 2
    assert {facts["by"] for what, facts in runs if what == "run asked for"} == {"driver:local"}
    ends = [facts for what, facts in runs if what == "run finished"]
    for name in ("ada", "bob"):
        theirs = [facts for _, facts in of_runs(homes.learners[name])]
        assert [_the_same(facts) for facts in theirs] == [_the_same(facts) for facts in ends]
    for facts in ends:
        assert _verified(homes.controller / "rounds" / facts["run"], facts["record"]) == 0


def _the_same(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    return facts["run"], facts["outcome"], facts["record"], facts["event"]


def _verified(folder: Path, head: str) -> int:
    command = [METISFL, "rounds", "verify", str(folder), "--head", head]
    return subprocess.run(command, capture_output=True).returncode


def test_who_wants_what_is_not_his_is_recorded_at_the_controller(daemons: Daemons) -> None:
    """With the keys of sites, and nothing of ours in between, while a round is open."""
    os.mkfifo(daemons.pause)
    driver = daemons.run(rounds=1)
    daemons.pause.open().close()  # bob trains, and keeps the round open
    home = daemons.homes.controller
    ((_, asked),) = of_runs(home)
    task = f"{asked['run']}.1.train.bob"
    ours = federation_digest("outages", asked["run"])
    with zmq.Context() as context:

        def refused_to(site: str, parts: Sequence[Any]) -> Code:
            identity = load_identity(daemons.homes.learners[site] / "keys")
            with context.socket(zmq.DEALER) as socket:
                socket.linger = 0
                socket.curve_publickey, socket.curve_secretkey = identity.public, identity.secret
                socket.curve_serverkey = load_identity(home / "keys").public
                socket.connect(daemons.bulk)
                socket.send_multipart([*parts])
                assert socket.poll(ANSWER_MS), "no answer"
                answer = parse(socket.recv_multipart(), crc32c)
                assert isinstance(answer, Refused)
                return Code(answer.code)

        for _ in range(3):
            assert refused_to("ada", [b"nonsense"]) is Code.BAD_FRAME
            for site, task_id, federation, code in (
                ("ada", task, ours, Code.NOT_YOURS),
                ("bob", task, bytes(32), Code.OTHER_FEDERATION),
                ("ada", "of a round that is over", ours, Code.UNKNOWN_TASK),
            ):
                frame = Open(task_id, federation, bytes(32), 1, b"manifest")
                assert refused_to(site, pack(frame, crc32c)) is code
    driver.kill()
    assert [
        (what, facts["who"]) for what, facts in audited(home) if what.startswith("transfer refused")
    ] == [
        ("transfer refused: BAD_FRAME", "learner:ada"),
        ("transfer refused: NOT_YOURS", "learner:ada"),
        ("transfer refused: OTHER_FEDERATION", "learner:bob"),
    ], "each once; what may happen to an honest site is not among them"
